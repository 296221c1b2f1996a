"""Pictures of a run: speed-ups in the manner of the other benchmarks, and shares of the copy bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..report import COLOURS, INK, describe
from ..report import plot as plot_speed_ups

GROUPS = ("inference", "training", "networks")
Suites = dict[str, list[dict[str, Any]]]


def write(by_suite: Suites, result: dict[str, Any], output: Path) -> list[Path]:
    """Draws all that there are figures for; returns the files. Training has no share: its least bytes are a bound."""
    machine = result["machine_info"]["fif_ops"]
    written = []
    for group in GROUPS:
        chosen = {
            name: compared
            for name, held in by_suite.items()
            if name.startswith(group) and (compared := _compared(held))
        }
        if chosen:
            written.append(output / f"gpu-{group}.png")
            plot_speed_ups(written[-1], chosen, machine)
    full = {name: records for name, records in by_suite.items() if name.startswith("inference ") and " of " not in name}
    shares = {name: held for name, records in full.items() if (held := _shares(records))}
    if shares:
        written.append(output / "gpu-bandwidth.png")
        _plot_shares(written[-1], shares, machine)
    return written


def _compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records in which the fused unit and some rival were measured."""
    families = [{peer["family"] for peer in record["peers"].values()} for record in records]
    return [record for record, held in zip(records, families, strict=True) if "fused" in held and len(held) > 1]


def _shares(records: list[dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """Task, and the share of each family's better layout."""
    found = []
    for record in records:
        best: dict[str, float] = {}
        for peer in record["peers"].values():
            if "bandwidth_share" in peer:
                best[peer["family"]] = max(best.get(peer["family"], 0.0), peer["bandwidth_share"])
        if best:
            found.append((record["task"], best))
    return found


def _plot_shares(path: Path, shares: dict[str, list[tuple[str, dict[str, float]]]], machine: dict[str, Any]) -> None:
    heights = [len(rows) + 2.5 for rows in shares.values()]
    figure = Figure(figsize=(10, 0.26 * sum(heights) + 1.2), dpi=110, layout="constrained", facecolor="white")
    figure.suptitle("Share of the copy bandwidth: least bytes over time", fontsize=14, fontweight="bold", color=INK)
    panels = figure.subplots(len(shares), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (suite, rows) in zip(panels, shares.items(), strict=True):
        for index, family in enumerate(dict.fromkeys(family for _, best in rows for family in best)):
            points = [(best[family], place) for place, (_, best) in enumerate(rows) if family in best]
            axes.plot(*zip(*points, strict=True), "o", color=COLOURS[index % len(COLOURS)], markersize=6, label=family)
        axes.set_yticks(range(len(rows)), [task for task, _ in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.05)
        axes.set_title(suite, loc="left", fontsize=11, color=INK)
        axes.grid(color="#d1d5db", linewidth=0.6, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=True)
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.supxlabel(describe(machine), fontsize=8.5, color="#6b7280")
    figure.savefig(path)
