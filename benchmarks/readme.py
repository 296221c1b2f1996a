"""The README's table of speed, drawn from the committed figures, so that the two cannot differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from .report import Column, describe, row
from .scaling import thread_ratio

BEGIN, END = "<!-- speed: written by python -m benchmarks.report --readme -->", "<!-- end of speed -->"
IDLE_LOAD = 0.5
BEST = Column("best")
NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "litert": "LiteRT", "aoti": "AOTInductor"}


class Line(NamedTuple):
    """A row of the table: the tasks of a suite, and which rivals count."""

    text: str
    suite: str
    column: Column = BEST
    rivals: str = "all"


LINES = (
    Line("inference", "inference"),
    Line("inference, NCHW", "inference", Column("", channels_last=False), "all fed NCHW"),
    Line("inference, channels_last", "inference", Column("", channels_last=True), "all fed NHWC"),
    Line("inference, bfloat16, channels_last", "inference bf16"),
    Line("inference, 3x3 primary convolution", "spatial"),
    Line("forward and backward", "training"),
    Line("HWNet 1.0, one image of 224x224", "network"),
    Line("HWNet 1.0, training step on 128 images of 32x32, two threads", "network training"),
    Line("a call on 2x2 maps", "host", Column("", family="eager"), "eager"),
)


def table(suites: dict[str, list[dict]], machine: dict[str, Any], written: Path) -> str:
    """The section's measured part, in Markdown. ``written``: the JSON file, as the README links to it."""
    links = ", ".join(
        f"[{text}]({written.with_name(name)})"
        for text, name in (
            ("all shapes", f"{written.stem}.png"),
            ("scaling", f"{written.stem}-scaling.png"),
            ("figures", written.name),
        )
    )
    lines = [
        f"{describe(machine)}, {machine.get('date', 'date unknown')}{_caveat(machine)} ({links}). "
        "How much longer the best rival takes than the fused unit (geometric mean, least), frozen and live weights:",
        "",
        "| float32 unless said, one core unless said | tasks | rivals | frozen | live |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(line, suites[line.suite]) for line in LINES if line.suite in suites]
    for suite, text in (("threads", "inference"), ("threads training", "forward and backward")):
        if suite in suites:
            ratios = {r["task"]: thread_ratio(r) for r in suites[suite]}
            least = min(ratios, key=lambda task: ratios[task])
            mean = geometric_mean(ratios.values())
            lines.append(
                f"| two threads, {text} | {len(ratios)} | itself with one thread "
                f"| | {mean:.2f}, {ratios[least]:.2f} ({least}) |"
            )
    return "\n".join(lines)


def update(readme: Path, text: str) -> None:
    """Puts ``text`` between the README's two marks. Raises ValueError if they are not there."""
    content = readme.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{readme} must have these two lines once each: {BEGIN} and {END}")
    head, rest = content.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def _row(line: Line, records: Sequence[dict]) -> str:
    live, frozen = (_ratios(line.column._replace(live=live), records) for live in (True, False))
    # Where nothing was frozen, both are the same.
    cells = ["" if frozen == live else _cell(frozen), _cell(live)]
    count = f"{len(live)}" if len(live) == len(records) else f"{len(live)} of {len(records)}"
    return f"| {line.text} | {count} | {line.rivals} |" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _ratios(column: Column, records: Sequence[dict]) -> dict[str, tuple[float, str]]:
    """Ratio and fastest rival of every task."""
    found = {}
    for record in records:
        ratio = row(record, [column]).ratios[0]
        if ratio is not None:
            found[record["task"]] = ratio, _rival(record, column)
    return found


def _cell(found: dict[str, tuple[float, str]]) -> str:
    if not found:
        return ""
    task = min(found, key=lambda name: found[name][0])
    least, rival = found[task]
    mean = geometric_mean([ratio for ratio, _ in found.values()])
    return f"{mean:.2f}, {least:.2f} ({task}, {rival})"


def _rival(record: dict, column: Column) -> str:
    name, _ = column.fastest(record["peers"]) or ("", 0.0)
    family, _, layout = name.rpartition(" ")
    return f"{NAMES.get(family, family)} {layout.upper()}"


def _caveat(machine: dict[str, Any]) -> str:
    quick = ", few shapes only" if machine.get("quick") else ""
    load = machine.get("load", 0.0)
    return quick + (f", **the machine not idle** (load {load})" if load > IDLE_LOAD else "")
