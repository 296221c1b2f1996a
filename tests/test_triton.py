"""The Triton backend: choice of configurations, tuning, and life without Triton. Nothing here needs Triton itself."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

from fif_ops import FusedFiF, backends, explain, ops, tune
from fif_ops.backends import Problem, tuned
from fif_ops.backends import triton as backend
from fif_ops.backends.triton import config
from fif_ops.backends.triton.host import Unit, cdiv, unit_of


@pytest.fixture(autouse=True)
def no_cache_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FIF_OPS_CACHE", str(tmp_path / "cache.json"))
    config.reset()
    yield
    config.reset()


# ---- choices


def any_unit(**changes) -> Unit:
    x = torch.empty(128, 64, 28, 28, dtype=torch.float16, device="meta").contiguous(memory_format=torch.channels_last)
    w1, w2 = x.new_empty(32, 64, 1, 1), x.new_empty(32, 1, 3, 3)
    return unit_of(x, w1, w2, 64, 1, True, 1, 1, False)._replace(**changes)


def save(choices):
    tuned.save(tuned.cache_path(), "cpu", choices)
    config.reset()


def test_choices_are_saved_and_read():
    unit, device = any_unit(), torch.device("cpu")
    name = config.bucket("product", unit)
    first = config.pick("product", unit, device)
    save({name: 1})
    assert config.pick("product", unit, device) == config.CANDIDATES["product"](unit)[1] != first
    save({"another": 2})
    assert json.loads(tuned.cache_path().read_text())["choices"] == {"cpu": {name: 1, "another": 2}}
    for useless in (99, -1, "1", None):
        save({name: useless})
        assert config.pick("product", unit, device) == first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0, "choices": {}}', '{"format": 2, "choices": {"cpu": []}}', '{"format": 2, "choices": 3}'])  # fmt: skip
def test_a_bad_cache_file_counts_as_empty(content):
    tuned.cache_path().write_text(content)
    assert config.pick("product", any_unit(), torch.device("cpu")) == config.CANDIDATES["product"](any_unit())[0]


def test_cache_path_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("FIF_OPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.cache_path() == tmp_path / "fif_ops" / "tuned.json"


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kernel", [3, 5])
def test_halo_tiles_cover_every_map(last, kernel):
    """Own pixels reach across the map, and a halo holds what the cheap kernel reads."""
    for size in (1, 2, 3, 7, 8, 14, 28, 30, 56, 57, 112, 224):
        for images in (1, 3, 128):
            unit = any_unit(last=last, kernel=kernel, height=size, width=size, images=images)
            for places in (128, 256, 512):
                best = config.halo_configs(unit, 16, places)
                assert best
                for c in best:
                    assert c.tile[0] * c.tile[1] * c.tile[2] == places
                    for i in (0, 1):
                        covers = c.tile[1 + i] >= size and c.halo[i] == 0
                        assert covers or (c.halo[i] >= kernel // 2 and c.own[i] > 0)
                    assert config.tiles_of(unit, c) >= cdiv(images * size * size, places)


def test_the_rule_fuses_where_it_saves_traffic():
    cpu = torch.device("cpu")
    assert config.inference(any_unit(images=128, height=7, width=7, in_channels=160, maps=480), cpu) is not None
    assert config.inference(any_unit(images=128, height=28, width=28, in_channels=960, maps=16), cpu) is None


# ---- the measured choice of a backend

needs_kernels = pytest.mark.skipif(not ops.LOADED, reason="the package was installed without its kernels")


def unit_and_bucket(trains=False):
    unit, x = FusedFiF(5, 8).train(trains), torch.randn(2, 5, 6, 6)
    weights = (unit.primary_conv[0].weight, unit.cheap_operation[0].weight)
    return unit, x, backends.bucket(Problem(x, *weights, 1, 0, 1, False), trains)


@needs_kernels
def test_a_measured_backend_comes_first():
    unit, x, name = unit_and_bucket()
    with torch.no_grad():
        assert explain(unit, x).backend == "cpu"
        ours = unit(x)
        save({name: "reference"})
        why = explain(unit, x)
        assert why.backend == "reference"
        assert ("cpu", f"reference was faster, says {tuned.cache_path()}") in why.refused
        assert torch.equal(unit(x), unit.to_reference()(x))
        with backends.use("cpu"):
            assert explain(unit, x).backend == "cpu" and torch.equal(unit(x), ours)
        assert explain(unit, torch.randn(9, 5, 4, 4)).backend == "reference"  # whatever the batch
    assert explain(unit, x).backend == "cpu"  # in training, which was not measured


@needs_kernels
@pytest.mark.parametrize("choice", ["cuda", "no such backend", 1, None, ["cpu"]])
def test_a_measured_backend_that_cannot_run_is_passed_over(choice):
    unit, x, name = unit_and_bucket()
    save({name: choice})
    with torch.no_grad():
        assert explain(unit, x).backend == "cpu"
        unit(x)


@needs_kernels
def test_a_measured_backend_in_a_graph():
    unit, x, name = unit_and_bucket()
    save({name: "reference"})
    with torch.no_grad():
        compiled = torch.compile(unit, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), unit(x))


# ---- tuning


def test_tune_lists_what_it_would_measure(capsys):
    assert tune.run(tune.Settings(dry_run=True)) == 0
    printed = capsys.readouterr().out
    assert "64-32@28 b128 3x3 float16 channels_last" in printed and str(tuned.cache_path()) in printed


def test_tune_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.run(tune.Settings()) == tune.FAILED
    assert "no NVIDIA GPU" in capsys.readouterr().err


@needs_kernels
def test_tune_compares_the_backends(monkeypatch):
    """Where results are right: the fastest over all shapes of a bucket is what later runs take."""
    seconds = {"cpu": iter([1, 8, 1, 8]), "reference": iter([3, 2, 3, 2])}  # inference, training; twice
    monkeypatch.setattr(tune, "milliseconds", lambda run, *_: run() and next(seconds[run.args[0]]))
    found = {}
    for batch in (2, 3):
        shape = tune.Shape(5, 4, 6, batch, torch.float32, False)
        inputs = tune.random_inputs(shape, torch.device("cpu"))
        tune.compare(shape, inputs, 1, torch.empty(0), found)
    names = {bucket: tune.fastest(times) for bucket, times in found.items()}
    assert sorted(names.values()) == ["cpu", "reference"]
    save(names)
    for trains, wanted in ((False, "cpu"), (True, "reference")):
        unit, x, bucket = unit_and_bucket(trains)
        assert names[bucket] == wanted
        with torch.set_grad_enabled(trains):
            assert explain(unit, x).backend == wanted


@needs_kernels
def test_tune_keeps_no_backend_that_is_wrong(monkeypatch):
    monkeypatch.setattr(tune, "milliseconds", lambda *_: 1.0)
    shape = tune.Shape(5, 4, 6, 2, torch.float32, False)
    inputs = tune.random_inputs(shape, torch.device("cpu"))
    spoilt, found = inputs._replace(inferred=inputs.inferred + 1), {}
    tune.compare(shape, spoilt, 1, torch.empty(0), found)
    assert sorted(map(len, found.values())) == [0, 2]


def test_a_backend_that_ran_fewer_shapes_is_not_the_fastest():
    assert tune.fastest({"cuda": [3.0, 3.0], "triton": [1.0]}) == "cuda"
    assert tune.fastest({"cuda": [4.0, 4.0], "triton": [1.0, 8.0]}) == "triton"


def test_tune_options_have_the_names_of_the_settings():
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    options = vars(parser.parse_args(["--batches", "1", "2", "--dry-run"]))
    assert tune.Settings(**options).dry_run and list(tune.Settings(**options).batches) == [1, 2]


# ---- without Triton, or with a bad one


def python(program: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_package_leaves_triton_alone_without_a_gpu():
    """On import, and where a unit runs, trains and is explained on the processor."""
    program = """
import sys, torch, fif_ops, fif_ops.backends.triton, fif_ops.info
imported = ['triton' in sys.modules]
unit, x = fif_ops.FusedFiF(3, 6), torch.randn(2, 3, 5, 5)
unit(x).sum().backward()
fif_ops.explain(unit, x), fif_ops.info.collect()
print(imported, 'triton' in sys.modules, 'fif_ops.backends.triton.forward' in sys.modules)
"""
    assert python(program, CUDA_VISIBLE_DEVICES="") == "[False] False False"


def test_amd_gpus_are_refused(monkeypatch):
    """torch calls them cuda too, and Triton runs there: but other options, warps of 64, and nothing was tried."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in backend.Triton().unavailable()


def test_tune_without_a_gpu_in_one_line():
    command = [sys.executable, "-m", "fif_ops", "tune"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (tune.FAILED, "")
    assert done.stderr == "nothing to tune: torch finds no NVIDIA GPU\n"


def test_operators_are_declared_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, fif_ops.backends.triton
x = torch.empty(2, 3, 5, 5, device="meta").contiguous(memory_format=torch.channels_last)
out = torch.ops.fif_ops_triton.infer(x, x.new_empty(4, 3, 1, 1), x.new_empty(4, 1, 3, 3), *[None] * 10, 0, 0, 7, 1, True, stride=2)
print(tuple(out.shape), out.is_contiguous(memory_format=torch.channels_last))
"""
    assert python(program) == "(2, 7, 3, 3) True"


REASONS = {
    "absent": ('importlib.util.find_spec = lambda name, *rest: None', "Triton is not installed (pip install triton)"),
    "old": ('importlib.util.find_spec = lambda name, *rest: 1; importlib.metadata.version = lambda name: "3.5.1"', "Triton 3.5.1 is older than 3.6"),
    "another module of that name": ("sys.modules['triton'] = type(sys)('triton')", "Triton is not installed"),
    "silent": ('importlib.util.find_spec = lambda name: 1; importlib.import_module = lambda name: (_ for _ in ()).throw(AssertionError)', "does not work here (AssertionError: )"),
    "without a driver": ("torch.cuda.is_available = lambda: True", "does not work here ("),
    "broken": ('sys.modules["triton"] = None; importlib.util.find_spec = lambda name, *rest: 1', "does not work here (ModuleNotFoundError"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_one_quiet_reason(case):
    patch, message = REASONS[case]
    if case == "without a driver":
        pytest.importorskip("triton", exc_type=ImportError)
    program = f"import sys, torch, importlib.util, importlib.metadata, fif_ops.backends.triton as t; {patch}; print(t.triton_reason())"
    said = python(program, CUDA_VISIBLE_DEVICES="")
    assert message in said and "\n" not in said


def a_problem(x=(2, 3, 4, 4), cheap=(4, 1, 3, 3), dtype=torch.float32, device="cpu") -> Problem:
    x = torch.empty(x, dtype=dtype, device=device)
    return Problem(x, x.new_empty(4, 3, 1, 1), x.new_empty(cheap), 1, 0, 1, False)


def test_reasons_of_problems(monkeypatch):
    problem = a_problem()
    chosen = backend.Triton()
    assert "not on cuda" in chosen.reason(problem)
    assert chosen.fuses_primary(problem, False) and not chosen.fuses_primary(problem._replace(padding=1), False)
    monkeypatch.setattr(backend, "INTERPRETED", True)
    monkeypatch.setattr(backend, "triton_reason", lambda: "")
    assert chosen.reason(problem) == "" and chosen.can_run(problem)
    for changed, message in (
        ({"dtype": torch.float64}, "x is torch.float64, not one of torch.float32"),
        ({"cheap": (4, 2, 3, 3)}, "reads 2 primary maps, not 1"),
        ({"cheap": (4, 1, 7, 7)}, "size is 7, not one of 3, 5"),
        ({"x": (0, 3, 4, 4)}, "x is empty"),
        ({"device": "meta"}, "x is on meta"),
    ):
        assert message in chosen.reason(a_problem(**changed))
    monkeypatch.setattr(backend, "triton_reason", lambda: "Triton is not installed")
    assert chosen.reason(problem) == "Triton is not installed"
