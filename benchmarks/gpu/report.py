"""The table, the JSON file and the plots of a run, from its journal."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from . import budget

JSON_NAME, TABLE_NAME = "gpu-units.json", "gpu-units.txt"
# Least geometric means of ratios that are wanted: suites, column, ratio.
TARGETS = (
    (("inference fp16", "inference bf16"), "vs max", 2.5),
    (("training fp16", "training bf16"), "vs compile", 1.8),
    (("networks inference fp16",), "vs compile", 1.6),
    (("networks training fp16",), "vs compile", 1.4),
)
SHARE_TARGET, SHARE_SIZE = 0.8, 56  # of the copy bandwidth, in inference on maps of this size or more
PEAK_TARGET = 0.55  # of what eager takes
RIVALS = {
    "eager": "vs eager",
    "compile": "vs compile",
    "compile-max": "vs max",
    "eager graph": "graphs",
    "fused triton": "triton",
}
HEADS = ("task", "ours", "best", *RIVALS.values(), "share", "plan", "launches", "host us", "peak")


class Line(NamedTuple):
    """A task's figures: seconds of ours, ratios (None where a rival was not measured) and the rest as in the table."""

    task: str
    seconds: float | None
    ratios: dict[str, float | None]
    share: float | None
    plan: float | None
    launches: tuple[int | None, int | None]
    host: tuple[float | None, float | None]
    peak: float | None


def line(record: dict[str, Any]) -> Line:
    """The figures of one record: ours in its better layout against the better layout of every rival."""
    peers = record["peers"].values()

    def best(*families: str) -> dict[str, Any] | None:
        return min((p for p in peers if p["family"] in families), key=lambda p: p["median"], default=None)

    ours, rival = best("fused"), best("eager", "compile", "compile-max")
    fused_graph, eager_graph = best("fused graph"), best("eager graph")

    def ratio(theirs: dict[str, Any] | None, own: dict[str, Any] | None = ours) -> float | None:
        return None if theirs is None or own is None else theirs["median"] / own["median"]

    ratios = {title: ratio(best(family)) for family, title in RIVALS.items()}
    ratios["graphs"] = ratio(eager_graph, fused_graph)
    ratios["best"] = ratio(rival)
    eager = best("eager")

    def both(field: str) -> tuple[Any, Any]:
        return (ours or {}).get(field), (rival or {}).get(field)

    peaks = [(peer or {}).get("peak_bytes") for peer in (ours, eager)]
    return Line(
        record["task"],
        None if ours is None else ours["median"],
        ratios,
        (ours or {}).get("bandwidth_share"),
        ours["planned_bytes"] / record["minimal_bytes"] if ours and ours.get("planned_bytes") else None,
        both("launches"),
        both("host"),
        peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None,
    )


def suites(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by suite, in the order of their measurement."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["state"] == "done":
            found.setdefault(entry["record"]["suite"], []).append(entry["record"])
    return found


def table(by_suite: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of text: one table, suite by suite, with geometric means and least values."""
    rows: list[tuple[str, ...]] = [HEADS]
    for suite, records in by_suite.items():
        lines = [line(record) for record in records]
        rows += [(suite.upper(),), *(_cells(each) for each in lines)]
        for title, reduce in (("geometric mean", geometric_mean), ("least", min)):
            held = [_ratios(lines, name) for name in ("best", *RIVALS.values())]
            rows.append((f"  {title}", "", *(f"{reduce(values):.2f}" if values else "-" for values in held)))
    widths = [max(len(row[i]) for row in rows if len(row) > max(i, 1)) for i in range(len(HEADS))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _cells(figures: Line) -> tuple[str, ...]:
    def number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:{form}}"

    def pair(values: tuple[float | None, float | None], scale: float = 1.0) -> str:
        return "/".join(number(value, ".0f", scale) for value in values)

    return (
        f"  {figures.task}",
        number(figures.seconds, ".1f", 1e6),
        number(figures.ratios["best"]),
        *(number(figures.ratios[title]) for title in RIVALS.values()),
        number(figures.share, ".0%"),
        number(figures.plan, ".1f"),
        pair(figures.launches),
        pair(figures.host, 1e6),
        number(figures.peak, ".0%"),
    )


def _ratios(lines: Sequence[Line], column: str) -> list[float]:
    return [value for each in lines if (value := each.ratios[column]) is not None]


def verdicts(by_suite: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What was wanted and what was found, a line each."""
    found = []
    for names, column, wanted in TARGETS:
        for name in names:
            values = _ratios([line(record) for record in by_suite.get(name, ())], column)
            if values:
                mean = geometric_mean(values)
                found.append(f"{_mark(mean >= wanted)} {name}, {column}, geometric mean: {mean:.2f} of {wanted}")
    large: list[float] = []
    memory: list[float] = []
    for name, records in by_suite.items():
        for record in records:
            figures = line(record)
            size = int(figures.task.split("@")[1].split()[0]) if "b128" in figures.task and "@" in figures.task else 0
            if name.startswith("inference") and size >= SHARE_SIZE and figures.share is not None:
                large.append(figures.share)
            if name.startswith("training") and figures.peak is not None:
                memory.append(figures.peak)
    if large:
        found.append(
            f"{_mark(min(large) >= SHARE_TARGET)} least share of the copy bandwidth, large maps: {min(large):.0%}"
        )
    if memory:
        found.append(
            f"{_mark(max(memory) <= PEAK_TARGET)} largest peak memory in training, of eager's: {max(memory):.0%}"
        )
    return found


def _mark(met: bool) -> str:
    return "met:   " if met else "MISSED:"


def content(entries: Sequence[dict[str, Any]], quick: bool) -> dict[str, Any]:
    """What the JSON file holds; ``benchmarks.report`` reads it too."""
    machine = next((entry for entry in entries if entry["state"] == "machine"), {})
    tests = next(
        ({k: v for k, v in entry.items() if k != "state"} for entry in entries if entry["state"] == "tests"), {}
    )
    done = {entry["key"] for entry in entries if entry["state"] == "done"}
    return {
        "machine_info": {"fif_ops": machine.get("facts", {}) | {"threads": 1, "quick": quick}},
        "date": time.strftime("%Y-%m-%d"),
        "copy_bandwidth": machine.get("bandwidth"),
        "tests": tests,
        "failed": {entry["key"]: entry["reason"] for entry in entries if entry["state"] == "failed"},
        "left_out": sorted({e["key"] for e in entries if e["state"] == "left out"} - done),
        "benchmarks": [{"extra_info": record} for records in suites(entries).values() for record in records],
    }


def write(entries: Sequence[dict[str, Any]], output: Path, quick: bool) -> list[str]:
    """Writes JSON and plots and prints the table; returns what is to be complained of."""
    result, by_suite = content(entries, quick), suites(entries)
    path = output / JSON_NAME
    path.write_text(json.dumps(result, indent=1) + "\n")
    failures = [f"{key}: {why}" for key, why in result["failed"].items()]
    wrong = {
        f"{record['key']}, {peer}": why
        for records in by_suite.values()
        for record in records
        for peer, why in record["failed"].items()
    }
    # Other ways to run the fused unit may refuse.
    failures += [f"{key}: {why}" for key, why in wrong.items() if key.endswith((", fused nchw", ", fused nhwc"))]
    budget.say(f"  written: {path}")
    if by_suite:
        for drawn in _draw(by_suite, result, output):
            budget.say(f"  written: {drawn}")
        lines = "\n".join([*table(by_suite), LEGEND])
        (output / TABLE_NAME).write_text(lines + "\n")
        budget.say(f"  written: {output / TABLE_NAME}\n\n{lines}")
        budget.say("\n".join(_network_times(by_suite)))
        for key, why in wrong.items():
            budget.say(f"not measured: {key}: {why.splitlines()[0]}")
        bandwidth = result["copy_bandwidth"] or 0.0
        budget.say(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s; {len(result['left_out'])} measurements left out")
        budget.say("\n".join(verdicts(by_suite)))
    return failures


def _network_times(by_suite: dict[str, list[dict[str, Any]]]) -> list[str]:
    """All peers' times of whole networks, which are few."""
    return [
        f"{record['task']}: "
        + ", ".join(f"{name} {peer['median'] * 1e3:.2f} ms" for name, peer in record["peers"].items())
        for name, records in by_suite.items()
        if name.startswith("networks")
        for record in records
    ]


LEGEND = """
ours: microseconds of the fused unit, device time, caches cold, in its better layout. best, vs ...: median time of that
rival (in its better layout) over ours; best is of eager, compile and compile in its thorough mode (vs max); graphs:
replayed graphs, eager over ours; triton: that backend over the first. share: the least bytes that must travel, over
our time, of the copy bandwidth; plan: what the planner expects to move through the second-level cache, over those
least bytes. launches, host us: ours/best rival's. peak: memory that a training step takes at its
peak, ours of eager's."""


def _draw(by_suite: dict[str, list[dict[str, Any]]], result: dict[str, Any], output: Path) -> list[Path]:
    try:
        from . import plots
    except ImportError as error:
        budget.say(f"  no plots: {error}")
        return []
    return plots.write(by_suite, result, output)
