"""What is measured, in order of importance, since the time may not suffice for the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from fif_ops.models import hwnet

from ..precision import BF16, FP16, FP32, TF32, Precision
from ..shapes import Shape, Task, network_task, unit_task
from .shapes import BATCH, MAIN, SINGLE, TINY, TUNED, UNITS

PARTS = ("inference", "training", "networks")
PLAIN = ("fused", "eager", "compile nhwc")
WHOLE = (*PLAIN, "fused compile nhwc")


class Item(NamedTuple):
    """One race: ``peers`` are names and families."""

    suite: str
    task: Callable[[str], Task]  # for a device
    name: str
    precision: Precision
    peers: tuple[str, ...]
    shape: Shape | None = None
    training: bool = False

    @property
    def key(self) -> str:
        """Tells it from all others."""
        return f"{self.suite} {self.name}"


def items(part: str, quick: bool = False, dry: bool = False) -> list[Item]:
    """The races of a part, the most important ones first; ``dry`` has the same kinds with a few tiny shapes."""
    if part == "networks":
        return _networks(quick, dry)
    training = part == "training"
    if dry:
        plan: list[tuple[Precision, Sequence[Shape], tuple[str, ...]]] = [
            (FP16, TINY[:1], PLAIN[:2]),
            (BF16, TINY[1:], PLAIN[:2]),
            (TF32, TINY[:1], PLAIN[:2]),
            (FP32, TINY, PLAIN[:2]),
        ]
        single: Sequence[Shape] = TINY[:1]
    elif quick:
        plan, single = [(FP16, TUNED[:4], PLAIN)], SINGLE[:2]
    else:
        precisions = (BF16, TF32, FP32)
        rest = [shape for shape in UNITS if shape not in MAIN]
        plan = [(FP16, MAIN, PLAIN), *((precision, MAIN, PLAIN) for precision in precisions[: 1 + training])]
        plan += [(FP16, rest, PLAIN)]
        plan += [(precision, MAIN, PLAIN) for precision in precisions[1 + training :]]
        plan += [(precision, rest, PLAIN[:2]) for precision in precisions]
        single = SINGLE
    found = [_unit(part, shape, precision, peers, training) for precision, shapes, peers in plan for shape in shapes]
    graphs = [
        _unit(f"{part} of one image", shape, FP16, (*PLAIN[:2], "fused graph", "eager graph"), training)
        for shape in single
    ]
    # After the first precision's main shapes.
    found[len(plan[0][1]) : len(plan[0][1])] = graphs
    return _with_tuned(found, dry)


def _with_tuned(found: list[Item], dry: bool) -> list[Item]:
    """Adds those that take long to prepare where it is worth their time: in fp16, on some shapes."""
    if dry:
        return found
    tuned = []
    for item in found:
        more: tuple[str, ...] = ("fused triton",) if item.shape in MAIN and item.precision is FP16 else ()
        more += ("compile-max nhwc",) if item.shape in TUNED and item.precision is FP16 else ()
        tuned.append(item._replace(peers=item.peers + more))
    return tuned


def _unit(suite: str, shape: Shape, precision: Precision, peers: tuple[str, ...], training: bool) -> Item:
    def task(device: str) -> Task:
        return unit_task(shape, training, precision, device)

    return Item(f"{suite} {precision.name}", task, shape.name, precision, peers, shape, training)


def _networks(quick: bool, dry: bool) -> list[Item]:
    if dry:
        small = functools.partial(hwnet, 0.25, num_classes=10, in_size=16, fused=False)
        return [
            _network("HWNet 0.25", small, 16, 2, BF16, PLAIN[:2], training=False),
            _network("HWNet 0.25", small, 16, 4, FP32, PLAIN[:2], training=True),
        ]
    found = [_network("HWNet 1.0", None, 224, BATCH, FP16, WHOLE, training) for training in (False, True)]
    if quick:
        return found
    for name, timm_name in (("ResNet-18", "resnet18"), ("GhostNet 1.0", "ghostnet_100")):
        make = functools.partial(_from_timm, timm_name)
        for training in (False, True):
            found.append(_network(f"timm {name}", make, 224, BATCH, FP16, ("eager nhwc", *PLAIN[2:]), training))
    found.append(_network("HWNet 1.0", None, 224, 1, FP16, (*PLAIN[:2], "fused graph", "eager graph"), training=False))
    return found


def _network(
    name: str,
    make: Callable[[], nn.Module] | None,
    size: int,
    batch: int,
    precision: Precision,
    peers: tuple[str, ...],
    training: bool,
) -> Item:
    def task(device: str) -> Task:
        return network_task(size, batch, training, precision, device, make() if make else None, name)

    mode = "training" if training else "inference"
    return Item(f"networks {mode} {precision.name}", task, f"{name} b{batch}", precision, peers, training=training)


def _from_timm(name: str) -> nn.Module:
    """Raises ImportError where there is no timm."""
    import timm

    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=1000, drop_rate=0.0)
    return network
