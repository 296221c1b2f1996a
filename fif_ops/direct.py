"""Calls of modules without the detour of ``nn.Module.__call__``, which costs as much as a unit on small maps.

Attributes are looked up in ``__dict__``: any other look-up in a module takes four times as long, since nn.Module has a
``__getattr__`` of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch

# Of all modules; torch fills and empties these dictionaries, and never makes others.
_before, _after = _torch._global_forward_pre_hooks, _torch._global_forward_hooks
_backward_before, _backward_after = _torch._global_backward_pre_hooks, _torch._global_backward_hooks
_is_traced = torch._C._get_tracing_state


def direct_call(self: nn.Module, *args: Any, **named: Any) -> Any:
    """``nn.Module.__call__``, and at once ``forward`` where that would do nothing else: for a tensor, without hooks.

    Symbolic tracing passes no tensors, and puts another ``__call__`` into nn.Module.
    """
    held = self.__dict__
    if (
        named
        or len(args) != 1
        or type(args[0]) is not Tensor
        or held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "_compiled_call_impl" in held
        or _before
        or _after
        or _backward_before
        or _backward_after
        or _is_traced() is not None
    ):
        return nn.Module.__call__(self, *args, **named)
    return self.forward(args[0])
