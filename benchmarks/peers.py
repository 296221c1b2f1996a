"""Who is measured: one registry of peers, each a way to run a task.

To add one, write a ``make`` and an entry in ``PEERS``. ``make(task)`` prepares everything (converts, folds, compiles)
and returns a callable without arguments that does the task once. For inference that callable returns the result,
(B, N, H, W); for training it returns ``(result, *gradients, *buffers)`` in the order of ``checks.names``. The first
call may still compile: it is the one whose result is checked, and it is not timed.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fif_ops import FeatureAugment, FusedFiF, backends, explain, freeze, models

from . import runtimes
from .checks import differentiable, running_statistics
from .runtimes import Step
from .shapes import Task

SUITES = ("inference", "training", "host", "network")
FROZEN = ("inference", "host", "network")
# The backends that are the fused unit on a kind of device.
KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Peer(NamedTuple):
    """A way to run tasks. ``unavailable`` says why it cannot run here, ``refuses`` why it cannot do a task, or "".

    Peers of one ``family`` differ in memory format only; the report takes the better of them. ``default_in`` names
    the suites in which the peer runs unasked.
    """

    name: str
    family: str
    channels_last: bool
    make: Callable[[Task], Step]
    unavailable: Callable[[], str] = lambda: ""
    refuses: Callable[[Task], str] = lambda task: ""
    default_in: tuple[str, ...] = SUITES


def torch_step(task: Task, prepare: Callable[[nn.Module], nn.Module], channels_last: bool) -> Step:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def place(t: Tensor) -> Tensor:
        return t.detach().clone(memory_format=layout if t.dim() == 4 else torch.contiguous_format)

    twin = prepare(copy.deepcopy(task.module)).to(memory_format=layout)
    x = place(task.x)
    if task.upstream is None:
        return functools.partial(twin, x)
    x.requires_grad_(task.x.requires_grad)
    return TrainingStep(twin, x, place(task.upstream), task)


class TrainingStep:
    """Forward and backward: the result, the gradients and the running statistics, in the order of ``checks.names``."""

    def __init__(self, module: nn.Module, x: Tensor, upstream: Tensor, task: Task) -> None:
        self.module, self.x, self.upstream = module, x, upstream
        self.wanted, self.buffers = differentiable(module, x), running_statistics(module)
        self.autocast = task.autocast()  # one object for all calls: they never nest

    def __call__(self) -> tuple[Tensor, ...]:
        with self.autocast:
            result = self.module(self.x)
        return result, *torch.autograd.grad(result, self.wanted, self.upstream), *self.buffers


def fused(module: nn.Module) -> nn.Module:
    """The module as users have it who want it fast: a fused HWNet, or FusedFiF units for FeatureAugment ones."""
    if type(module) is models.HWNet:
        return module.to_fused()
    if type(module) is FeatureAugment:
        return FusedFiF.from_reference(module)
    for name, child in module.named_children():
        setattr(module, name, fused(child))
    return module


def make_fused(task: Task, channels_last: bool) -> Step:
    if isinstance(task.module, FeatureAugment):
        with torch.set_grad_enabled(task.training):
            why = explain(FusedFiF.from_reference(task.module), task.x)
        if why.backend not in KERNELS[task.x.device.type]:
            raise RuntimeError(f"{task.name} would time the reference as the fused unit: {why}")
    return torch_step(task, fused, channels_last)


def make_frozen(task: Task, channels_last: bool) -> Step:
    return torch_step(task, freeze, channels_last)


def make_eager(task: Task, channels_last: bool) -> Step:
    return torch_step(task, lambda module: module, channels_last)


def make_compiled(task: Task, channels_last: bool) -> Step:
    # Freezing makes constants of the weights, so that the compiler can fold and repack them; it is for inference only.
    options = None if task.training else {"freezing": True}
    # fullgraph: a graph break, or one compilation too many, must be an error, not a silent return to eager mode.
    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True, options=options)
    return torch_step(task, compiled, channels_last)


def _cannot_freeze(task: Task) -> str:
    if task.x.device.type != "cpu":
        return "freezing is for the processor"
    return runtimes.no_inference(task)


def _fused_unavailable() -> str:
    return backends.BACKENDS["cpu"].unavailable()


def compiler_unavailable() -> str:
    named = os.environ.get("CXX")
    if not any(map(shutil.which, [named] if named else ["c++", "g++", "clang++"])):
        return f"no C++ compiler ({named or 'c++, g++, clang++'}) on the PATH, which torch.compile needs"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.is_file() else f"no {header}, which torch.compile needs"


def both_layouts(family: str, make: Callable[..., Step], **options: Any) -> list[Peer]:
    return [
        Peer(f"{family} {name}", family, last, functools.partial(make, channels_last=last), **options)
        for name, last in (("nchw", False), ("nhwc", True))
    ]


def _runtime(label: str, *modules: str) -> dict[str, Any]:
    return {"unavailable": functools.partial(runtimes.missing, label, *modules), "default_in": ("inference", "network")}


ONNX_RUNTIME = _runtime("ONNX Runtime", "onnxruntime", "onnx")
OPENVINO = _runtime("OpenVINO", "openvino", "onnx")
LITERT = _runtime("LiteRT", "ai_edge_litert")
AOTI = {"unavailable": compiler_unavailable, "refuses": runtimes.no_unit_inference, "default_in": ()}

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        *both_layouts("fused", make_fused, unavailable=_fused_unavailable),
        *both_layouts("frozen", make_frozen, unavailable=_fused_unavailable, refuses=_cannot_freeze, default_in=FROZEN),
        *both_layouts("eager", make_eager),
        *both_layouts("compile", make_compiled, unavailable=compiler_unavailable, default_in=("inference",)),
        *both_layouts("aoti", runtimes.make_aoti, **AOTI),
        Peer(
            "onnxruntime nchw",
            "onnxruntime",
            False,
            runtimes.make_onnxruntime,
            refuses=runtimes.no_fp32_inference,
            **ONNX_RUNTIME,
        ),
        *both_layouts("openvino", runtimes.make_openvino, refuses=runtimes.no_inference, **OPENVINO),
        Peer("litert nhwc", "litert", True, runtimes.make_litert, refuses=runtimes.no_fp32_unit, **LITERT),
    )
}


def chosen(wanted: str, suite: str, peers: Iterable[Peer] = PEERS.values()) -> list[Peer]:
    """The peers of a suite: "default", "all", or names and families with commas between. The fused ones always run.

    Raises ValueError for a name that is no peer.
    """
    peers = list(peers)
    if wanted == "all":
        return peers
    if wanted == "default":
        return [peer for peer in peers if suite in peer.default_in]
    names = {name.strip() for name in wanted.split(",")} | {"fused"}
    known = {label for peer in peers for label in (peer.name, peer.family)} | {"fused"}
    if names - known:
        raise ValueError(
            f"peers={wanted!r}: no peer is called {', '.join(sorted(names - known))}; "
            f"must be 'default', 'all' or some of {', '.join(sorted(known))}"
        )
    return [peer for peer in peers if names & {peer.name, peer.family}]
