"""The Triton kernels without a GPU: results, by their interpreter, and what the compiler makes of them.

The interpreted tests are those of triton_interpreted.py and triton_repaired.py, in a process of their own;
triton_sweep.py compiles more.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)", exc_type=ImportError)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton_offline import NO_SPILLS, check_compiled, compiled, launches_of, specialised  # noqa: E402

from fif_ops.backends.triton import config  # noqa: E402

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_cache_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FIF_OPS_CACHE", str(tmp_path / "cache.json"))
    config.reset()
    yield
    config.reset()


@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="the interpreter of Triton 3.6 fails with numpy 2.4")
def test_interpreted_kernels():
    """Every test of both files; the last lines are the message if one fails."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [HERE / "triton_repaired.py", HERE / "triton_interpreted.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ---- compiled for GPUs that are not here


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_in_channels_last(capability, monkeypatch):
    for launch in launches_of(monkeypatch, torch.bfloat16, True):
        check_compiled(launch, capability, torch.bfloat16)


def test_compiled_in_nchw(monkeypatch):
    for launch in launches_of(monkeypatch, torch.float16, False, size=32):
        check_compiled(launch, 90, torch.float16)


def test_compiled_for_float32(monkeypatch):
    for launch in launches_of(monkeypatch, torch.float32, True):
        check_compiled(launch, 80, torch.float32)


@pytest.mark.parametrize(
    ("last", "operator", "options"),
    [
        (False, "infer", {"channels": 160, "maps": 480, "size": 7}),  # loads of single elements
        (True, "train", {"channels": 112, "maps": 336, "size": 14}),  # the largest tiles
    ],
    ids=["odd maps", "wide"],
)
def test_products_that_need_the_most_registers(last, operator, options, monkeypatch):
    made = launches_of(monkeypatch, torch.float16, last, (operator,), **options)
    products = [launch for launch in made if launch.name in ("fused_kernel", "product_kernel")]
    assert products
    for launch in products:
        found = compiled(launch, 100)
        assert found.spilled == 0 or not NO_SPILLS, f"{launch.name}: {found}"


# ---- launches


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "nchw"])
def test_launch_counts_and_grids(last, monkeypatch):
    """At most 1 or 2, 3 and 4; one grid dimension below 2^31, whatever the batch; partial sums bounded."""
    for images, most_floats in ((1, 1 << 20), (65_536, 1 << 22), (1 << 20, 1 << 22)):
        for options in ({}, {"channels": 960, "maps": 80, "size": 7}, {"channels": 72, "maps": 70_000, "size": 1}):
            if options.get("maps") == 70_000 and images > 1:
                continue
            for operator, most in (("infer", 2), ("train", 3), ("backward", 4)):
                made = launches_of(monkeypatch, torch.float16, last, (operator,), images=images, **options)
                assert 0 < len(made) <= most
                for launch in made:
                    assert 0 < launch.programs < 1 << 31
                    partials = launch.arguments.get("partials")
                    assert partials is None or partials.numel() <= most_floats


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "nchw"])
def test_addresses_have_64_bits(last, monkeypatch):
    """Strides come in units, which may fit 32 bits where their product with the vector length does not: the kernels
    widen them before anything else.
    """
    for launch in launches_of(monkeypatch, torch.float16, last, stride=2):
        strides = [name for name in launch.arguments if re.fullmatch(r"\w+_(batch|step)", name)]
        code = triton.compile(specialised(launch), target=GPUTarget("cuda", 80, 32)).asm["ttir"]
        for name in strides:
            uses = [line for line in code.splitlines() if re.search(rf"^ *%\S+ = .*%{name}\b", line)]
            assert all(f"arith.extsi %{name} : i32 to i64" in line for line in uses), (launch.name, uses)
