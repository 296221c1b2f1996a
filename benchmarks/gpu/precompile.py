"""Compiles the compiled peers' kernels into torch's cache on disk, in some processes beside the correctness suite.

Nothing is timed here, and kernels whose choice depends on timing (the compiler's thorough mode) are left to the race.
Run by the command: ``python -m benchmarks.gpu.precompile NUMBER COUNT --deadline SECONDS``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence

import torch

from . import budget
from .device import Device, open_device
from .items import PARTS, Item, items
from .peers import registry

COMPILED = ("compile nhwc", "compile nchw", "fused compile nhwc")
WORKERS = 6


def pairs(device: Device, quick: bool) -> Iterator[tuple[Item, str]]:
    """What there is to compile, networks first, since they take longest."""
    for part in reversed(PARTS):
        for item in items(part, quick, dry=device.device.type == "cpu"):
            for name in COMPILED:
                if name in item.peers:
                    yield item, name


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.precompile")
    parser.add_argument("number", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = open_device(options.device)
    peers, done = registry(device), 0
    for item, name in list(pairs(device, options.quick))[options.number :: options.count]:
        if time.time() > options.deadline:
            break
        torch.compiler.reset()
        try:
            task = item.task(str(device.device))
            with torch.inference_mode(not task.training), task.precision.switched(device.device):
                peers[name].make(task)()
            device.synchronize()
            done += 1
        except Exception as error:  # the race will say it again, where it counts
            budget.say(f"  precompile {item.key} {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    budget.say(f"  precompiled {done} graphs (process {options.number})")


if __name__ == "__main__":
    main()
