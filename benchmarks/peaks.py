"""What the processor can do at most, as far as torch shows it: the floor under every time is drawn from these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch

from . import timing

ATTEMPTS = 30
KIB = 1024


def measure_peaks() -> dict[str, Any]:
    """Of one core: operations per second by dtype, and bytes per second of a copy by the size of what it moves.

    The best of many attempts: a floor must be what the machine can do when nothing disturbs it.
    """
    with timing.threads(1), timing.pinned(), torch.inference_mode():
        flops = {str(dtype).removeprefix("torch."): _flops(dtype) for dtype in (torch.float32, torch.bfloat16)}
        return {
            "flops": flops,
            "bandwidth": {str(KIB * n): _bandwidth(KIB * n) for n in (64, 512, 4096, 32768, 131072)},
        }


def _flops(dtype: torch.dtype) -> float:
    """Of large products and 1x1 convolutions, which are different libraries' work; the better one."""
    rates = []
    for size in (256, 512, 1024):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / _least_seconds(lambda a=a, b=b: torch.mm(a, b)))
        x = torch.randn(1, size // 2, 28, 28).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(size // 2, size // 2, 1, 1).to(dtype)
        products = 2 * (size // 2) ** 2 * 28 * 28
        rates.append(products / _least_seconds(lambda x=x, weight=weight: torch.conv2d(x, weight)))
    return max(rates)


def _bandwidth(size: int) -> float:
    """Of a copy that reads half of the bytes and writes the other half."""
    source = torch.randn(size // 8)
    target = torch.empty_like(source)
    return size / _least_seconds(lambda: target.copy_(source))


def _least_seconds(action: Callable[[], Any]) -> float:
    least = float("inf")
    for _ in range(ATTEMPTS):
        start = perf_counter()
        action()
        least = min(least, perf_counter() - start)
    return least


def floor_seconds(record: dict[str, Any], peaks: dict[str, Any]) -> float:
    """The time below which a record's unit cannot be: its arithmetic or its bytes, whichever takes longer."""
    work, rates = record["work"], peaks["bandwidth"]
    nearest = min(rates, key=lambda size: abs(math.log(int(size) / work["bytes"])))
    return max(work["flops"] / peaks["flops"][record["dtype"]], work["bytes"] / rates[nearest])


def raised(peaks: dict[str, Any], records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The peaks, raised to what any contender reached, since torch's own products need not be the fastest."""
    flops = dict(peaks["flops"])
    for record in records:
        least = min((peer["median"] for peer in record["peers"].values()), default=math.inf)
        flops[record["dtype"]] = max(flops[record["dtype"]], record["work"]["flops"] / least)
    return peaks | {"flops": flops}
