"""Whether a module is still what it was: the same submodules, parameters, buffers, settings and hooks.

What an earlier call found out about a module (which kernel runs it, on which arguments) stays valid while this holds.
Identity tests tell it, 20 nanoseconds each and no Python code between them. Values are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a call depends on beside submodules, parameters and buffers, by the attribute that tells the kind of module.
_SETTINGS = {
    "splice": ("out_channels", "activation", "splice", "shared", "stride", "padding", "groups"),
    "padding_mode": ("stride", "padding", "dilation", "groups", "padding_mode"),
    "eps": ("eps", "momentum", "track_running_stats"),
    "approximate": ("approximate",),
    "output_size": ("output_size",),
}
_END = object()


class Unchanged:
    """``holds()`` says whether the module is what it was when this object was made.

    Hooks of ``module`` itself do not count: torch calls those around its forward.
    """

    __slots__ = ("hooks", "now", "settings", "then")

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.hooks = tuple(part.__dict__[name] for part in modules[1:] for name in _HOOKS)
        self.settings: list[tuple[dict[str, Any], Callable[[dict[str, Any]], Any], Any]] = []
        self.now: list[Iterable[Any]] = []  # views, behind them a mark that moves if one of them grows or shrinks
        for part in modules:
            state = part.__dict__
            names = {"training"} | {name for kind, names in _SETTINGS.items() if kind in state for name in names}
            settings = itemgetter(*(name for name in sorted(names) if name in state))
            self.settings.append((state, settings, settings(state)))
            self.now += [held.values() for held in (part._modules, part._parameters, part._buffers) if held]
        self.now.append((_END,))
        self.then = list(chain.from_iterable(self.now))

    def holds(self) -> bool:
        """Whether nothing changed; values of parameters and buffers may have."""
        if any(self.hooks):
            return False
        try:
            for state, settings, values in self.settings:
                if "forward" in state or settings(state) != values:
                    return False
        except KeyError:  # an attribute was deleted
            return False
        return all(map(is_, chain.from_iterable(self.now), self.then))

    def numbers(self) -> list[Tensor]:
        """Parameters and buffers, but for counters, on which no result depends."""
        return [value for value in self.then if isinstance(value, Tensor) and value.is_floating_point()]
