"""Measures one item: the race, and beside the times launches, host time, memory and share of the bandwidth."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fif_ops import FeatureAugment, FusedFiF, explain

from ..checks import WrongResult
from ..peers import KERNELS, Peer, fused
from ..race import Race
from ..shapes import Task
from ..timing import Pace
from .device import Device, backends_used, host_seconds
from .items import Item
from .shapes import minimal_elements

PACE = Pace(0.1, 11, 31, 0.02)
NETWORK_PACE = Pace(0.5, 7, 15, 0.1)
TRIAL_PACE = Pace(0.0, 3, 3, 0.0)


def measure(item: Item, device: Device, peers: dict[str, Peer], bandwidth: float) -> dict[str, Any]:
    """The record of the item. Raises WrongResult or RuntimeError if nothing is left to compare."""
    task = item.task(str(device.device))
    if item.shape is None:
        _assert_fused(item, task)
    wanted = [peer for peer in peers.values() if {peer.name, peer.family} & set(item.peers)]
    race = Race(task, wanted, device.clock, strict=False)
    if not race.peers:
        raise WrongResult("; ".join(f"{name}: {why}" for name, why in race.failed.items()) or "no peer can run")
    trial = device.device.type == "cpu"
    race.time(TRIAL_PACE if trial else PACE if item.shape else NETWORK_PACE)
    record = race.record(item.suite)
    record["key"], record["precision"], record["failed"] = item.key, item.precision.name, race.failed
    with race.conditions():
        for name, step in race.steps.items():
            figures = record["peers"][name]
            figures["host"] = host_seconds(device, step, 2 if trial else 20 if item.shape else 3)
            if item.training:
                figures["peak_bytes"] = device.peak_bytes(step)
        for name in _leaders(race):  # not of all peers, since a profile takes long
            kernels = device.launches(race.steps[name])
            record["peers"][name]["launches"] = sum(kernels.values())
            if name.startswith("fused") and item.shape:
                record["peers"][name]["kernels"] = kernels
    if item.shape is not None:
        assert isinstance(task.module, FeatureAugment)
        with torch.set_grad_enabled(task.training):
            unit = FusedFiF.from_reference(task.module)
            record["explanation"] = str(explain(unit, task.x))
            planned = {last: _planned_bytes(unit, task.x, last) for last in (False, True)}
        moved = minimal_elements(item.shape, item.training) * item.precision.dtype.itemsize
        record["minimal_bytes"] = moved
        for figures in record["peers"].values():
            figures["bandwidth_share"] = moved / figures["median"] / bandwidth
        for peer in race.peers:
            if peer.family == "fused":
                record["peers"][peer.name]["planned_bytes"] = planned[peer.channels_last]
    return record


def _planned_bytes(unit: FusedFiF, x: torch.Tensor, last: bool) -> int | None:
    """What the planner expects all launches to move, to and from the second-level cache; None without a plan."""
    layout = torch.channels_last if last else torch.contiguous_format
    plan = explain(unit, x.contiguous(memory_format=layout)).plan
    return sum(launch.bytes_read + launch.bytes_written for launch in plan) or None


def _leaders(race: Race) -> list[str]:
    """The faster layout of every family."""
    best = (race.best(family) for family in dict.fromkeys(peer.family for peer in race.peers))
    return [name for name in best if name is not None]


def _assert_fused(item: Item, task: Task) -> None:
    """Raises RuntimeError if a network's fused units would run on the reference."""
    if "fused" not in item.peers:
        return
    used = backends_used(fused(copy.deepcopy(task.module)), task)
    if not used or set(used) - set(KERNELS[task.x.device.type]):
        raise RuntimeError(f"{item.key} would time the reference as the fused unit: {used}")
