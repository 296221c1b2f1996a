"""Calls in evaluation, kept: all but x was checked at an earlier one, and must only be found unchanged.

On small maps the time of a call is the time of its checks. What they led to (the operator and its arguments) stays
valid while the module holds the same submodules, parameters, buffers and settings. Values may change at any time and in
ways that leave no trace: either the operator reads the parameters afresh at every call, or it runs a chain of stages,
packed before (chain.py), and first compares a hash of the parameters with that of what was packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, ops
from .autograd import Convolutions
from .chain import Chain
from .direct import direct_call
from .functional import Call
from .unchanged import Unchanged

_follow, _fingerprint = ops.at_once("follow"), ops.at_once("fingerprint")


def can_prepare(call: Call, given: Convolutions) -> bool:
    """Whether a call depends on nothing that a ``PreparedCall`` does not see; ``given``: what the unit itself holds."""
    options = call.options
    if options is None or call.wants_grad or any(options.batch) or backends.wanted(None) is not None:
        return False
    if call.convolutions[0].is_cuda and call.convolutions[0].dtype == torch.float32:
        return False  # tf32 follows a switch of torch
    return all(used is held for used, held in zip(call.convolutions, given, strict=True))


class PreparedCall:
    """The operator call that a module's forward came to, without x.

    Raises RuntimeError where x does not fit, or the parameters have other values than those that were packed.
    """

    __slots__ = ("arguments", "backends", "choices", "content", "device", "dtype", "flat", "module", "operator",
                 "options", "unchanged")  # fmt: skip

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.unchanged = Unchanged(module)
        self.choices = backends.tuned.choices(device)
        self.operator: Any = None
        self.arguments: tuple[Any, ...] = ()
        self.options: Mapping[str, Any] = {}
        self.dtype: torch.dtype | None = None
        self.backends: tuple[str | None, ...] = (None,)  # that the user may ask for
        self.flat = False
        self.content: int | None = None  # the hash of what the last call found, of a unit that may become a chain

    @classmethod
    def of_unit(cls, unit: nn.Module, call: Call) -> PreparedCall:
        """The call of a unit. Where two calls find the same values, the next ones run them as a chain."""
        x, *convolutions = call.convolutions
        options = call.options
        assert options is not None  # can_prepare
        prepared = cls(unit, x.device)
        prepared.operator, prepared.dtype = options.operator("infer").default, x.dtype
        prepared.arguments = (*convolutions, *call.norms, *options.eps, options.out_channels, options.activation_code,
                              options.splice)  # fmt: skip
        if (options.stride, options.groups) != (1, 1):  # every argument costs time
            prepared.options = {"stride": options.stride, "groups": options.groups}
        if x.is_cpu and options.namespace == "fif_ops":
            prepared.backends = (None, "cpu")
            prepared.content = _content(prepared.unchanged.numbers())
        return prepared

    @classmethod
    def of_chain(cls, module: nn.Module) -> PreparedCall | None:
        """The module as a chain; one that takes nothing if it cannot be one, None where its values cannot be read."""
        prepared = cls(module, torch.device("cpu"))
        content = _content(prepared.unchanged.numbers())
        if content is None:
            return None
        prepared._follow(content)
        return prepared

    def _follow(self, content: int) -> None:
        chain = Chain.of(self.module)
        if chain is None:
            return
        program = chain.program()
        self.operator, self.options, self.flat, self.dtype = _follow, {}, chain.flat, program.dtype
        self.backends = (None, "cpu")
        self.arguments = (*program[:2], self.unchanged.numbers(), content, *program[2:4])

    def holds(self) -> bool:
        """Whether the module is what it was, and so are measured choices of backends."""
        return self.unchanged.holds() and backends.tuned.choices(self.device) is self.choices

    def takes(self, x: Tensor) -> bool:
        """Whether the module's forward would come to this call with x, in the modes of the moment."""
        if torch.is_grad_enabled() or x.dtype is not self.dtype or x.device != self.device:
            return False
        return backends.wanted(None) in self.backends and not torch.is_autocast_enabled(self.device.type)

    def __call__(self, x: Tensor) -> Tensor:
        if self.content is not None:
            before, self.content = self.content, _content(self.unchanged.numbers())
            if before == self.content:
                self.content = None
                self._follow(before)
        y = self.operator(x, *self.arguments, **self.options)
        return y.flatten(1) if self.flat else y


def _content(tensors: list[Tensor]) -> int | None:
    """A hash of all values; None where they cannot be read: on other devices, and inside vmap."""
    try:
        return _fingerprint(tensors)
    except RuntimeError:
        return None


class Chained(nn.Module):
    """A module that runs as a chain in evaluation: spindles and networks.

    Subclasses have ``compose``, their forward module by module, and ``lower``, the same as stages. The chain is used
    where no gradients are recorded and all units are FusedFiF, and made anew when the module or the values of its
    parameters change.
    """

    __call__ = direct_call
    _prepared: PreparedCall | None = None

    def compose(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def lower(self, chain: Chain, value: int) -> int:
        """Adds the module's stages; takes the name of the value it reads and returns that of its result."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W)."""
        if type(x) is not Tensor or not x.is_cpu or not ops.LOADED or torch.is_grad_enabled():
            return self.compose(x)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.compose(x)
        prepared = self._prepared
        if prepared is None or not prepared.holds():
            prepared = self._prepared = PreparedCall.of_chain(self)
        for _ in range(2):
            if prepared is None or not prepared.takes(x):
                break
            try:
                return prepared(x)
            except RuntimeError:  # other values by now; or a bad x, of which compose says in words what is wrong
                prepared = self._prepared = PreparedCall.of_chain(self)
        return self.compose(x)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # it knows this module's dictionaries, not a copy's
