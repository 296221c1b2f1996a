"""Who is measured on a GPU: the peers of the other benchmarks, and those that only a GPU has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fif_ops import backends

from ..peers import (
    KERNELS,
    Peer,
    Step,
    TrainingStep,
    both_layouts,
    compiler_unavailable,
    fused,
    make_eager,
    make_fused,
    torch_step,
)
from ..shapes import Task
from .device import Device

TUNED_MODE = "max-autotune-no-cudagraphs"


def registry(device: Device) -> dict[str, Peer]:
    """All peers by name. The compiled ones need no compiler of C++ on a GPU."""
    kind = device.device.type
    missing = functools.partial(_no_kernels, kind)
    compiler = (lambda: "") if kind == "cuda" else compiler_unavailable
    peers = (
        *both_layouts("fused", make_fused, unavailable=missing),
        *both_layouts("eager", make_eager),
        *both_layouts("compile", _make_compiled, unavailable=compiler),
        *both_layouts("compile-max", functools.partial(_make_compiled, mode=TUNED_MODE), unavailable=compiler),
        *both_layouts("fused compile", functools.partial(_make_compiled, before=fused), unavailable=missing),
        *both_layouts("fused triton", _make_triton, unavailable=_no_triton),
        *both_layouts("fused graph", _replayed(device, make_fused), unavailable=missing),
        *both_layouts("eager graph", _replayed(device, make_eager)),
    )
    return {peer.name: peer for peer in peers}


def _no_kernels(kind: str) -> str:
    reasons = [backends.BACKENDS[name].unavailable() for name in KERNELS[kind] if name in backends.BACKENDS]
    return "" if "" in reasons else "; ".join(reasons)


def _no_triton() -> str:
    backend = backends.BACKENDS.get("triton")
    return "there is no such backend" if backend is None else backend.unavailable()


class _OnTriton(nn.Module):
    """The module, its fused units on the Triton backend; ValueError where that cannot run them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with backends.use("triton"):
            return self.module(x)


def _make_triton(task: Task, channels_last: bool) -> Step:
    return torch_step(task, lambda module: _OnTriton(fused(module)), channels_last)


def _make_compiled(
    task: Task,
    channels_last: bool,
    mode: str | None = None,
    before: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Step:
    def prepare(module: nn.Module) -> Any:
        return torch.compile(before(module), dynamic=False, fullgraph=True, mode=mode)

    return torch_step(task, prepare, channels_last)


def _replayed(device: Device, make: Callable[..., Step]) -> Callable[..., Step]:
    """Captured when it is made; every call, the checked one too, is a replay."""

    def prepare(task: Task, channels_last: bool) -> Step:
        step = make(task, channels_last=channels_last)
        with torch.inference_mode(not task.training):
            return device.replay(step, step.buffers if isinstance(step, TrainingStep) else ())

    return prepare
