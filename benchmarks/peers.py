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

from fif_ops import FeatureAugment, FusedFiF, backends, explain

from .checks import differentiable, running_statistics
from .shapes import Task

Step = Callable[[], Any]
SUITES = ("inference", "training", "host", "network")


def _always() -> str:
    return ""


class Peer(NamedTuple):
    """A way to run tasks. ``unavailable`` says why it cannot run here, or "".

    Peers of one ``family`` differ in memory format only; the report takes the better of them. ``default_in`` names
    the suites in which the peer runs unasked.
    """

    name: str
    family: str
    channels_last: bool
    make: Callable[[Task], Step]
    unavailable: Callable[[], str] = _always
    default_in: tuple[str, ...] = SUITES


def _torch_step(task: Task, prepare: Callable[[nn.Module], nn.Module], channels_last: bool) -> Step:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def place(t: Tensor) -> Tensor:
        return t.detach().clone(memory_format=layout if t.dim() == 4 else torch.contiguous_format)

    twin = prepare(copy.deepcopy(task.module)).to(memory_format=layout)
    x = place(task.x)
    if task.upstream is None:
        return functools.partial(twin, x)
    x.requires_grad_(task.x.requires_grad)
    upstream, wanted, buffers = place(task.upstream), differentiable(twin, x), running_statistics(twin)

    def step() -> tuple[Tensor, ...]:
        result = twin(x)
        return result, *torch.autograd.grad(result, wanted, upstream), *buffers

    return step


def fused(module: nn.Module) -> nn.Module:
    """The module with its FeatureAugment units replaced by FusedFiF ones."""
    if type(module) is FeatureAugment:
        return FusedFiF.from_reference(module)
    for name, child in module.named_children():
        setattr(module, name, fused(child))
    return module


def _make_fused(task: Task, channels_last: bool) -> Step:
    if isinstance(task.module, FeatureAugment):
        why = explain(FusedFiF.from_reference(task.module), task.x)
        if why.backend == "reference":
            raise RuntimeError(f"{task.name} would time the reference as the fused unit: {why}")
    return _torch_step(task, fused, channels_last)


def _make_eager(task: Task, channels_last: bool) -> Step:
    return _torch_step(task, lambda module: module, channels_last)


def _make_compiled(task: Task, channels_last: bool) -> Step:
    # fullgraph: a graph break, or one compilation too many, must be an error, not a silent return to eager mode.
    return _torch_step(task, functools.partial(torch.compile, dynamic=False, fullgraph=True), channels_last)


def _fused_unavailable() -> str:
    return backends.BACKENDS["cpu"].unavailable()


def _compiler_unavailable() -> str:
    named = os.environ.get("CXX")
    if not any(map(shutil.which, [named] if named else ["c++", "g++", "clang++"])):
        return f"no C++ compiler ({named or 'c++, g++, clang++'}) on the PATH, which torch.compile needs"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.is_file() else f"no {header}, which torch.compile needs"


def _both_layouts(family: str, make: Callable[..., Step], **options: Any) -> list[Peer]:
    return [
        Peer(f"{family} {name}", family, last, functools.partial(make, channels_last=last), **options)
        for name, last in (("nchw", False), ("nhwc", True))
    ]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        *_both_layouts("fused", _make_fused, unavailable=_fused_unavailable),
        *_both_layouts("eager", _make_eager),
        *_both_layouts("compile", _make_compiled, unavailable=_compiler_unavailable, default_in=("inference",)),
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
