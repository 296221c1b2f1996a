"""Times that can be compared: peers take turns, so that a change of the clock or a noisy neighbour meets all alike."""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from statistics import quantiles
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

MIN_SAMPLE = 200e-6  # seconds; shorter samples would measure the clock
WARM_UP = 0.05  # seconds for each peer, and at least three calls
MAX_ROUNDS = 201


class Timing(NamedTuple):
    """Seconds per call over all rounds; each sample is the mean of ``repeats`` calls."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    repeats: int


class Pace(NamedTuple):
    """How long to measure: about ``seconds`` for all peers together, but from ``least_rounds`` to ``most_rounds``."""

    seconds: float
    least_rounds: int
    most_rounds: int = MAX_ROUNDS
    warm_up: float = WARM_UP


class Clock(Protocol):
    """Whatever measures calls."""

    def sample(self, action: Callable[[], Any], repeats: int) -> float:
        """Seconds that a call takes: the mean over ``repeats`` calls."""
        ...


class WallClock:
    """The processor's clock, for work that is done when the call returns.

    A first call is not timed: it refills the caches from what the peers before have left in them. Without it a short
    call costs up to twice as much among ten peers as among two.
    """

    def sample(self, action: Callable[[], Any], repeats: int) -> float:
        action()
        start = perf_counter()
        for _ in repeat(None, repeats):
            action()
        return (perf_counter() - start) / repeats


WALL = WallClock()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Within the block the calling thread stays on one core, where the system can do that; for one-thread figures."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})  # interrupts rather go to the first
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def interleaved(actions: Mapping[str, Callable[[], Any]], pace: Pace, clock: Clock = WALL) -> dict[str, Timing]:
    """Times every action once a round, after a warm-up of each.

    Each round has an order of its own: what a peer finds in the caches, and how warm the memory is that it gets for
    its result, depends on who came before, by up to a fifth on large maps.
    """
    repeats = {name: _warm_up(action, pace, clock) for name, action in actions.items()}
    round_seconds = sum(clock.sample(action, repeats[name]) * repeats[name] for name, action in actions.items())
    rounds = min(max(pace.least_rounds, int(pace.seconds / round_seconds)), pace.most_rounds)
    samples: dict[str, list[float]] = {name: [] for name in actions}
    shuffle = random.Random(0).shuffle
    order = list(actions)
    with _no_garbage_collection():
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(clock.sample(actions[name], repeats[name]))
    return {name: _summary(samples[name], repeats[name]) for name in actions}


def _warm_up(action: Callable[[], Any], pace: Pace, clock: Clock) -> int:
    """Runs the action for a while; returns how many calls make a sample of MIN_SAMPLE or more."""
    start, calls, repeats = perf_counter(), 0, 1
    while calls < 3 or perf_counter() - start < pace.warm_up:
        seconds = clock.sample(action, repeats) * repeats
        calls += repeats
        if seconds < MIN_SAMPLE:
            repeats *= 2
    return repeats


def _summary(samples: list[float], repeats: int) -> Timing:
    lower, middle, upper = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(middle, lower, upper, len(samples), repeats)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
