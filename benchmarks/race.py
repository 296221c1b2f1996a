"""One measurement: all peers on one task, checked first, then timed in turns, and the floor that fused must pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from . import timing
from .checks import Truth
from .peers import Peer, Step
from .shapes import Task

ATTEMPTS = 3  # measurements before the floor counts as missed: machines are shared


class Race:
    """Peers prepared for a task, and what was measured of them.

    Attributes: ``steps``, ``errors`` (largest relative error) and ``timings`` by peer's name, ``skipped`` (why a peer
    cannot run here), ``speed_ups`` (the better eager median over the better fused one; one for every attempt at the
    floor). Raises WrongResult if a peer's result is wrong: nothing is timed then.
    """

    def __init__(self, task: Task, peers: Sequence[Peer]) -> None:
        self.task = task
        self.skipped = {peer.name: why for peer in peers if (why := peer.unavailable())}
        self.peers = [peer for peer in peers if peer.name not in self.skipped]
        self.steps: dict[str, Step] = {}
        self.errors: dict[str, float] = {}
        self.timings: dict[str, timing.Timing] = {}
        self.speed_ups: list[float] = []
        if any(peer.family == "compile" for peer in self.peers):
            torch.compiler.reset()  # else what earlier tasks compiled counts towards the limit of recompilations
        truth = Truth(task)
        for peer in self.peers:
            self.steps[peer.name] = peer.make(task)
            with self._mode():
                self.errors[peer.name] = truth.check(peer.name, peer.channels_last, self.steps[peer.name]())

    def time(self, pace: timing.Pace, floor: bool = False) -> None:
        """Measures; with ``floor``, again where fused is not ahead of eager, ATTEMPTS times in all."""
        for _ in range(ATTEMPTS):
            with self.conditions():
                self.timings = timing.interleaved(self.steps, pace)
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

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """What timings are taken under: the task's autograd mode and, if torch has one thread, one core."""
        with self._mode(), timing.pinned() if torch.get_num_threads() == 1 else contextlib.nullcontext():
            yield

    def _mode(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.task.training else torch.inference_mode()
