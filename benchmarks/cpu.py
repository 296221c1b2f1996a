"""The processor's benchmark: all that the README says of speed, measured in at most 20 minutes.

Run it as ``python -m benchmarks.cpu [--output FILE.json] [--minutes N] [--only SUITE,...] [--quick]``; then
``benchmarks.report`` draws tables and plots from the file. The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fif_ops import FeatureAugment, __version__, info, ops

from . import timing
from .peaks import measure_peaks
from .peers import PEERS, Peer, Step
from .precision import BF16
from .race import Race
from .shapes import HOST_SHAPE, QUICK_SHAPES, SHAPES, Shape, Task, network_task, unit_task

OUTPUT = Path(__file__).with_name("results") / "cpu.json"
LIMIT = 20.0  # minutes
COMPILED = ("compile", "aoti")  # families whose preparation takes most of the time, and which go if it runs short
SECONDS_AN_ITEM = 3.0  # what one takes without them, about
UNIT_PACE = timing.Pace(0.8, 9, 151, 0.04)
NETWORK_PACE = timing.Pace(4.0, 7, 101, 0.2)

RUNTIMES = ("onnxruntime", "openvino", "litert")
INFERENCE = ("fused", "frozen", "eager", "compile", *RUNTIMES)
CHANNELS_LAST = ("fused nhwc", "frozen nhwc", "eager nhwc", "compile nhwc", "openvino nhwc")
CURVES = ("fused", "frozen", "eager nhwc", "onnxruntime", "openvino nhwc", "litert")
# AOTInductor runs the kernels that compile runs, with less to do at each call, and takes 10 s to compile a unit: on
# these only, and in the layout in which compile is faster.
AOTI = ("aoti nhwc",)
AHEAD = (Shape(16, 8, 112), Shape(64, 32, 28), Shape(80, 92, 14), Shape(80, 92, 14, batch=16))
SPATIAL = tuple(Shape(*sizes, kernel_size=3) for sizes in ((16, 16, 56), (32, 32, 28), (64, 64, 14), (64, 64, 14, 16)))


class Item(NamedTuple):
    """One race: ``peers`` are names and families; ``axis`` is what varies along a curve.

    ``compiling``: seconds that the compiled ones among the peers need beforehand, about, on two cores.
    """

    suite: str
    task: Callable[[], Task]
    peers: tuple[str, ...]
    threads: int = 1
    pace: timing.Pace = UNIT_PACE
    axis: int | None = None
    compiling: float = 0.0


def items(quick: bool = False) -> list[Item]:
    """Everything; what compiles longest comes last, where it is left out if time runs short."""
    shapes = QUICK_SHAPES if quick else SHAPES
    spatial = SPATIAL[1:2] if quick else SPATIAL
    network = partial(network_task, 224, 1)
    step = partial(network_task, 32, 16 if quick else 128, training=True)
    found = [Item("inference", partial(unit_task, s), INFERENCE + AOTI * (s in AHEAD), compiling=6.0) for s in shapes]
    found += [Item("network", network, INFERENCE, pace=NETWORK_PACE, compiling=80.0)]
    found += [Item("host", partial(unit_task, HOST_SHAPE), ("fused", "frozen", "eager", *RUNTIMES))]
    found += [Item("host", partial(unit_task, HOST_SHAPE, training=True), ("fused", "eager"))]
    found += [Item("spatial", partial(unit_task, s), ("fused", "frozen", "eager", *RUNTIMES)) for s in spatial]
    bf16 = partial(unit_task, precision=BF16)
    found += [Item("inference bf16", partial(bf16, s), CHANNELS_LAST, compiling=3.0) for s in shapes]
    for training in (False, True):
        suite = "threads training" if training else "threads"
        found += [Item(suite, partial(unit_task, s, training), ("1 thread", "2 threads"), 2) for s in shapes]
    found += _curves(quick)
    # Compiling a network's training step takes minutes: in the layout alone in which eager is faster.
    peers = ("fused", "eager", "compile nhwc")
    found += [Item("network training", step, peers, 2, NETWORK_PACE, compiling=180.0)]
    train = partial(unit_task, training=True)
    found += [Item("training", partial(train, s), ("fused", "eager", "compile"), compiling=12.0) for s in shapes]
    return found


def _curves(quick: bool) -> list[Item]:
    """Time against batch, resolution and width, from the shape in the middle of all."""
    values = {
        "batch": {n: Shape(64, 32, 28, n) for n in (1, 2, 4, 8, 16, 32)},
        "resolution": {n: Shape(64, 32, n) for n in (7, 14, 28, 56, 112)},
        "width": {n: Shape(n, n // 2, 28) for n in (16, 32, 64, 128, 256)},
    }
    return [
        Item(suite, partial(unit_task, shape), CURVES, axis=value)
        for suite, shapes in values.items()
        for value, shape in list(shapes.items())[: 2 if quick else None]
    ]


class _AtThreads:
    """A step that runs with so many threads. Asking costs 0.1 us, which both sides of the comparison pay."""

    def __init__(self, step: Step, threads: int) -> None:
        self.step, self.threads = step, threads

    def __call__(self) -> Any:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return self.step()


def _threaded() -> Iterator[Peer]:
    """The fused unit with one and two threads, to be compared with itself."""
    for peer in PEERS.values():
        for family, threads in (("1 thread", 1), ("2 threads", 2)) if peer.family == "fused" else ():

            def make(task: Task, peer: Peer = peer, threads: int = threads) -> Step:
                return _AtThreads(peer.make(task), threads)

            yield peer._replace(name=f"{peer.name} {family}", family=family, make=make)


def candidates(item: Item) -> list[Peer]:
    """The item's peers, in the registry's order."""
    return [peer for peer in (*PEERS.values(), *_threaded()) if {peer.name, peer.family} & set(item.peers)]


def work(task: Task) -> dict[str, int] | None:
    """The arithmetic of a unit, and the bytes that any way to compute it moves at least; None for networks.

    A training step has three convolutions for every one of inference. It reads the input for the forward pass and for
    the backward pass, and the result's gradient; it writes the result and the input's gradient.
    """
    unit, x = task.module, task.x
    if not isinstance(unit, FeatureAugment):
        return None
    height, width = unit.output_size(*x.shape[2:])
    given, made = x.numel(), x.shape[0] * unit.out_channels * height * width
    flops = 2 * x.shape[0] * unit.mac_count(*x.shape[2:])
    elements = 3 * given + 2 * made if task.training else given + made
    return {"flops": 3 * flops if task.training else flops, "bytes": elements * x.element_size()}


def run_item(item: Item, peers: Sequence[Peer]) -> dict[str, Any]:
    """The item's record. A peer that fails or is wrong is not timed, and is named in ``failed``."""
    start = time.perf_counter()
    with timing.threads(item.threads):
        task = item.task()
        race = Race(task, peers, strict=False)
        if race.steps:
            torch.set_num_threads(item.threads)  # which a step may have changed
            race.time(item.pace)
        record = race.record(item.suite) | {"threads": item.threads, "axis": item.axis, "work": work(task)}
    return record | {"seconds": time.perf_counter() - start}


def run(chosen: Sequence[Item], minutes: float, progress: Progress) -> Iterator[dict[str, Any]]:
    """Records, one by one; whatever has no time left is left out, compiled peers first."""
    end = time.monotonic() + 60 * minutes
    bar = progress.add_task("", total=len(chosen))
    for index, item in enumerate(chosen):
        left = end - time.monotonic()
        if left < 0:
            progress.console.print(f"[yellow]No time left for {len(chosen) - index} of {len(chosen)} measurements.[/]")
            return
        peers = candidates(item)
        late = left < item.compiling + SECONDS_AN_ITEM * (len(chosen) - index)
        dropped = {
            peer.name: f"no time left of {minutes:g} minutes" for peer in peers if late and peer.family in COMPILED
        }
        progress.update(bar, description=f"{item.suite} {item.axis or ''}")
        record = run_item(item, [peer for peer in peers if peer.name not in dropped])
        record["skipped"] |= dropped
        progress.advance(bar)
        yield record


def machine() -> dict[str, Any]:
    """The machine, what it was doing, and the versions of everything measured."""
    versions = {}
    for name in ("onnxruntime", "openvino", "ai-edge-litert"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return info.machine() | {
        "threads": 1,
        "instruction_set": ops.CPU_ISA,
        "torch": torch.__version__,
        "fif_ops": __version__,
        "peers": versions,
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),  # of the minute before
    }


def rounded(value: Any) -> Any:
    """The same with four digits of every fraction, which is more than is measured."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, one line for each record, so that a change of one is a change of a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in content.items() if key != "records"}
    lines = ",\n".join(json.dumps(rounded(record)) for record in content["records"])
    path.write_text(f'{json.dumps(rounded(head), indent=1)[:-2]},\n "records": [\n{lines}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a fused result was wrong."""
    suites = list(dict.fromkeys(item.suite for item in items()))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="All benchmarks of the processor.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=LIMIT, help="at most so long (default: %(default)g)")
    parser.add_argument("--only", default=",".join(suites), help="suites, with commas: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few shapes: for a first look only")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(suites)):
        parser.error(f"--only: no suite is called {', '.join(unknown)}; must be some of {', '.join(suites)}")
    start = time.monotonic()
    content: dict[str, Any] = {"machine": machine() | {"quick": options.quick}, "records": []}
    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        content["machine"]["peaks"] = measure_peaks()
        for record in run([item for item in items(options.quick) if item.suite in wanted], options.minutes, progress):
            content["records"].append(record)
            for name, why in record["failed"].items():
                progress.console.print(f"[red]{record['task']}: {name}[/]: {why}", highlight=False)
            content["seconds"] = time.monotonic() - start
            write(options.output, content)
    wrong = [
        r["task"]
        for r in content["records"]
        if any(n.startswith("fused") and "WrongResult" in w for n, w in r["failed"].items())
    ]
    if wrong:
        console.print(f"[bold red]The fused unit is wrong on {', '.join(wrong)}.[/]", highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
