"""The CUDA kernels, run on the CPU thread by thread, against the definition in float64."""

import itertools

import cuda_module
import pytest
import torch

from fif_ops import Norm
from fif_ops.reference import compose

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        cuda_module.toolchain.cuda_include() is None, reason="CUDA's host headers (cuda_fp16.h) are not here"
    ),
    pytest.mark.usefixtures("one_thread"),
]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Batch, channels, primary maps, cheap maps of each, height, width, cheap kernel, activation: all widths of tiles, loads
# and channel blocks; maps that are no multiple of anything; S > 1; 5 x 5.
SHAPES = [
    (1, 16, 8, 1, 14, 14, 3, "relu"),
    (2, 33, 20, 1, 7, 7, 3, "silu"),
    (1, 40, 36, 2, 9, 30, 5, "relu6"),
    (1, 72, 70, 1, 15, 16, 3, "hardswish"),
    (2, 7, 5, 3, 1, 1, 3, "gelu"),
    (1, 64, 64, 1, 28, 28, 3, None),
    (1, 24, 12, 1, 5, 56, 3, "relu"),
]


@pytest.fixture(scope="module")
def simulator():
    return cuda_module.load()


def random_norm(channels, dtype=torch.float32):
    values = (
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.randn(channels) * 0.3,
        torch.rand(channels) + 0.5,
    )
    return Norm(*(v.to(dtype) for v in values), training=False, momentum=0.0, eps=1e-5)


def wide(norm):
    return norm._replace(**{f: getattr(norm, f).double() for f in Norm._fields[:4]})


def check(simulator, shape, dtype, last, splice, norm_dtype=torch.float32, x=None):
    batch, channels, maps, multiplier, height, width, kernel, activation = shape
    if x is None:
        x = torch.randn(batch, channels, height, width).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    primary = (torch.randn(maps, channels, 1, 1) / channels**0.5).to(dtype)
    cheap = (torch.randn(maps * multiplier, 1, kernel, kernel) / kernel).to(dtype)
    options = {
        "out_channels": (maps if splice else 0) + maps * multiplier - (multiplier > 1),
        "activation": activation,
        "splice": splice,
    }
    norms = random_norm(maps, norm_dtype), random_norm(maps * multiplier, norm_dtype)
    out, plan = cuda_module.infer(simulator, x, primary, cheap, primary_norm=norms[0], cheap_norm=norms[1], **options)
    expected = compose(
        x.double(), primary.double(), cheap.double(), primary_norm=wide(norms[0]), cheap_norm=wide(norms[1]), **options
    )
    assert (out.double() - expected).norm() <= LIMITS[dtype] * expected.norm()
    return plan


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_inference(simulator, shape, dtype):
    for last, splice in itertools.product([False, True], repeat=2):
        check(simulator, shape, dtype, last, splice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_in_the_format_of_the_maps(simulator, dtype):
    check(simulator, SHAPES[0], dtype, last=True, splice=True, norm_dtype=dtype)


@pytest.mark.parametrize("last", [False, True])
def test_inputs_that_start_anywhere(simulator, last):
    """Narrow loads where the address or a stride rules out wide ones; the memory around the input is NaN."""
    for offset in (1, 2, 4):
        layout = torch.channels_last if last else torch.contiguous_format
        memory = torch.full((2 * 16 * 8 * 8 + 16,), float("nan"), dtype=torch.float16)
        strides = (16 * 64, 1, 8 * 16, 16) if last else (16 * 64, 64, 8, 1)
        x = memory.as_strided((2, 16, 8, 8), strides, offset)
        x.copy_(torch.randn(2, 16, 8, 8))
        assert x.is_contiguous(memory_format=layout)
        plan = check(simulator, (2, 16, 8, 1, 8, 8, 3, "relu"), torch.float16, last, splice=True, x=x)
        assert plan["vector"] <= offset


def test_halo_is_zero_after_the_activation(simulator):
    """With x = 0 and a positive shift the primary maps are positive to the edge, and zero beyond it."""
    norm = Norm(torch.ones(16), torch.ones(16), torch.zeros(16), torch.ones(16), False, 0.0, 0.0)
    cheap = torch.ones(16, 1, 3, 3)
    out, _ = cuda_module.infer(
        simulator, torch.zeros(1, 16, 5, 6), torch.zeros(16, 16, 1, 1), cheap, primary_norm=norm,
        cheap_norm=norm._replace(bias=torch.zeros(16)), out_channels=32, activation="relu", splice=True,
    )  # fmt: skip
    rows, columns = torch.tensor([2.0, 3, 3, 3, 2]), torch.tensor([2.0, 3, 3, 3, 3, 2])
    assert torch.equal(out[0, 20], rows[:, None] * columns)
    assert torch.equal(out[0, 3], torch.ones(5, 6))
