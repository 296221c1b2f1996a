"""Is a peer's result right? Compared with the reference in float64, before any time is taken."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fif_ops import FeatureAugment

from .shapes import Task


class WrongResult(AssertionError):
    """A peer's result differs from the float64 reference: it must not be timed."""


def differentiable(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors whose gradients training computes: x if it requires one, then all parameters."""
    return [x] * x.requires_grad + list(module.parameters())


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers that a training step updates, the counters of batches left out."""
    return [buffer for buffer in module.buffers() if buffer.dtype.is_floating_point]


def names(task: Task) -> list[str]:
    """What the values are that a peer's callable returns, in this order."""
    if not task.training:
        return ["result"]
    inputs = ["x"] * task.x.requires_grad + [name for name, _ in task.module.named_parameters()]
    statistics = [name for name, buffer in task.module.named_buffers() if buffer.dtype.is_floating_point]
    return ["result", *(f"gradient of {name}" for name in inputs), *statistics]


def _dtypes(task: Task) -> list[torch.dtype]:
    if not task.training:
        return [task.precision.dtype]
    others = (*differentiable(task.module, task.x), *running_statistics(task.module))
    return [task.precision.dtype, *(tensor.dtype for tensor in others)]


def as_tensors(task: Task, returned: Any) -> dict[str, Tensor]:
    """A peer's values by name. Raises WrongResult unless they are as many as ``names`` has."""
    values = [torch.as_tensor(v) for v in (returned if isinstance(returned, (tuple, list)) else [returned])]
    wanted = names(task)
    if len(values) != len(wanted):
        raise WrongResult(f"{task.name}: {len(values)} values, must be {len(wanted)}: {', '.join(wanted)}")
    # Copies: running statistics go on changing, and a peer may hand out the same memory every time.
    return {name: value.detach().clone() for name, value in zip(wanted, values, strict=True)}


class Truth:
    """The right values of a task, and how far a peer may be from them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        # In a deep network single gradients all but vanish; there, all gradients count as one long vector.
        self.pooled = not isinstance(task.module, FeatureAugment)
        self.values = self._group(_run(task, torch.float64))
        self._dtypes = dict(zip(names(task), _dtypes(task), strict=True))
        self._limits: dict[bool, dict[str, float]] = {}

    def limits(self, channels_last: bool) -> dict[str, float]:
        """Largest relative error allowed of each value, for peers of this layout."""
        if channels_last not in self._limits:
            self._limits[channels_last] = self._find_limits(channels_last)
        return self._limits[channels_last]

    def _find_limits(self, channels_last: bool) -> dict[str, float]:
        precision = self.task.precision
        own = self._errors(_run(self.task, channels_last=channels_last))
        errors = [own]
        if self.task.training and precision.kink:
            kink = max(precision.kink, 2 * own["result"])
            errors += [self._errors(_run(self.task, torch.float64, kink=side)) for side in (-kink, kink)]
        least = precision.training_limit if self.task.training else precision.inference_limit
        ceiling = precision.network_ceiling if self.pooled else precision.unit_ceiling
        return {name: max(least, min(2 * max(e[name] for e in errors), ceiling)) for name in self.values}

    def check(self, peer: str, channels_last: bool, returned: Any) -> float:
        """The largest relative error of the values that ``peer`` returned. Raises WrongResult if it is too large."""
        values = as_tensors(self.task, returned)
        for name, value in values.items():
            if value.dtype != self._dtypes[name]:
                raise WrongResult(f"{peer} on {self.task.name}: {name} is {value.dtype}, must be {self._dtypes[name]}")
        try:
            errors = self._errors(values)
        except ValueError as error:
            raise WrongResult(f"{peer} on {self.task.name}: {error}") from None
        # "not <=" is true for NaN as well
        limits = self.limits(channels_last)
        wrong = [name for name, error in errors.items() if not error <= limits[name]]
        if wrong:
            listed = "; ".join(f"{n}: relative error {errors[n]:.2g}, limit {limits[n]:.2g}" for n in wrong)
            raise WrongResult(f"{peer} on {self.task.name} is wrong and is not timed: {listed}")
        return max(errors.values())

    def _errors(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative L2 error of every value. Raises ValueError where shapes differ."""
        errors, grouped = {}, self._group(values)
        for name, right in self.values.items():
            value = grouped[name]
            if value.shape != right.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {tuple(right.shape)}")
            scale = torch.linalg.vector_norm(right).clamp(min=torch.finfo(torch.float32).tiny)
            errors[name] = (torch.linalg.vector_norm(value.double() - right) / scale).item()
        return errors

    def _group(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.pooled:
            return dict(values)
        gradients = [v for name, v in values.items() if name.startswith("gradient of ")]
        statistics = [v for name, v in values.items() if name.endswith(("running_mean", "running_var"))]
        groups = {"result": values["result"]}
        groups |= {"all gradients": _flat(gradients)} if gradients else {}
        return groups | ({"running statistics": _flat(statistics)} if statistics else {})


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


class _ReLU(torch.autograd.Function):
    """relu whose gradient switches on at ``kink`` and not at 0: what rounding can make of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kink: float) -> Tensor:
        ctx.save_for_backward(x > kink)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def _run(
    task: Task, dtype: torch.dtype | None = None, channels_last: bool = False, kink: float = 0.0
) -> dict[str, Tensor]:
    """The task's values by the plain module: all in ``dtype``, or as the task has them."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = copy.deepcopy(task.module).to(dtype=dtype, memory_format=layout)
    for part in module.modules():
        if isinstance(part, nn.ReLU) and kink:
            part.forward = lambda x: _ReLU.apply(x, kink)
    x = task.x.detach().to(dtype or task.x.dtype, memory_format=layout).requires_grad_(task.x.requires_grad)
    autocast = contextlib.nullcontext() if dtype else task.autocast()
    with task.precision.switched(x.device):
        if task.upstream is None:
            with torch.inference_mode(), autocast:
                return as_tensors(task, module(x))
        with autocast:
            result = module(x)
        upstream = task.upstream.to(result.dtype)
        gradients = torch.autograd.grad(result, differentiable(module, x), upstream)
    return as_tensors(task, (result, *gradients, *running_statistics(module)))
