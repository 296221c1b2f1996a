"""A unit's call in evaluation, kept: all but x was checked at an earlier one, and must only be found unchanged.

On small maps the time of a call is the time of its checks. What they led to (the operator and its arguments) stays
valid while the module holds the same submodules, parameters, buffers and settings, which identity tests tell in two
microseconds. Values are not copied: the operator reads the parameters afresh at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import backends
from .autograd import Convolutions
from .functional import Call
from .unchanged import Unchanged


def can_prepare(call: Call, given: Convolutions) -> bool:
    """Whether a call depends on nothing that a ``PreparedCall`` does not see; ``given``: what the unit itself holds."""
    options = call.options
    if options is None or call.wants_grad or any(options.batch) or backends.wanted(None) is not None:
        return False
    if call.convolutions[0].is_cuda and call.convolutions[0].dtype == torch.float32:
        return False  # tf32 follows a switch of torch
    return all(used is held for used, held in zip(call.convolutions, given, strict=True))


class PreparedCall:
    """The operator call that a unit's forward came to, without x."""

    __slots__ = ("arguments", "choices", "device", "dtype", "operator", "options", "unchanged")

    def __init__(self, unit: nn.Module, call: Call) -> None:
        x, *convolutions = call.convolutions
        options = call.options
        assert options is not None  # can_prepare
        self.operator = options.operator("infer").default
        self.arguments = (*convolutions, *call.norms, *options.eps, options.out_channels, options.activation_code,
                          options.splice)  # fmt: skip
        # Left out where they are the defaults: every argument costs time.
        plain = (options.stride, options.groups) == (1, 1)
        self.options = {} if plain else {"stride": options.stride, "groups": options.groups}
        self.dtype, self.device = x.dtype, x.device
        self.choices = backends.tuned.choices(x.device)
        self.unchanged = Unchanged(unit)

    def fits(self, x: Tensor) -> bool:
        """Whether the unit's forward would come to this call again."""
        if torch.is_grad_enabled() or x.dtype is not self.dtype or x.device != self.device:
            return False
        if torch.is_autocast_enabled(x.device.type) or not self.unchanged.holds():
            return False
        return backends.tuned.choices(x.device) is self.choices and backends.wanted(None) is None

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(x, *self.arguments, **self.options)
