"""Plots of the fused unit's time against threads and sizes, and of how near to the processor's floor it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from .peaks import floor_seconds, raised
from .report import COLOURS, INK, TICKS, Column, colour_of, describe

OURS = {"fused": "#dc2626", "frozen": "#111827"}
SIZES = {
    "batch": "batch, of 64-32@28",
    "resolution": "pixels along an edge, of 64-32 b1",
    "width": "channels C, of C-C/2@28 b1",
}
THREADS = {"threads": "inference", "threads training": "forward and backward"}
FLOORS = {"inference": "inference", "inference bf16": "inference, bfloat16", "training": "forward and backward"}


def thread_ratio(record: dict) -> float:
    """Time with one thread over time with two, the worse of the layouts."""
    peers = record["peers"]
    layouts = [name.removesuffix(" 1 thread") for name in peers if name.endswith(" 1 thread")]
    return min(peers[f"{name} 1 thread"]["median"] / peers[f"{name} 2 threads"]["median"] for name in layouts)


def plot(path: Path, suites: dict[str, list[dict]], machine: dict[str, Any]) -> None:
    """Draws whatever of threads, sizes and floors there are figures for."""
    figure = Figure(figsize=(16, 11), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle("Scaling of the fused unit", fontsize=14, fontweight="bold", color=INK)
    panels = figure.subplot_mosaic([["threads", "floor", name] for name in SIZES], width_ratios=[1, 1, 1.1])
    _draw_threads(panels["threads"], suites)
    _draw_floors(panels["floor"], suites, machine)
    for suite, label in SIZES.items():
        _draw_curve(panels[suite], suites.get(suite, []), label)
    figure.supxlabel(describe(machine), fontsize=8.5, color="#6b7280")
    figure.savefig(path)


def _draw_threads(axes: Axes, suites: dict[str, list[dict]]) -> None:
    _dots(axes, {label: suites.get(suite, []) for suite, label in THREADS.items()}, thread_ratio)
    axes.axvline(1, color="#b91c1c", linewidth=1.2)
    axes.set_title("Two threads against one: times faster (worse layout)", loc="left", fontsize=11, color=INK)


def _draw_floors(axes: Axes, suites: dict[str, list[dict]], machine: dict[str, Any]) -> None:
    peaks = raised(machine["peaks"], [record for suite in FLOORS for record in suites.get(suite, [])])

    def share(record: dict) -> float:
        ours = Column("").ours(record["peers"])
        return floor_seconds(record, peaks) / ours if ours else float("nan")

    _dots(axes, {label: suites.get(suite, []) for suite, label in FLOORS.items()}, share)
    flops = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in peaks["flops"].items())
    axes.set_title(f"Share of the floor (peaks: {flops} GFLOP/s)", loc="left", fontsize=11, color=INK)


def _dots(axes: Axes, groups: dict[str, Sequence[dict]], figure_of: Callable[[dict], float]) -> None:
    """A row for each task, a dot for each group."""
    tasks: dict[str, int] = {}
    for colour, (label, records) in zip(COLOURS[1:], groups.items(), strict=False):
        values = {record["task"].removesuffix(" training"): figure_of(record) for record in records}
        values = {task: value for task, value in values.items() if value == value}  # noqa: PLR0124 - not NaN
        if not values:
            continue
        places = [tasks.setdefault(task, len(tasks)) for task in values]
        mean = geometric_mean(values.values())
        axes.plot(list(values.values()), places, "o", color=colour, label=f"{label} (geometric mean {mean:.2f})")
    axes.set_yticks(range(len(tasks)), list(tasks), fontsize=9)
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _finish(axes)
    if tasks:
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.03))


def _draw_curve(axes: Axes, records: Sequence[dict], label: str) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in records:
        for name, peer in record["peers"].items():
            lines.setdefault((name, peer["family"]), []).append((record["axis"], peer["median"] * 1e6))
    for index, ((name, family), points) in enumerate(lines.items()):
        ours = family in OURS
        colour, style = OURS.get(family) or colour_of(family, index), "--" if ours and name.endswith("nchw") else "-"
        axes.plot(*zip(*points, strict=True), f"o{style}", color=colour, linewidth=2 if ours else 1.2, label=name)
    axes.set(xscale="log", yscale="log", ylabel="microseconds")
    axes.set_xlabel(label)
    if records:
        axes.xaxis.set_major_locator(FixedLocator([record["axis"] for record in records]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(frameon=False, fontsize=8)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(color="#d1d5db", linewidth=0.6, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
