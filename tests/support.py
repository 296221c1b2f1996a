"""Random units and inputs, and the comparison of a fused unit with the definition in float64.

The yardstick is FeatureAugment in float64 with the very parameters of the unit (those of a bfloat16 unit are rounded
first). A result may be off by the dtype's tolerance, or by twice what the plain composition in the same dtype is off by
itself, where the problem is ill-conditioned (batch statistics of few values, relu where its argument is mere rounding).
"""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from fif_ops import FeatureAugment, FusedFiF, explain
from fif_ops.reference import memory_format_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Relative L2 errors: inference; training and gradients.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (1e-2, 1e-2),
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_child(function: Callable[[], Any], seconds: float = 120) -> Any:
    """The function's result, worked out in a forked process, so that a crash is a failure and not the end of all tests."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function()), daemon=True)
    child.start()
    sender.close()
    answered = receiver.poll(seconds)
    try:
        result = receiver.recv() if answered else None
    except EOFError:
        answered, result = False, None
    child.join(1 if answered else 0)
    if child.is_alive():
        child.kill()
        child.join()
    assert answered and child.exitcode == 0, f"the child process ended with {child.exitcode}"
    return result


# ---- where the values of a map lie


def embed(values: Tensor, *parts: slice, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The values as a view of a larger tensor full of NaN, cut out by slices of the last dimensions."""
    index = (slice(None),) * (4 - len(parts)) + parts
    outer = [
        next(n for n in range(size, 2 * size + 8) if len(range(n)[part]) == size)
        for size, part in zip(values.shape, index, strict=True)
    ]
    around = torch.full(outer, float("nan"), dtype=values.dtype).contiguous(memory_format=layout)
    around[index].copy_(values)
    return around[index]


_LAST, _ALL = torch.channels_last, slice(None)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=_LAST),
    "every other image": lambda t: embed(t, slice(None, None, 2), _ALL, _ALL, _ALL),
    "every other channel": lambda t: embed(t, slice(1, None, 2), _ALL, _ALL),
    "inner rows": lambda t: embed(t, slice(1, -2), _ALL),
    "inner columns": lambda t: embed(t, slice(2, -1)),
    "every other column": lambda t: embed(t, slice(None, None, 2)),
    "last: every other image": lambda t: embed(t, slice(None, None, 2), _ALL, _ALL, _ALL, layout=_LAST),
    "last: every other channel": lambda t: embed(t, slice(1, None, 2), _ALL, _ALL, layout=_LAST),
    "last: inner channels": lambda t: embed(t, slice(1, -2), _ALL, _ALL, layout=_LAST),
    "last: inner rows": lambda t: embed(t, slice(3, -1), _ALL, layout=_LAST),
    "last: inner columns": lambda t: embed(t, slice(1, -1), layout=_LAST),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}
# Dimensions that have stride 0.
EXPANSIONS: dict[str, tuple[int, ...]] = {
    "one image": (0,),
    "one channel": (1,),
    "one row": (2,),
    "one column": (3,),
    "one pixel": (2, 3),
    "one number": (0, 1, 2, 3),
}
PLACEMENTS = [*LAYOUTS, *EXPANSIONS]


def place(values: Tensor, placement: str) -> Tensor:
    """The values with other strides; an expansion repeats the first ones along its dimensions."""
    if placement in LAYOUTS:
        return LAYOUTS[placement](values)
    dims = EXPANSIONS[placement]
    base = values[tuple(slice(0, 1) if dim in dims else _ALL for dim in range(4))].contiguous()
    return base.expand(values.shape)


# ---- random problems


@dataclass(frozen=True)
class Problem:
    """A unit and its input, all random numbers included."""

    in_channels: int
    out_channels: int
    ratio: int
    cheap_kernel_size: int
    splice: bool
    activation: str | None
    norm: str | None
    bias: bool
    batch: int
    height: int
    width: int
    placement: str = "contiguous"
    grad_placement: str = "contiguous"
    frozen: tuple[bool, bool] = (False, False)
    seed: int = 0

    def unit(self) -> FeatureAugment:
        torch.manual_seed(self.seed)
        unit = FeatureAugment(
            self.in_channels,
            self.out_channels,
            ratio=self.ratio,
            cheap_kernel_size=self.cheap_kernel_size,
            splice=self.splice,
            activation=self.activation,
            norm=self.norm,
            bias=self.bias,
        )
        return randomise(unit)

    def training_unit(self) -> FeatureAugment:
        unit = self.unit()
        for stage, frozen in zip((unit.primary_conv, unit.cheap_operation), self.frozen, strict=True):
            stage[1].train(not frozen)
        return unit

    def input(self, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(self.seed + 1)
        return place(torch.randn(self.batch, self.in_channels, self.height, self.width).to(dtype), self.placement)

    def gradient(self, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(self.seed + 2)
        return place(torch.randn(self.batch, self.out_channels, self.height, self.width).to(dtype), self.grad_placement)


SMOOTH = (None, "silu", "gelu")
KINKED = ("relu", "relu6", "hardswish")


@st.composite
def problems(
    draw: st.DrawFn, training: bool, activations: tuple[str | None, ...] = SMOOTH + KINKED, fewest: int = 1
) -> Problem:
    """Small on average, up to 130 channels and 40 x 40 pixels, and at most some 100,000 numbers in all maps together.

    For training, only problems with something left beside rounding. Gradients vanish where batch statistics are of few
    values, under a constant gradient, and where they take a single factor away again: that of a 1 x 1 cheap kernel, or
    the primary weights' over one input channel. ``fewest``: channels out, at least.
    """
    splice = draw(st.booleans())
    channels = st.one_of(st.integers(1, 12), st.integers(1, 130))
    sizes = st.one_of(st.integers(1, 9), st.integers(1, 40))
    in_channels, out_channels = draw(channels), max(fewest, draw(channels))
    height, width = draw(sizes), draw(sizes)
    affordable = max(1, 100_000 // ((in_channels + 2 * out_channels) * height * width))
    batch = min(draw(st.integers(0, 5)), affordable)
    placement = draw(st.sampled_from(PLACEMENTS))
    repeated = EXPANSIONS.get(placement, ())
    values = math.prod(size for dim, size in ((0, batch), (2, height), (3, width)) if dim not in repeated)
    if training:
        assume(batch == 0 or values >= 8)
    kernel = draw(st.sampled_from([1, 3, 5, 7]))
    return Problem(
        in_channels=in_channels,
        out_channels=out_channels,
        ratio=draw(st.integers(2 if splice else 1, 5)),
        cheap_kernel_size=kernel,
        splice=splice,
        activation=draw(st.sampled_from(activations)),
        norm=draw(st.sampled_from(["batch", None])),
        bias=draw(st.booleans()),
        batch=batch,
        height=height,
        width=width,
        placement=placement,
        grad_placement=draw(st.sampled_from([name for name in PLACEMENTS if name not in ("one pixel", "one number")])),
        frozen=(in_channels == 1 or 1 in repeated or draw(st.booleans()), kernel == 1 or draw(st.booleans())),
        seed=draw(st.integers(0, 1000)),
    )


def randomise(unit: nn.Module) -> nn.Module:
    """Random parameters and statistics; convolutions keep the size of numbers, so that float16 does not overflow."""
    for name, tensor in (*unit.named_parameters(), *unit.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if "running_var" in name:
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.dim() == 4:
            tensor.data.normal_(0, tensor[0].numel() ** -0.5)
        else:
            tensor.data.normal_()
    return unit


# ---- comparison


def kernels_run(fused: FusedFiF, x: Tensor) -> bool:
    return explain(fused, x).backend == "cpu"


def batch_statistics(unit: FeatureAugment, stage: str) -> bool:
    norm = unit.get_submodule(stage)[1]
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


def results(unit: FeatureAugment, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output, running statistics afterwards and, for an output gradient, the gradients of x and of all parameters."""
    unit.zero_grad()
    with torch.set_grad_enabled(grad is not None):
        leaf = x.detach().requires_grad_(grad is not None)
        out = unit(leaf)
    found = {"output": out.detach()}
    if grad is not None:
        out.backward(grad)
        assert leaf.grad is not None
        found["gradient of x"] = leaf.grad
        for name, parameter in unit.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
    found.update((name, buffer.detach().clone()) for name, buffer in unit.named_buffers())
    return found


def floor(wanted: dict[str, Tensor]) -> float:
    """A hundredth of all gradients together: one below it nearly vanishes, and is measured against this too."""
    gradients = [tensor.double().norm() for name, tensor in wanted.items() if name.startswith("gradient")]
    return 1e-2 * torch.stack(gradients).norm().item() if gradients else 0.0


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of every result."""
    least = floor(wanted)
    result = {}
    for name, tensor in wanted.items():
        error = (found[name].double() - tensor.double()).norm().item()
        size = tensor.double().norm().item() + (least if name.startswith("gradient") else 0.0)
        result[name] = error if error == 0.0 else error / max(size, 1e-300)
    return result


def composition_errors(
    unit: FeatureAugment, x: Tensor, grad: Tensor | None, wanted: dict[str, Tensor]
) -> dict[str, float]:
    """Errors of the plain unit in its own dtype.

    Of each result the worst over both memory formats and some orders of the input's channels, which all round in their
    own ways; and no less than the worst of the results that do not nearly vanish.
    """
    dense = None if grad is None else grad.contiguous()
    runs = []
    for order in (torch.arange(x.shape[1]), *(torch.randperm(x.shape[1]) for _ in range(4))):
        back = torch.argsort(order)
        for layout in ("contiguous", "channels_last"):
            twin = copy.deepcopy(unit)
            twin.primary_conv[0].weight.data = unit.primary_conv[0].weight.data[:, order]
            found = results(twin, LAYOUTS[layout](x[:, order]), dense)
            for name in ("gradient of x", "gradient of primary_conv.0.weight"):
                if name in found:
                    found[name] = found[name][:, back]
            runs.append(errors(found, wanted))
    least = floor(wanted)
    worse = {name: max(error[name] for error in runs) for name in wanted}
    worst = max(worse[name] for name, tensor in wanted.items() if tensor.double().norm().item() >= least)
    return {name: max(error, worst) for name, error in worse.items()}


def definition(unit: FeatureAugment, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """The results in float64, with exact zeros for biases in front of batch statistics, where it leaves rounding."""
    exact = results(copy.deepcopy(unit).double(), x.double(), None if grad is None else grad.double())
    for stage in ("primary_conv", "cheap_operation"):
        if f"gradient of {stage}.0.bias" in exact and batch_statistics(unit, stage):
            exact[f"gradient of {stage}.0.bias"].zero_()
    return exact


def fused_results(unit: FeatureAugment, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """What the kernels make of the unit, which is not changed."""
    fused = FusedFiF.from_reference(unit)
    assert kernels_run(fused, x) or x.numel() == 0
    return results(fused, x, grad)


def check(unit: FeatureAugment, x: Tensor, grad: Tensor | None = None) -> None:
    """FusedFiF does what the unit does, whose parameters have the dtype to test: see the top of this file."""
    wanted = definition(unit, x, grad)
    found = fused_results(unit, x, grad)
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}
    assert found["output"].dtype == x.dtype
    assert found["output"].is_contiguous(memory_format=memory_format_of(x))
    tolerance = TOLERANCES[x.dtype][grad is not None]
    bad = {name: error for name, error in errors(found, wanted).items() if not error <= tolerance}
    if bad:
        plain = composition_errors(unit, x, grad, wanted)
        for name, error in bad.items():
            assert error <= 2 * plain[name], f"{name} is off by {error}, the composition by {plain[name]}"


def check_problem(problem: Problem, dtype: torch.dtype, training: bool) -> None:
    if training:
        check(problem.training_unit().to(dtype), problem.input(dtype), problem.gradient(dtype))
    else:
        check(problem.unit().eval().to(dtype), problem.input(dtype))
