"""What the tests on a GPU share: which device and backends they run on, and the comparison with the definition.

FIF_OPS_TEST_DEVICE=cpu lets those that need no GPU run on the processor's kernels, to try the tests themselves.
The comparison is that of the benchmarks: float64 by the plain unit, with limits for every format.

A plugin of the modules that import it, which pytest would warn about: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of the installed package

from benchmarks.checks import Truth, differentiable, running_statistics  # noqa: E402
from benchmarks.peers import KERNELS  # noqa: E402
from benchmarks.precision import FP32, PRECISIONS, Precision  # noqa: E402
from benchmarks.shapes import Task, randomise_norms  # noqa: E402
from fif_ops import FeatureAugment, FusedFiF, backends, explain  # noqa: E402
from fif_ops.reference import memory_format_of  # noqa: E402

DEVICE = torch.device(os.environ.get("FIF_OPS_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
CONTEXT_LOST = 77  # exit status of pytest: no later test in this process can run
BACKENDS = [name for name in KERNELS[DEVICE.type] if name in backends.BACKENDS]

needs_device = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU")
gpu_only = pytest.mark.skipif(not ON_GPU, reason="only a GPU has this")
both_layouts = pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
both_modes = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=list(PRECISIONS))


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of the device in turn; units run on it, or raise."""
    reason = backends.BACKENDS[request.param].unavailable()
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with backends.use(request.param):
        yield request.param


@pytest.fixture
def whole_context() -> Iterator[None]:
    """Blames errors of the device on the test that made them, and ends the run where they leave it unusable."""
    torch.manual_seed(0)
    yield
    if ON_GPU and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the context of {DEVICE} is lost: {error}", returncode=CONTEXT_LOST)


def make_unit(in_channels: int, out_channels: int, **options: Any) -> FeatureAugment:
    """A unit with random normalisations, float32, on the processor."""
    unit = FeatureAugment(in_channels, out_channels, **options)
    randomise_norms(unit)
    return unit


def place(values: Tensor, last: bool) -> Tensor:
    """The values on the device, in this layout."""
    return values.to(DEVICE, memory_format=torch.channels_last if last else torch.contiguous_format)


def fused_on(unit: FeatureAugment, x: Tensor, last: bool = False) -> FusedFiF:
    """The unit fused, its weights in the layout. The first backend of a GPU must run it; others may refuse: a skip."""
    layout: Any = torch.channels_last if last else torch.contiguous_format
    fused = FusedFiF.from_reference(unit).to(memory_format=layout)
    why = explain(fused, x)
    if why.backend == "none" and (not ON_GPU or backends.wanted(None) != BACKENDS[0]):
        pytest.skip(str(why).replace("\n", "; "))
    assert x.numel() == 0 or why.backend in KERNELS[DEVICE.type], str(why)
    return fused


def run(
    unit: nn.Module, x: Tensor, upstream: Tensor | None = None, around: Callable[[], Any] | None = None
) -> tuple[Tensor, ...]:
    """One call: the result, and with ``upstream`` gradients and running statistics as ``Truth`` wants them.

    ``around`` makes the context manager of the forward pass.
    """
    leaf = x.detach().requires_grad_(upstream is not None)
    with torch.set_grad_enabled(upstream is not None):
        if around is None:
            out = unit(leaf)
        else:
            with around():
                out = unit(leaf)
    if upstream is None:
        return (out,)
    gradients = torch.autograd.grad(out, differentiable(unit, leaf), upstream)
    return out.detach(), *gradients, *running_statistics(unit)


def check(
    unit: FeatureAugment,
    x: Tensor,
    upstream: Tensor | None = None,
    precision: Precision = FP32,
    last: bool = False,
    autocast: bool = False,
    truth_on: torch.device = DEVICE,
) -> None:
    """FusedFiF does what the unit does, in evaluation, or in training where ``upstream`` is given.

    ``x`` and ``upstream`` keep their strides. All is of the precision's dtype; with ``autocast``, parameters are float32.
    ``truth_on`` is where the definition runs.
    """
    unit = copy.deepcopy(unit).to(DEVICE, torch.float32 if autocast else precision.dtype).train(upstream is not None)
    x = x.detach().requires_grad_(upstream is not None)
    fused = fused_on(unit, x, last)
    around = (lambda: torch.autocast(DEVICE.type, precision.dtype)) if autocast else None
    with precision.switched(DEVICE):
        values = run(fused, x, upstream, around)
    if upstream is not None or not autocast:
        assert values[0].dtype == precision.dtype
    assert values[0].is_contiguous(memory_format=memory_format_of(x))
    leaf = x.detach().to(truth_on).requires_grad_(upstream is not None)
    there = None if upstream is None else upstream.to(truth_on)
    task = Task("the unit", unit.to(truth_on), leaf, there, precision)
    Truth(task).check("FusedFiF", last, [value.to(truth_on) for value in values])
