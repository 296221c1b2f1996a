"""A unit's call in evaluation, kept: all but x was checked at an earlier one, and must only be found unchanged.

On small maps the time of a call is the time of its checks. What they led to (the operator and its arguments) stays
valid while the module holds the same submodules, parameters, buffers and settings, which identity tests tell in two
microseconds. Values are not copied: the operator reads the parameters afresh at every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .autograd import Convolutions
from .functional import Call

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a call depends on beside submodules, parameters and buffers, by the attribute that tells the kind of module.
_SETTINGS = {
    "out_channels": ("out_channels", "activation", "splice", "shared", "stride", "padding", "groups"),
    "padding_mode": ("stride", "padding", "dilation", "groups", "padding_mode"),
    "eps": ("training", "eps"),
    "approximate": ("approximate",),
}


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

    __slots__ = ("arguments", "choices", "device", "dtype", "held", "hooks", "operator", "options", "sizes")

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
        modules = list(unit.modules())
        self.hooks = tuple(module.__dict__[name] for module in modules[1:] for name in _HOOKS)
        self.sizes = [(module._modules, len(module._modules)) for module in modules if module._modules]
        # Every dictionary entry that the call depends on, absent ones as None.
        self.held: list[tuple[Mapping[str, Any], str, Any]] = []
        for module in modules:
            state = module.__dict__
            settings = {name for kind, names in _SETTINGS.items() if kind in state for name in names}
            self.held += [(state, name, state[name]) for name in sorted(settings) if name in state]
            self.held += [(state, "forward", None)]
            for entries in (state["_modules"], state["_parameters"], state["_buffers"]):
                self.held += [(entries, name, value) for name, value in entries.items()]

    def fits(self, x: Tensor) -> bool:
        """Whether the unit's forward would come to this call again."""
        if torch.is_grad_enabled() or any(self.hooks):
            return False
        if x.dtype is not self.dtype or x.device != self.device or torch.is_autocast_enabled(x.device.type):
            return False
        for entries, name, value in self.held:
            if entries.get(name) is not value:
                return False
        for entries, size in self.sizes:
            if len(entries) != size:
                return False
        return backends.tuned.choices(x.device) is self.choices and backends.wanted(None) is None

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(x, *self.arguments, **self.options)
