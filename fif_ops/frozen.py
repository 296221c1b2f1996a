"""Modules for inference alone: whole chains of stages, whose weights are constants, in one operator."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .chain import Chain
from .direct import direct_call
from .modules import FusedFiF

_run, _run_at_once = ops.operator("run"), ops.at_once("run")


class Frozen(nn.Module):
    """A part of a network in evaluation, with constants for weights: made by ``freeze``, not trained, not loaded into.

    Shapes: x (B, C, H, W), as the part that was frozen takes it, of the dtype that its weights had, on the processor.
    Returns what that part would, in x's memory format. Later changes of the original do not show.
    Raises RuntimeError for another dtype, device or number of channels, and if x requires a gradient.
    """

    __call__ = direct_call

    def __init__(self, chain: Chain, name: str) -> None:
        super().__init__()
        self.name, self.flat = name, chain.flat
        program, packed, self.out_channels, self.stride, self.dtype = chain.program()
        self.register_buffer("program", program, persistent=False)
        self.register_buffer("packed", packed, persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, N, H', W'), or (B, N) of a whole network."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"x requires a gradient, and a frozen {self.name} has none: use the module it came from")
        held = self.__dict__
        program, packed = held["_buffers"]["program"], held["_buffers"]["packed"]
        if x.dtype is not held["dtype"] or not x.is_cpu or not packed.is_cpu:
            raise RuntimeError(
                f"x is {x.dtype} on {x.device}, and this {self.name} was frozen in {self.dtype} on the cpu"
                f"{'' if packed.is_cpu else f' and then moved to {packed.device}'}"
            )
        run = _run if torch.compiler.is_compiling() else _run_at_once
        y = run(x, program, packed, held["out_channels"], held["stride"])
        return y.flatten(1) if held["flat"] else y

    def extra_repr(self) -> str:
        program: Any = self.program
        packed: Any = self.packed
        size = packed.numel() / 2**20
        return f"{self.name}: {len(program)} stages, {size:.2f} MiB of constants, {self.dtype}, {ops.CPU_ISA}"


def freeze(module: nn.Module) -> nn.Module:
    """A copy of ``module`` for inference on the processor, with its units, spindles and whole HWNets as ``Frozen``.

    What cannot be frozen (other layers, units with hooks, batch statistics, groups, or unusual padding) stays what it
    was. The copy computes in the dtype of the weights, whatever autocast says; its constants are packed for the
    instruction set in use.

    Raises TypeError if ``module`` is no module, ValueError if it is in training mode or not on the processor,
    RuntimeError if the compiled kernels are not there.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: must be a torch.nn.Module")
    if any(part.training for part in module.modules()):
        raise ValueError("module is in training mode: call module.eval() first, since freezing folds its statistics")
    if any(t.device.type != "cpu" for t in (*module.parameters(), *module.buffers())):
        raise ValueError("module is not on the cpu, and only there can it be frozen: move it with module.cpu()")
    if not ops.LOADED:
        raise RuntimeError(f"freeze needs the compiled kernels: {ops.ERROR}")
    with torch.no_grad():
        return _frozen(copy.deepcopy(module))


def _frozen(module: nn.Module) -> nn.Module:
    chain = Chain.of(module, FusedFiF.from_reference)
    if chain is not None:
        return Frozen(chain, type(module).__name__)
    for name, child in module.named_children():
        setattr(module, name, _frozen(child))
    return module
