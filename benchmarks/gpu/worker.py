"""Measures the items of a part, one after the other, in a process that may be killed at any time.

Every item that begins, and every result, is a line of JSON in the journal; items that have begun there are not tried
again. Run by the supervisor: ``python -m benchmarks.gpu.worker PART JOURNAL --deadline SECONDS``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..race import is_lost
from . import budget
from .device import Device, open_device
from .items import PARTS, items
from .journal import read, write
from .measure import measure
from .peers import registry

FIRST_GUESS = {True: 3.0, False: 15.0}  # seconds of a unit, of a network, before one with the same peers was measured


def run(part: str, journal: Path, deadline: float, device: Device, quick: bool) -> None:
    """Measures what the journal does not have, until the deadline."""
    dry = device.device.type == "cpu"
    entries = read(journal)
    begun = {entry["key"] for entry in entries if entry["state"] == "begun"}
    bandwidth = next((entry["bandwidth"] for entry in entries if entry["state"] == "machine"), None)
    if bandwidth is None:
        bandwidth = device.copy_bandwidth()
        write(journal, state="machine", bandwidth=bandwidth, facts=device.facts())
        budget.say(f"copy bandwidth: {bandwidth / 1e12:.3f} TB/s")
    peers, plan = registry(device), items(part, quick, dry)
    last: dict[tuple[str, ...], float] = {}
    for place, item in enumerate(plan, 1):
        if item.key in begun:
            continue
        if time.time() + last.get(item.peers, 0.0 if dry else FIRST_GUESS[item.shape is not None]) > deadline:
            write(journal, state="left out", part=part, key=item.key)
            continue
        write(journal, state="begun", part=part, key=item.key, time=time.time())
        start = time.time()
        try:
            record = measure(item, device, peers, bandwidth)
            write(journal, state="done", part=part, key=item.key, record=record)
            outcome = _summary(record)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            write(journal, state="failed", part=part, key=item.key, reason=outcome)
            if is_lost(device.device):
                raise
        last[item.peers] = time.time() - start
        timed = f"{last[item.peers]:.1f} s, {deadline - time.time():.0f} s left"
        budget.say(f"  {place}/{len(plan)} {item.key}: {outcome.splitlines()[0][:150]} ({timed})")


def _summary(record: dict[str, Any]) -> str:
    def best(ours: bool) -> float | None:
        peers = record["peers"].values()
        return min((peer["median"] for peer in peers if peer["family"].startswith("fused") == ours), default=None)

    ours, theirs = best(True), best(False)
    failures = "".join(f"; {name} FAILED: {why}" for name, why in record["failed"].items())
    if ours is None or theirs is None:
        return f"{1e6 * (ours or theirs or 0):.1f} us{failures}"
    return f"{1e6 * ours:.1f} us, {theirs / ours:.2f}x{failures}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run(options.part, options.journal, options.deadline, open_device(options.device), options.quick)


if __name__ == "__main__":
    main()
