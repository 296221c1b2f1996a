"""The demo's figures: the verdict, the table, the JSON file and the plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from .training import Agreement

T = TypeVar("T")

MIB = 2**20

# Same weights, same images: the largest difference of logits, relative to the largest logit.
LOGIT_LIMIT, REDUCED_LOGIT_LIMIT = 1e-4, 1e-1
# The gradient may be off by so many times the reference's own error, and by GRADIENT_FLOOR in any case: batch
# statistics of small maps are ill-conditioned, and one activation that rounds to the other side of zero can cost
# either network a few percent.
GRADIENT_FACTOR, GRADIENT_FLOOR = 3.0, 0.05
ACCURACY_LIMIT = 0.02


@dataclass(frozen=True)
class Pair(Generic[T]):
    """One figure of the reference network and of the fused one."""

    reference: T
    fused: T


@dataclass(frozen=True)
class Result:
    """Everything the demo measured. Losses are mean cross-entropies, accuracies lie between 0 and 1."""

    step_loss: Pair[list[float]]
    test_accuracy: Pair[list[float]]  # after each epoch
    test_images: int
    agreement: Agreement
    reduced_precision: bool
    paths: dict[str, int]  # backend -> number of fused units it runs
    batch_size: int
    step_ms: Pair[float]
    latency_ms: dict[int, Pair[float]]  # batch -> ms
    saved_bytes: Pair[int]

    @property
    def accuracy_limit(self) -> float:
        """Two points, or on a small test set two standard errors of the difference of two accuracies.

        Rounding differences grow along a training, so that the two networks end with different weights.
        """
        mean = (self.test_accuracy.reference[-1] + self.test_accuracy.fused[-1]) / 2
        return max(ACCURACY_LIMIT, 2 * sqrt(2 * mean * (1 - mean) / self.test_images))

    @property
    def disagreements(self) -> list[str]:
        """What contradicts a drop-in pair, in words; empty if nothing does. A figure that is not a number does."""
        seen = self.agreement
        logit_limit = REDUCED_LOGIT_LIMIT if self.reduced_precision else LOGIT_LIMIT
        gradient_limit = max(GRADIENT_FACTOR * seen.reference_gradient_error, GRADIENT_FLOOR)
        gap = abs(self.test_accuracy.fused[-1] - self.test_accuracy.reference[-1])
        problems = []
        if not seen.relative_logit_difference <= logit_limit:
            problems.append(
                f"with equal weights the logits differ by up to {seen.logit_difference:.2g}, "
                f"{seen.relative_logit_difference:.2g} of the largest (limit {logit_limit:g})"
            )
        if not seen.fused_gradient_error <= gradient_limit:
            problems.append(
                f"with equal weights the fused gradients are off by {seen.fused_gradient_error:.2g} of their norm "
                f"(limit {gradient_limit:.2g})"
            )
        if not gap <= self.accuracy_limit:
            problems.append(f"accuracies are {100 * gap:.1f} points apart (limit {100 * self.accuracy_limit:.1f})")
        return problems


def show(console: Console, result: Result, out: Path) -> None:
    """Prints the table, which path the fused units took, the verdict and the files written."""
    console.print(_table(result))
    paths = ", ".join(f"{count} on {name}" for name, count in result.paths.items())
    console.print(f"Fused units: {sum(result.paths.values())} ({paths})", highlight=False)
    if set(result.paths) == {"reference"}:
        console.print("[yellow]No fused kernel ran, so the times compare equal work: see python -m fif_ops info.[/]")
    if result.disagreements:
        console.print(f"[bold red]The networks disagree:[/] {'; '.join(result.disagreements)}.", highlight=False)
    else:
        console.print("[bold green]The networks agree[/] within the limits for outputs, gradients and accuracy.")
    console.print(f"Written: {out / 'demo.png'}, {out / 'demo.json'}", highlight=False, soft_wrap=True)


def write_json(path: Path, result: Result, record: dict[str, Any]) -> None:
    """Writes all figures, with ``record`` (settings, machine, versions, data) beside them."""
    facts = asdict(result) | {
        "agrees": not result.disagreements,
        "disagreements": result.disagreements,
        "relative_logit_difference": result.agreement.relative_logit_difference,
        "accuracy_limit": result.accuracy_limit,
        "speed_up": {"training_step": ratio(result.step_ms)}
        | {f"inference_batch_{count}": ratio(pair) for count, pair in result.latency_ms.items()},
        "saved_bytes_ratio": ratio(result.saved_bytes),
    }
    path.write_text(json.dumps(record | {"result": facts}, indent=2, default=str) + "\n")


def ratio(pair: Pair[float] | Pair[int]) -> float:
    """How many times as much the reference needs."""
    return pair.reference / pair.fused


def recent_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values (fewer at the start) at each position."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in range(1, len(sums))]


def _table(result: Result) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in ("reference", "fused", "comparison"):
        table.add_column(heading, justify="right", no_wrap=True)
    accuracy, seen = Pair(result.test_accuracy.reference[-1], result.test_accuracy.fused[-1]), result.agreement
    losses = [recent_mean(values, 20)[-1] for values in (result.step_loss.reference, result.step_loss.fused)]
    table.add_row(
        f"test accuracy ({result.test_images} images)",
        f"{accuracy.reference:.1%}",
        f"{accuracy.fused:.1%}",
        f"{100 * (accuracy.fused - accuracy.reference):+.1f} points",
    )
    table.add_row("training loss, last 20 steps", *(f"{loss:.4f}" for loss in losses), f"{losses[1] - losses[0]:+.4f}")
    table.add_section()
    table.add_row("with the same weights in both")
    table.add_row("  logits, largest", f"{seen.logit_scale:.2f}", "", f"at most {seen.logit_difference:.1e} off")
    table.add_row("  predictions", "", "", f"{seen.same_predictions} of {result.test_images} equal")
    errors = (seen.reference_gradient_error, seen.fused_gradient_error)
    table.add_row("  error of gradients", *(f"{error:.1e}" for error in errors), "against float64")
    table.add_section()
    table.add_row(f"training step, batch {result.batch_size}, ms", *_times(result.step_ms))
    for count, pair in result.latency_ms.items():
        table.add_row(f"inference, batch {count}, ms", *_times(pair))
    saved = (f"{number / MIB:.1f}" for number in (result.saved_bytes.reference, result.saved_bytes.fused))
    table.add_row("saved for backward, MiB", *saved, f"{ratio(result.saved_bytes):.2f}x smaller")
    return table


def _times(pair: Pair[float]) -> tuple[str, str, str]:
    speed_up = ratio(pair)
    verdict = f"{speed_up:.2f}x faster" if speed_up >= 1 else f"{1 / speed_up:.2f}x slower"
    return f"{pair.reference:.2f}", f"{pair.fused:.2f}", verdict
