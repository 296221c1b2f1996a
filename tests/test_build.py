"""The build and what it leaves: one wheel for all, clear words where something is missing, an import that only imports.

Everything runs in processes of their own, against a wheel that is built once per session from the objects that an
earlier build left in build/.
"""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine() == "x86_64"
FORWARD_AND_BACKWARD = """
import torch, fif_ops
for _ in range(2):
    unit = fif_ops.FusedFiF(3, 8)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    unit(x).sum().backward()
    assert x.grad is not None
    reference = fif_ops.FeatureAugment(3, 8)
    reference.load_state_dict(unit.state_dict())
    torch.testing.assert_close(unit.eval()(x), reference.eval()(x))
"""
COLLECT_WARNINGS = f"""
import json, sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
{FORWARD_AND_BACKWARD.replace(chr(10), chr(10) + "    ")}
json.dump([str(w.message) for w in caught if "fif_ops" in str(w.message)], sys.stdout)
"""


def run(*command, cwd=ROOT, check=True, **environment):
    """The finished process; a variable that is None is taken out of the environment."""
    merged = {**os.environ, **{name: value for name, value in environment.items() if value is not None}}
    for name in [name for name, value in environment.items() if value is None]:
        merged.pop(name, None)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=merged, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_python(code, package, **environment):
    """Run code that finds fif_ops in the folder `package`, from inside it."""
    return run(sys.executable, "-c", code, cwd=package, PYTHONPATH=str(package), FIF_OPS_LIBRARY=None, **environment)


def run_setup(before, *arguments, cwd=ROOT, **environment):
    """setup.py with the Python statements `before` run in the same process ahead of it."""
    start = f"import runpy, sys; {before}; sys.argv = ['setup.py', *{arguments!r}]; "
    code = start + "sys.path.insert(0, ''); runpy.run_path('setup.py', run_name='__main__')"
    return run(sys.executable, "-c", code, cwd=cwd, check=False, **environment)


def make_wheel(source, folder, **environment):
    command = ["-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source]
    done = run(sys.executable, *command, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return make_wheel(ROOT, tmp_path_factory.mktemp("wheel"), FIF_OPS_REQUIRE_KERNELS="1")[0]


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def own_copy(unpacked, tmp_path):
    """The installed package, free to be damaged."""
    return Path(shutil.copytree(unpacked, tmp_path / "site"))


@pytest.fixture
def source_tree(tmp_path):
    """The files that a build reads, with nothing built yet."""
    tree = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for folder in ("fif_ops", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def test_one_wheel_serves_every_python(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("fif_ops-")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    assert {"fif_ops/_C.so", "fif_ops/_build_info.json", "fif_ops/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("fif_ops/", "fif_ops-")) for name in names)
    assert not [name for name in names if "cpython" in name]


def test_the_library_needs_only_the_stable_abi(unpacked):
    lines = run("nm", "-D", "--undefined-only", unpacked / "fif_ops/_C.so").stdout.splitlines()
    symbols = [line.split()[-1] for line in lines]
    assert not [name for name in symbols if re.match(r"_?Py[A-Z_]|_ZNK?(2at|3c10|5torch)", name)]
    plain = [name for name in symbols if "@" not in name and not name.startswith("_")]
    assert "aoti_torch_abi_version" in plain
    assert not [name for name in plain if not name.startswith(("aoti_torch_", "torch_"))]


def test_the_library_is_bound_to_libtorch_and_to_no_python(unpacked):
    dynamic = run("readelf", "-d", unpacked / "fif_ops/_C.so", LC_ALL="C").stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name]
    assert not re.findall(r"R(?:UN)?PATH", dynamic)


def test_the_record_of_the_build(unpacked):
    record = json.loads((unpacked / "fif_ops/_build_info.json").read_text())
    assert record["torch"] == torch.__version__
    assert record["isas"] == (["baseline", "avx2", "avx512", "avx512bf16", "amx"] if X86 else ["baseline"])
    assert record["machine"] == platform.machine()
    assert record["compiler"]


def test_a_second_build_has_nothing_to_do(wheel):
    ninja = [sys.executable, "-m", "ninja", "-f", "build/kernels/build.ninja"]
    assert "no work to do" in run(*ninja, "-n").stdout
    # Every header is known as a dependency, so that a change in one of them rebuilds.
    dependencies = run(*ninja, "-t", "deps").stdout
    headers = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("cpu/*.h")]
    assert not [header for header in headers if header not in dependencies]


def test_variants_share_no_function_that_the_linker_could_merge(wheel):
    # Else a function compiled for AVX-512 might be the copy that every processor runs.
    for folder in (ROOT / "build/kernels").iterdir():
        if not folder.is_dir() or folder.name == "cuda":  # which has nothing beyond the baseline
            continue
        for item in folder.glob("*.o"):
            symbols = [
                line.split(maxsplit=2)[1:] for line in run("nm", "-C", "--defined-only", item).stdout.splitlines()
            ]
            weak = [name for kind, name in symbols if kind in "WVu" and not name.startswith("DW.ref.")]
            assert not [name for name in weak if f"fif::{folder.name}::" not in name], item


def test_import_compiles_nothing_and_writes_nothing(own_copy, record_property):
    code = """
import json, os, sys, time
import torch
seen = []
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "os.mkdir"):
        seen.append([event, str(arguments[0])])
sys.addaudithook(watch)
start = time.perf_counter()
import fif_ops
seconds = time.perf_counter() - start
json.dump([seen, seconds], sys.stdout)
"""
    before = sorted(own_copy.rglob("*"))
    home = own_copy.parent / "home"
    home.mkdir()
    done = run_python(code, own_copy, HOME=str(home), PYTHONDONTWRITEBYTECODE="1")
    seen, seconds = json.loads(done.stdout)
    record_property("import_seconds_over_torch", seconds)
    assert seen == []
    assert sorted(own_copy.rglob("*")) == before
    assert not list(home.iterdir())
    assert seconds < 3


@pytest.mark.parametrize("triton", ["sys.modules['triton'] = None", "raise RuntimeError('0 active drivers')"])
def test_works_without_triton(unpacked, tmp_path, triton):
    block = "import sys\n"
    if triton.startswith("raise"):
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton/__init__.py").write_text(triton)
        block += f"sys.path.insert(0, {str(tmp_path)!r})"
    else:
        block += triton
    run_python(block + FORWARD_AND_BACKWARD, unpacked)


def test_the_wheel_runs_without_a_warning(unpacked):
    assert json.loads(run_python(COLLECT_WARNINGS, unpacked).stdout) == []


@pytest.mark.parametrize("damage", ["garbage", "undefined symbol"])
def test_a_broken_library_is_named_once_and_the_reference_works(own_copy, tmp_path, damage):
    library = own_copy / "fif_ops/_C.so"
    library.unlink()
    if damage == "garbage":
        library.write_bytes(b"not a library")
    else:
        source = tmp_path / "broken.cpp"
        source.write_text('extern "C" void aoti_torch_of_the_future(); void load() { aoti_torch_of_the_future(); }\n')
        compiler = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["find_compiler"]()
        run(*compiler.split(), "-shared", "-fPIC", source, "-o", library)
    record = own_copy / "fif_ops/_build_info.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.99.1"}))
    (warning,) = json.loads(run_python(COLLECT_WARNINGS, own_copy).stdout)
    assert "2.99.1" in warning, "what the library was built for"
    assert torch.__version__ in warning, "what was found"


def test_a_missing_library_is_named_once_and_the_reference_works(own_copy):
    (own_copy / "fif_ops/_C.so").unlink()
    (warning,) = json.loads(run_python(COLLECT_WARNINGS, own_copy).stdout)
    assert "reference" in warning


def test_without_a_compiler_the_python_package_installs(source_tree, tmp_path):
    wheel, output = make_wheel(source_tree, tmp_path / "pure", CXX="/nonexistent/g++", FIF_OPS_REQUIRE_KERNELS=None)
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = [line for line in output.splitlines() if "fif_ops: kernels not built" in line]
    assert "/nonexistent/g++" in line
    assert "install g++" in line
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert not list(installed.rglob("*.so"))
    assert len(json.loads(run_python(COLLECT_WARNINGS, installed).stdout)) == 1


def test_kernels_left_out_on_purpose(source_tree):
    done = run_setup("pass", "-q", "build", cwd=source_tree, FIF_OPS_SKIP_KERNELS="1", FIF_OPS_REQUIRE_KERNELS=None)
    assert done.returncode == 0
    assert "FIF_OPS_SKIP_KERNELS is set" in done.stderr
    assert not list(source_tree.rglob("*.so"))


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path")
OLD_SETUPTOOLS = "import setuptools; setuptools.__version__ = '65.5.0'"
OLD_TORCH = "import torch; torch.__version__ = '2.9.1+cpu'"
NO_TORCH = "sys.modules['torch'] = None"
NO_NINJA = (
    "import shutil; old = shutil.which; shutil.which = lambda name, **path: None if name == 'ninja' else old(name)"
)


@pytest.mark.parametrize(
    ("before", "environment", "words"),
    [
        (NO_TORCH, {}, "torch is needed to build the kernels: run `pip install 'torch>=2.10'`"),
        (OLD_TORCH, {}, "torch 2.9.1+cpu is too old: run `pip install 'torch>=2.10'`"),
        (OLD_SETUPTOOLS, {}, "setuptools 65.5.0 is too old: run `pip install 'setuptools>=77'`"),
        (NO_NINJA, {}, "ninja is missing: run `pip install ninja`"),
        ("pass", {"CXX": "/nonexistent/g++", "FIF_OPS_REQUIRE_KERNELS": "1"}, "no C++ compiler"),
        pytest.param(
            "import torch; torch.version.cuda = '11.8'",
            {},
            "of CUDA 11.8: set CUDA_HOME to a toolkit of CUDA 11",
            marks=needs_nvcc,
        ),
        pytest.param("pass", {"FIF_OPS_CUDA_ARCHS": "42"}, "FIF_OPS_CUDA_ARCHS names 42, which", marks=needs_nvcc),
        ("pass", {"MAX_JOBS": "many"}, "MAX_JOBS=many should be a positive number"),
    ],
)
def test_what_is_missing_is_said_in_one_line(source_tree, before, environment, words):
    done = run_setup(before, "-q", "build_kernels", cwd=source_tree, **environment)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("fif_ops: ")
    assert words in line


def test_jobs_are_limited_by_memory(monkeypatch):
    job_count = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["job_count"]
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    for gib, jobs in [(0.5, 1), (3, 3), (1000, 64)]:
        monkeypatch.setattr(Path, "read_text", lambda path, gib=gib: f"MemAvailable: {int(gib * 2**20)} kB\n")
        assert job_count() == jobs
    monkeypatch.setenv("MAX_JOBS", "7")
    assert job_count() == 7
