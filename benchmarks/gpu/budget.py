"""Seconds for each part, and what is left of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

TOTAL = 480.0
# Shares of the time: what a part leaves over goes to those after it.
SECONDS = {"build": 100.0, "correctness": 110.0, "inference": 100.0, "training": 90.0, "networks": 60.0, "report": 15.0}


class Schedule(NamedTuple):
    """When each of the chosen parts must have ended, on ``time.time``'s clock."""

    deadlines: dict[str, float]

    def left(self, part: str) -> float:
        """Seconds that the part still has."""
        return self.deadlines[part] - time.time()


def schedule(parts: Sequence[str], total: float = TOTAL) -> Schedule:
    """From now on; a part may use what those before it leave over, and never the time of those after it."""
    scale = total / sum(SECONDS[part] for part in parts)
    end, deadlines = time.time() + total, {}
    for part in reversed(parts):
        deadlines[part] = end
        end -= SECONDS[part] * scale
    return Schedule(deadlines)


def say(message: str) -> None:
    """A line of progress, at once."""
    print(message, flush=True)
