"""The command line: help, refusals, info, and what happens without the demo's packages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import fif_ops
from fif_ops.__main__ import DEMO_PACKAGES, main


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_without_a_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "usage: python -m fif_ops" in shown
    assert "demo" in shown and "info" in shown


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fif_ops", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == f"fif_ops {fif_ops.__version__}"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["dance"], "'dance'"),
        (["info", "--colour"], "--colour"),
        (["demo", "--epochs", "0"], "'0' must be a whole number of at least 1"),
        (["demo", "--epochs", "many"], "'many' must be a whole number of at least 1"),
        (["demo", "--batch-size", "1"], "'1' must be a whole number of at least 2"),
        (["demo", "--size", "8"], "'8' must be a whole number of at least 16"),
        (["demo", "--width", "-1"], "'-1' must be a number above 0"),
        (["demo", "--lr", "nan"], "'nan' must be a number above 0"),
        (["demo", "--dtype", "int8"], "int8"),
    ],
)
def test_wrong_usage_is_refused(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_info_shows_versions_library_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fif_ops"] == fif_ops.__version__
    assert {"path", "loaded", "error", "built_for", "cpu_isa", "cpu_isas"} <= facts["library"].keys()
    assert all(backend["available"] or backend["reason"] for backend in facts["backends"])
    assert {"name": "reference", "available": True}.items() <= facts["backends"][-1].items()

    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["fif_ops", fif_ops.__version__]
    for backend in facts["backends"]:
        state = "available" if backend["available"] else f"unavailable: {backend['reason']}"
        assert any(line.split(maxsplit=1)[0] == backend["name"] and state in line for line in lines)
    assert ("not loaded" in "\n".join(lines)) == (not facts["library"]["loaded"])


def test_info_names_the_error_of_a_library_that_does_not_load() -> None:
    from fif_ops import info

    facts = info.collect()
    facts["library"] = {
        "path": "/somewhere/_C.so",
        "loaded": False,
        "error": "undefined symbol",
        "built_for": {"torch": "2.10", "instruction_sets": ["avx2", "avx512"]},
        "cpu_isa": None,
        "cpu_isas": [],
    }
    text = info.as_text(facts)
    assert "/somewhere/_C.so not loaded: undefined symbol" in text
    assert "avx2, avx512" in text
    assert "instruction set " not in text


@pytest.mark.parametrize("module", DEMO_PACKAGES)
def test_missing_demo_package_is_named_with_its_remedy(module: str) -> None:
    done = python(
        f"import sys; sys.modules[{module!r}] = None\n"
        "from fif_ops.__main__ import main; sys.exit(main(['demo', '--data', 'nowhere']))"
    )
    assert done.returncode == 2
    message = done.stderr.strip()
    assert "\n" not in message
    assert DEMO_PACKAGES[module] in message
    assert "pip install 'fif_ops[demo]'" in message


def test_importing_the_package_leaves_the_demo_packages_alone() -> None:
    done = python(
        f"import sys, fif_ops, fif_ops.__main__; print([name for name in {list(DEMO_PACKAGES)} if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_interrupt_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fif_ops import demo

    def stop(settings: demo.Settings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", stop)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
