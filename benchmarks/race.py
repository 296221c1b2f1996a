"""One measurement: all peers on one task, checked first, then timed in turns, and the floor that fused must pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import timing
from .checks import Truth
from .peers import Peer, Step
from .shapes import Task

ATTEMPTS = 3  # measurements before the floor counts as missed: machines are shared


class Race:
    """Peers prepared for a task, and what was measured of them.

    Attributes: ``steps``, ``errors`` (largest relative error) and ``timings`` by peer's name, ``skipped`` (why a peer
    cannot run here or do this task), ``failed`` (which peer went wrong, and how), ``speed_ups`` (the better eager
    median over the better fused one; one for every attempt at the floor).

    Raises WrongResult if a peer's result is wrong, and whatever a peer raises: nothing is timed then. Unless
    ``strict``, such a peer is only left out and counts as ``failed``.
    """

    def __init__(
        self, task: Task, peers: Sequence[Peer], clock: timing.Clock = timing.WALL, strict: bool = True
    ) -> None:
        self.task = task
        self.clock = clock
        self.skipped = {peer.name: why for peer in peers if (why := peer.unavailable() or peer.refuses(task))}
        self.peers = [peer for peer in peers if peer.name not in self.skipped]
        self.steps: dict[str, Step] = {}
        self.errors: dict[str, float] = {}
        self.timings: dict[str, timing.Timing] = {}
        self.speed_ups: list[float] = []
        self.failed: dict[str, str] = {}
        if any(peer.family.startswith("compile") for peer in self.peers):
            torch.compiler.reset()  # else what earlier tasks compiled counts towards the limit of recompilations
        truth = Truth(task)
        for peer in list(self.peers):
            try:
                self._admit(peer, truth)
            except Exception as error:
                if strict or is_lost(task.x.device):
                    raise
                self.failed[peer.name] = f"{type(error).__name__}: {error}"
                self.peers.remove(peer)
                self.steps.pop(peer.name, None)

    def _admit(self, peer: Peer, truth: Truth) -> None:
        with self.task.precision.switched(self.task.x.device):
            self.steps[peer.name] = peer.make(self.task)
            with self._mode():
                self.errors[peer.name] = truth.check(peer.name, peer.channels_last, self.steps[peer.name]())

    def time(self, pace: timing.Pace, floor: bool = False) -> None:
        """Measures; with ``floor``, again where fused is not ahead of eager, ATTEMPTS times in all."""
        for _ in range(ATTEMPTS):
            with self.conditions():
                self.timings = timing.interleaved(self.steps, pace, self.clock)
            fused, eager = self.best("fused"), self.best("eager")
            if not floor or fused is None or eager is None:
                return
            self.speed_ups.append(self.timings[eager].median / self.timings[fused].median)
            if self.floor_met:
                return

    @property
    def floor_met(self) -> bool:
        """Whether the last attempt found fused ahead of eager; true if nobody asked."""
        return not self.speed_ups or self.speed_ups[-1] > 1

    def best(self, family: str) -> str | None:
        """The name of the family's faster peer, None if none was timed."""
        names = [peer.name for peer in self.peers if peer.family == family and peer.name in self.timings]
        return min(names, key=lambda name: self.timings[name].median, default=None)

    def record(self, suite: str) -> dict[str, Any]:
        """What a JSON file keeps of the race; times in seconds."""
        return {
            "suite": suite,
            "task": self.task.name,
            "threads": torch.get_num_threads(),
            "dtype": str(self.task.x.dtype).removeprefix("torch."),
            "peers": {
                peer.name: {
                    "family": peer.family,
                    "channels_last": peer.channels_last,
                    "relative_error": self.errors[peer.name],
                    **self.timings[peer.name]._asdict(),
                }
                for peer in self.peers
            },
            "skipped": self.skipped,
            "failed": self.failed,
            "floor": {"met": self.floor_met, "speed_ups": self.speed_ups} if self.speed_ups else None,
        }

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """What timings are taken under: the task's modes and, on a processor and with one thread, one core."""
        device = self.task.x.device
        pin = device.type == "cpu" and torch.get_num_threads() == 1
        with self._mode(), self.task.precision.switched(device), timing.pinned() if pin else contextlib.nullcontext():
            yield

    def _mode(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.task.training else torch.inference_mode()


def is_lost(device: torch.device) -> bool:
    """Whether nothing more can run in this process, as after a bad access by a kernel."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False
