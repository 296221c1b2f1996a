"""Every instruction set that this processor has, and the kernels under sanitizers, each in a process of its own."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fif_ops import backends, ops

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ISAS = ops.library_info()["cpu_isas"]
# Under sanitizers plain C++ does what the tile registers do, on processors without them too.
SANITIZED_ISAS = [isa for isa, needs in {"baseline": "baseline", "amx": "avx512bf16"}.items() if needs in ISAS]
needs_kernels = pytest.mark.skipif(not ISAS, reason="the package was installed without its kernels")

# A compact part of test_accuracy.py: all layouts, formats, kernel sizes and activations, forward and backward.
COMPACT = "random or every or nan_and or halo or large_maps or frozen or slopes or kinked"
# These are the same code, but for products: beside one of them the others are tested for that.
WIDE = {"avx512", "avx512bf16", "amx"}
PRODUCTS = "16_bit or every_format_and_layout or every_number or parts"
# As much as the sanitizers' slowness allows.
SANITIZED = "every_format_and_layout or every_depth"


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run_tests(isa, selection, *more, file="test_accuracy.py", **environment):
    """Run tests of the file in a process that must be using the instruction set."""
    code = (
        "import sys, pytest; from fif_ops import backends, ops; "
        f"assert ops.CPU_ISA == {isa!r}, ops.CPU_ISA; assert ('cpu', True, '') in backends.describe(); "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", selection, *more]
    return python("-c", code, file, *options, FIF_OPS_CPU_ISA=isa, **environment)


def report(done):
    """The beginning of a sanitizer's report, if there is one, and the end of all that was printed."""
    text = done.stdout + done.stderr
    starts = [text.find(words) for words in ("ERROR: AddressSanitizer", "runtime error:") if words in text]
    return (text[min(starts) :][:3000] if starts else "") + text[-4000:]


@needs_kernels
def test_the_best_is_the_default():
    assert ISAS[0] == "baseline"
    code = "from fif_ops import ops; print(ops.CPU_ISA)"
    assert python("-c", code, FIF_OPS_CPU_ISA="").stdout.strip() == ISAS[-1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have the baseline alone")
@needs_kernels
def test_the_list_is_what_the_processor_reports():
    flags = set(
        next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    )
    needs = {
        "avx2": {"avx2", "fma", "bmi2"},
        "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"},
        "avx512bf16": {"avx512f", "avx512_bf16"},
        "amx": {"avx512f", "avx512_bf16", "amx_tile", "amx_bf16"},
    }
    assert ["baseline", *(isa for isa, wanted in needs.items() if wanted <= flags)] == ISAS


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != ops.CPU_ISA])
def test_every_other_instruction_set(isa):
    """That of this process has the whole of test_accuracy.py."""
    done = run_tests(isa, PRODUCTS if {isa, ops.CPU_ISA} <= WIDE else COMPACT)
    assert done.returncode == 0, report(done)


UNKNOWN = """
import torch, fif_ops
from fif_ops import backends, ops
(available, reason), = [rest for name, *rest in backends.describe() if name == "cpu"]
assert not available
unit = fif_ops.FusedFiF(3, 8)
x = torch.randn(2, 3, 5, 5, requires_grad=True)
unit(x).sum().backward()
assert x.grad is not None
assert fif_ops.explain(unit, x).backend == "reference"
try:
    fif_ops.feature_augment(x, torch.randn(4, 3, 1, 1), torch.randn(4, 1, 3, 3), backend="cpu")
except ValueError as error:
    assert reason in str(error)
else:
    raise AssertionError("took a backend that is not there")
try:
    torch.ops.fif_ops.infer(x.detach(), torch.randn(4, 3, 1, 1), torch.randn(4, 1, 3, 3), None, None, *[None] * 8, 0.0, 0.0, 8, 0, True)
except RuntimeError as error:
    assert reason in str(error)
else:
    raise AssertionError("ran on an instruction set that is not there")
print(reason)
"""


@needs_kernels
@pytest.mark.parametrize("name", ["sse2", "AVX2", "avx512 ", "x" * 5000])
def test_an_unknown_instruction_set_leaves_the_reference(name):
    done = python("-c", UNKNOWN, FIF_OPS_CPU_ISA=name)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"FIF_OPS_CPU_ISA is '{name}': must be one of {', '.join(ISAS)} on this processor" in done.stdout


@needs_kernels
def test_what_is_in_use_is_told():
    assert ops.CPU_ISA in ISAS
    assert ("cpu", True, "") in backends.describe()
    done = python("-m", "fif_ops", "info", FIF_OPS_CPU_ISA="baseline")
    assert done.returncode == 0
    assert "baseline" in done.stdout


# x ends where memory that may be read ends: sanitizers do not see what masked loads and tile registers read.
AT_THE_END = """
import ctypes, mmap, torch
from fif_ops import FusedFiF, freeze

def at_the_end(shape, dtype, last):
    count = torch.Size(shape).numel()
    size, page = count * dtype.itemsize, mmap.PAGESIZE
    readable = -(size // -page) * page
    area = mmap.mmap(-1, readable + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + readable), page, 0) == 0
    flat = torch.frombuffer(area, dtype=dtype, count=count, offset=readable - size)
    b, c, h, w = shape
    return (flat.view(b, h, w, c).permute(0, 3, 1, 2) if last else flat.view(shape)).normal_()

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for *shape, maps in (
        (1, 32, 345, 3, 16), (2, 9, 345, 3, 16), (3, 33, 7, 7, 20), (1, 5, 1, 1, 3), (1, 70, 14, 13, 40),
        (2, 33, 7, 7, 50), (1, 45, 3, 5, 64), (1, 70, 9, 17, 97),
    ):
        for last in (False, True):
            x = at_the_end(shape, dtype, last)
            for kernel in (1, 3):
                unit = FusedFiF(shape[1], 2 * maps, kernel_size=kernel).to(dtype)
                with torch.no_grad():
                    y = freeze(unit.eval())(x)
                    assert torch.equal(y, freeze(unit)(x.clone())) and y.isfinite().all()
                if x.numel() > shape[1]:
                    unit.train()(x.requires_grad_()).sum().backward()
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is Linux's here")
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_read_behind_x(isa):
    done = python("-c", AT_THE_END, FIF_OPS_CPU_ISA=isa, OMP_NUM_THREADS="1")
    assert done.returncode == 0, (done.returncode, report(done))


# ---- sanitizers

LIBRARY = ROOT / "build/sanitize/_C.so"


@pytest.fixture(scope="session")
def sanitizers():
    """What the environment needs for the instrumented library, which is built if it is missing or out of date."""
    if shutil.which("g++") is None or not (ROOT / "setup.py").is_file():
        pytest.skip("no g++, or no sources, to build the instrumented library with")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_sanitized"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "FIF_OPS_LIBRARY": str(LIBRARY),
        # The sanitizer looks for the C++ library's exceptions when the process starts, before torch brings it along.
        "LD_PRELOAD": f"{runtime} libstdc++.so.6",
        # Fresh memory is filled with NaN; the interpreter's own leaks are not ours.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("isa", SANITIZED_ISAS)
def test_sanitized_kernels(sanitizers, isa):
    done = run_tests(isa, SANITIZED, "-s", **sanitizers)
    assert done.returncode == 0, report(done)
    assert "runtime error:" not in done.stdout + done.stderr, report(done)
