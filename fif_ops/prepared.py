"""Calls, kept: all but x was checked at an earlier one, and must only be found unchanged.

On small maps the time of a call is the time of its checks. What they led to (the operator and its arguments) stays
valid while the module holds the same submodules, parameters, buffers and settings. Values may change at any time and in
ways that leave no trace: in training the operator reads the parameters afresh at every call; in evaluation it does
that, or it runs a chain of stages, packed before (chain.py), and first compares a hash of the parameters with that of
what was packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, ops
from .autograd import Convolutions, FusedUnit
from .chain import Chain
from .direct import direct_call
from .functional import Call, wants_gradients
from .unchanged import Unchanged

_follow, _fingerprint = ops.at_once("follow"), ops.at_once("fingerprint")


def prepare(unit: nn.Module, call: Call, given: Convolutions) -> PreparedCall | PreparedTraining | None:
    """What the unit may keep of a call, None if it depends on more; ``given``: convolutions that it holds itself."""
    options = call.options
    if options is None or backends.wanted(None) is not None:
        return None
    if call.convolutions[0].is_cuda and call.convolutions[0].dtype == torch.float32:
        return None  # tf32 follows a switch of torch
    if not all(used is held for used, held in zip(call.convolutions, given, strict=True)):
        return None
    if call.wants_grad:
        if options.namespace != "fif_ops" or call.convolutions[0].dtype == torch.bfloat16:
            return None  # training in bfloat16 has two ways, and which is faster depends on x
        # Without a momentum the statistics are a mean over all batches, which gives every call another one.
        lasting = all(n.momentum is not None for n in unit.modules() if isinstance(n, nn.BatchNorm2d))
        return PreparedTraining(unit, call) if lasting else None
    return None if any(options.batch) else PreparedCall.of_unit(unit, call)


class _Kept:
    """What was found out about a module, on one device."""

    __slots__ = ("choices", "device", "unchanged")

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.unchanged = Unchanged(module)
        self.choices = backends.tuned.choices(device)

    def holds(self) -> bool:
        """Whether the module is what it was, and so are measured choices of backends."""
        return self.unchanged.holds() and backends.tuned.choices(self.device) is self.choices


class PreparedCall(_Kept):
    """The operator call that a module's forward came to, without x.

    Raises RuntimeError where x does not fit, or the parameters have other values than those that were packed.
    """

    __slots__ = ("arguments", "backends", "content", "dtype", "flat", "module", "operator", "options")

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module, device)
        self.module = module
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
        assert options is not None  # prepare
        prepared = cls(unit, x.device)
        prepared.operator, prepared.dtype = options.operator("infer"), x.dtype
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


class PreparedTraining(_Kept):
    """The same of a call that autograd records.

    Raises RuntimeError where a parameter does not fit any more.
    """

    __slots__ = ("arguments", "channels", "counters", "dtype", "parameters")

    def __init__(self, unit: nn.Module, call: Call) -> None:
        x, *convolutions = call.convolutions
        super().__init__(unit, x.device)
        self.channels, self.dtype = x.shape[1], x.dtype
        self.arguments = (*convolutions, *call.norms, call.options)
        self.parameters = list(unit.parameters())
        norms = [part for part in unit.modules() if isinstance(part, nn.BatchNorm2d)]
        counters = [n.num_batches_tracked for n in norms if n.training and n.track_running_stats]
        self.counters = [batches for batches in counters if batches is not None]

    def takes(self, x: Tensor) -> bool:
        """Whether the module's forward would come to this call with x, in the modes of the moment."""
        if type(x) is not Tensor or x.dtype is not self.dtype or x.device != self.device:
            return False
        shape = x.shape
        if len(shape) != 4 or shape[1] != self.channels or shape[0] * shape[2] * shape[3] < 2:
            return False
        if backends.wanted(None) not in (None, "cpu") or torch.is_autocast_enabled(self.device.type):
            return False
        return wants_gradients((x, *self.parameters))

    def __call__(self, x: Tensor) -> Tensor:
        for batches in self.counters:
            batches.add_(1)
        try:
            return FusedUnit.apply(x, *self.arguments)
        except RuntimeError:
            for batches in self.counters:
                batches.sub_(1)
            raise


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
