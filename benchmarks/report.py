"""Turns a file of ``python -m benchmarks.cpu`` or ``pytest benchmarks --benchmark-json=FILE`` into tables and plots.

Run it as ``python -m benchmarks.report FILE.json [--plot FILE.png] [--readme README.md]``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

if TYPE_CHECKING:  # imported where tables are printed: a machine with a GPU may have no rich
    from rich.console import Console
    from rich.table import Table

TITLES = {
    "inference": "Unit, inference",
    "training": "Unit, forward and backward",
    "host": "Unit on 2x2 maps: the time of a call",
    "network": "Whole network",
    "inference bf16": "Unit, inference in bfloat16",
    "spatial": "Unit with a 3x3 primary convolution, inference",
    "network training": "Whole network, training step, two threads",
}
# Not races against rivals, but the fused unit's time against threads and sizes: benchmarks.scaling draws these.
CURVES = ("threads", "threads training", "batch", "resolution", "width")
COLOURS = ("#8da2b8", "#0f766e", "#7c3aed", "#b45309", "#be185d", "#4d7c0f", "#1d4ed8", "#57534e")
INK = "#1f2937"
# Those of the processor's benchmarks keep their colours in all plots; others get theirs by turns.
FAMILIES = ("eager", "compile", "aoti", "onnxruntime", "openvino", "litert")
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32)


class Column(NamedTuple):
    """A ratio that tables show: the best time of a family, or of all rivals, over that of the fused unit.

    ``channels_last`` admits that layout, or the other one, alone on both sides; None takes the better layout of each.
    The fused unit is the frozen one where that was measured, since the rivals' weights are constants too; ``live`` asks
    for the one that reads its weights at every call.
    """

    title: str
    family: str | None = None
    channels_last: bool | None = None
    live: bool = False

    def fastest(self, peers: Mapping[str, dict]) -> tuple[str, float] | None:
        """Name and seconds of the fastest rival in the column."""
        rivals = {
            name: peer["median"]
            for name, peer in peers.items()
            if is_rival(peer) and self.family in (None, peer["family"]) and self._admits(peer)
        }
        return min(rivals.items(), key=lambda pair: pair[1], default=None)

    def ours(self, peers: Mapping[str, dict]) -> float | None:
        """Seconds of the fused unit, in the column's layout."""
        admitted = [peer for peer in peers.values() if self._admits(peer)]
        frozen = not self.live and any(peer["family"] == "frozen" for peer in admitted)
        family = "frozen" if frozen else "fused"
        return min((peer["median"] for peer in admitted if peer["family"] == family), default=None)

    def _admits(self, peer: dict) -> bool:
        return self.channels_last in (None, peer["channels_last"])


class Row(NamedTuple):
    """A task: seconds of the fused unit in its better layout, and a ratio for each column, None where it has none."""

    task: str
    seconds: float
    ratios: list[float | None]


def columns(records: Sequence[dict]) -> list[Column]:
    """One column for each family of rivals, then all rivals together: in any layout, and layout by layout."""
    peers = [peer for record in records for peer in record["peers"].values()]
    families = dict.fromkeys(peer["family"] for peer in peers if is_rival(peer))
    frozen = any(peer["family"] == "frozen" for peer in peers)
    return [
        *(Column(f"vs {family}", family) for family in families),
        *([Column("live vs best", live=True)] if frozen else []),
        Column("vs best"),
        Column("nchw vs best nchw", channels_last=False),
        Column("nhwc vs best nhwc", channels_last=True),
    ]


def is_rival(peer: dict) -> bool:
    """Whether a peer competes with the fused unit; not so other ways to run that, nor replayed graphs, which need
    the same of both."""
    return not peer["family"].startswith(("fused", "frozen")) and not peer["family"].endswith("graph")


def row(record: dict, wanted: Sequence[Column]) -> Row:
    """The ratios of one record (what ``extra_info`` holds)."""
    ratios: list[float | None] = []
    for column in wanted:
        theirs, ours = column.fastest(record["peers"]), column.ours(record["peers"])
        ratios.append(None if theirs is None or ours is None else theirs[1] / ours)
    ours = Column("").ours(record["peers"])
    return Row(record["task"], float("nan") if ours is None else ours, ratios)


def summaries(rows: Sequence[Row]) -> tuple[list[float | None], list[float | None]]:
    """Geometric mean and least ratio of every column."""
    held = [[ratio for ratio in ratios if ratio is not None] for ratios in zip(*(r.ratios for r in rows), strict=True)]
    return [geometric_mean(values) if values else None for values in held], [min(v, default=None) for v in held]


def load(path: Path) -> tuple[dict[str, list[dict]], dict[str, Any]]:
    """Records by suite, and the machine. Raises ValueError if the file is not one of these benchmarks."""
    try:
        content = json.loads(path.read_text())
        if "records" in content:
            records, machine = content["records"], content["machine"]
        else:
            records = [b["extra_info"] for b in content["benchmarks"] if "suite" in b["extra_info"]]
            machine = content.get("machine_info", {}).get("fif_ops", {})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no JSON file of these benchmarks ({type(error).__name__}: {error})") from None
    if not records:
        raise ValueError(f"{path} has no results: was it written by pytest benchmarks --benchmark-json={path}?")
    by_suite: dict[str, list[dict]] = {}
    for record in records:
        by_suite.setdefault(record["suite"], []).append(record)
    return by_suite, machine


def show(console: Console, suites: dict[str, list[dict]], machine: dict[str, Any]) -> None:
    """Prints the machine, a table for each suite, and what to be wary of."""
    console.print(describe(machine), highlight=False)
    for suite, records in suites.items():
        if suite not in CURVES:
            console.print(_table(TITLES.get(suite, suite), records))
    console.print(
        "Ratios: median time of the rival over that of the fused unit, taken in turns, better layout of each."
    )
    if machine.get("quick"):
        console.print("[yellow]Measured with --quick: too short to quote.[/]")
    records = [record for records in suites.values() for record in records]
    for record in records:
        if record["floor"] and not record["floor"]["met"]:
            console.print(f"[bold red]Floor missed[/]: {record['task']} is not faster than eager.", highlight=False)
    left_out = Counter(pair for record in records for pair in record["skipped"].items())
    for (name, why), count in left_out.items():
        console.print(f"Not measured: {name} ({count} of {len(records)} tasks): {why}", highlight=False)
    for record in records:
        for name, why in record.get("failed", {}).items():
            console.print(f"[red]Failed[/] on {record['task']}: {name}: {why.splitlines()[0]}", highlight=False)


def describe(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    if not machine:
        return "machine unknown"
    if "device" in machine:
        cuda = f", CUDA {machine['cuda']}, driver {machine['driver']}" if "cuda" in machine else ""
        return f"{machine['device']}{cuda}, torch {machine['torch']}, fif_ops {machine['fif_ops']}"
    peers = "".join(f", {name} {version}" for name, version in machine.get("peers", {}).items() if version)
    return (
        f"{machine['processor']}, {machine['instruction_set']}, {machine['threads']} thread(s) of {machine['cores']} "
        f"cores, torch {machine['torch']}{peers}, fif_ops {machine['fif_ops']}"
    )


def _table(title: str, records: Sequence[dict]) -> Table:
    from rich import box
    from rich.table import Table

    wanted = columns(records)
    rows = [row(record, wanted) for record in records]
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("fused", justify="right", no_wrap=True)
    for column in wanted:
        table.add_column(column.title, justify="right")
    for line in rows:
        table.add_row(line.task, _time(line.seconds), *map(_ratio, line.ratios))
    if len(rows) > 1:
        table.add_section()
        mean, least = summaries(rows)
        table.add_row("geometric mean", "", *map(_ratio, mean))
        table.add_row("least", "", *map(_ratio, least))
    return table


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value > 1 else f"[red]{value:.2f}[/]"


def races(suites: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The suites to compare in, with those of their tasks that the fused unit was measured on."""
    ours = Column("").ours
    compared = {suite: [r for r in held if ours(r["peers"])] for suite, held in suites.items() if suite not in CURVES}
    return {suite: records for suite, records in compared.items() if records}


def plot(path: Path, suites: dict[str, list[dict]], machine: dict[str, Any]) -> None:
    """Draws, for each suite, how much longer every family of rivals takes than the fused unit."""
    heights = [len(records) + 2.5 for records in suites.values()]
    figure = Figure(figsize=(10, 0.32 * sum(heights) + 1.2), dpi=110, layout="constrained", facecolor="white")
    figure.suptitle("Speed-up of the fused unit", fontsize=14, fontweight="bold", color=INK)
    panels = figure.subplots(len(suites), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (suite, records) in zip(panels, suites.items(), strict=True):
        _draw(axes, TITLES.get(suite, suite), records)
    note = " (--quick: too short to quote)" if machine.get("quick") else ""
    figure.supxlabel(f"{describe(machine)}{note}", fontsize=8.5, color="#6b7280")
    figure.savefig(path)


def _draw(axes: Axes, title: str, records: Sequence[dict]) -> None:
    families = [column for column in columns(records) if column.family]
    rows = [row(record, families) for record in records]
    places = range(len(rows))
    for index, column in enumerate(families):
        points = [(ratio, place) for place, line in enumerate(rows) if (ratio := line.ratios[index]) is not None]
        if not points:
            continue
        mean = geometric_mean([ratio for ratio, _ in points])
        colour = colour_of(column.family or "", index)
        label = f"{column.family} (geometric mean {mean:.2f})"
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=7, label=label)
    axes.axvline(1, color="#b91c1c", linewidth=1.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(labelbottom=True)
    axes.set_yticks(places, [f"{line.task}   {_time(line.seconds)}" for line in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    best = [ratio for record in records if (ratio := row(record, [Column("vs best")]).ratios[0]) is not None]
    if best:
        title += f" (against the best of all: geometric mean {geometric_mean(best):.2f}, least {min(best):.2f})"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(color="#d1d5db", linewidth=0.6, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines[1:]:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def colour_of(family: str, index: int) -> str:
    """The family's colour; by its place among those that are drawn if it has none of its own."""
    return COLOURS[(FAMILIES.index(family) if family in FAMILIES else index) % len(COLOURS)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plot of benchmarks.")
    parser.add_argument("file", type=Path, help="written by benchmarks.cpu or pytest benchmarks --benchmark-json=FILE")
    parser.add_argument("--plot", type=Path, help="PNG file; by default beside the JSON file")
    parser.add_argument("--readme", type=Path, help="rewrite the table in this file")
    options = parser.parse_args(arguments)
    try:
        suites, machine = load(options.file)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    from rich.console import Console

    from . import readme, scaling

    target = options.plot or options.file.with_suffix(".png")
    curves = target.with_name(f"{target.stem}-scaling.png")
    console = Console()
    show(console, suites, machine)
    written = []
    if compared := races(suites):
        plot(target, compared, machine)
        written.append(target)
    if "peaks" in machine:
        scaling.plot(curves, suites, machine)
        written.append(curves)
    if options.readme:
        try:
            file = options.file.resolve().relative_to(options.readme.resolve().parent)
            readme.update(options.readme, readme.table(suites, machine, file))
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        written.append(options.readme)
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
