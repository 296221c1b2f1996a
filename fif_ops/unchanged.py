"""Whether a module is still what it was: the same submodules, parameters, buffers, settings and hooks.

What an earlier call found out about a module (which kernel runs it, on which arguments) stays valid while this holds.
Identity tests of dictionary entries tell it, 20 nanoseconds each. Values are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a call depends on beside submodules, parameters and buffers, by the attribute that tells the kind of module.
_SETTINGS = {
    "splice": ("out_channels", "activation", "splice", "shared", "stride", "padding", "groups"),
    "padding_mode": ("stride", "padding", "dilation", "groups", "padding_mode"),
    "eps": ("eps",),
    "approximate": ("approximate",),
    "output_size": ("output_size",),
}


class Unchanged:
    """``holds()`` says whether the module is what it was when this object was made.

    Hooks of ``module`` itself do not count: torch calls those around its forward.
    """

    __slots__ = ("entries", "hooks", "sizes")

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.hooks = tuple(part.__dict__[name] for part in modules[1:] for name in _HOOKS)
        self.sizes = [(part._modules, len(part._modules)) for part in modules if part._modules]
        # Every dictionary entry that the call depends on, absent ones as None.
        self.entries: list[tuple[Mapping[str, Any], str, Any]] = []
        for part in modules:
            state = part.__dict__
            settings = {"training"} | {name for kind, names in _SETTINGS.items() if kind in state for name in names}
            self.entries += [(state, name, state[name]) for name in sorted(settings) if name in state]
            self.entries += [(state, "forward", None)]
            for held in (state["_modules"], state["_parameters"], state["_buffers"]):
                self.entries += [(held, name, value) for name, value in held.items()]

    def holds(self) -> bool:
        """Whether nothing changed; values of parameters and buffers may have."""
        if any(self.hooks):
            return False
        for held, name, value in self.entries:
            if held.get(name) is not value:
                return False
        return all(len(held) == size for held, size in self.sizes)

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [value for _, _, value in self.entries if isinstance(value, Tensor)]
