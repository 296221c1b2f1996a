"""The demo's picture: curves of both trainings, bars of time and memory, and a strip of test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from .data import Images, Splits
from .report import MIB, Pair, Result, ratio, recent_mean

REFERENCE, FUSED, WRONG = "#8da2b8", "#c2410c", "#b91c1c"
INK, QUIET, FAINT = "#1f2937", "#6b7280", "#d1d5db"
SHOWN, SHOWN_WRONG = 12, 4  # images in the strip, and how many of them may be wrong predictions


def save(path: Path, result: Result, splits: Splits, predictions: Tensor, title: str, footnote: str) -> None:
    """Draws ``result`` and the fused network's ``predictions`` [N] for the test images into a PNG file."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(13, 9.6), dpi=110, layout=layout, facecolor="white")
    rows: Any = figure.subfigures(5, 1, height_ratios=[0.45, 4.0, 3.1, 1.75, 0.5])
    heading, curves, bars, strip, note = rows
    heading.text(0.5, 0.4, title, ha="center", va="center", fontsize=15, fontweight="bold", color=INK)
    loss_axes, accuracy_axes = curves.subplots(1, 2)
    _draw_losses(loss_axes, result)
    _draw_accuracies(accuracy_axes, result)
    _draw_bars(bars, result)
    _draw_strip(strip, splits.test, splits.classes, predictions)
    seen = result.agreement
    explanation = (
        "Where the curves part, rounding differences have grown in the course of training. With the same weights in "
        f"both networks, logits differ by at most {seen.logit_difference:.1e} (the largest is {seen.logit_scale:.1f})."
    )
    note.text(0.5, 0.5, f"{explanation}\n{footnote}", ha="center", va="center", fontsize=9, color=QUIET)
    figure.savefig(path)


def _draw_losses(axes: Axes, result: Result) -> None:
    window = max(1, len(result.step_loss.reference) // 50)
    for values, colour, name, style in _lines(result.step_loss):
        axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.7, alpha=0.25)
        axes.plot(range(1, len(values) + 1), recent_mean(values, window), color=colour, label=name, **style)
    if min(result.step_loss.reference) > 0 and max(result.step_loss.reference) > 10 * min(result.step_loss.reference):
        axes.set_yscale("log")
    axes.set(xlabel="training step", title="Training loss (cross-entropy)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)
    axes.legend(frameon=False, loc="best")


def _draw_accuracies(axes: Axes, result: Result) -> None:
    for values, colour, name, style in _lines(result.test_accuracy):
        size = 11 if name == "reference" else 5
        label = f"{name}: {values[-1]:.1%}"
        axes.plot(range(1, len(values) + 1), values, "o-", color=colour, markersize=size, label=label, **style)
    epochs = len(result.test_accuracy.reference)
    axes.set(xlabel="epoch", title="Accuracy on the test images", xlim=(0.5, epochs + 0.5), ylim=(0, 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)
    axes.legend(frameon=False, loc="best")


def _lines(pair: Pair[list[float]]) -> list[tuple[list[float], str, str, dict]]:
    # The reference lies wide underneath, so that two curves on top of each other can both be seen.
    return [
        (pair.reference, REFERENCE, "reference", {"linewidth": 4.5}),
        (pair.fused, FUSED, "fused", {"linewidth": 1.6}),
    ]


def _draw_bars(figure: SubFigure, result: Result) -> None:
    panels = [(f"Training step, batch {result.batch_size}", "ms", result.step_ms, "faster", "slower")]
    panels += [
        (f"Inference, batch {count}", "ms", pair, "faster", "slower") for count, pair in result.latency_ms.items()
    ]
    saved = Pair(result.saved_bytes.reference / MIB, result.saved_bytes.fused / MIB)
    panels.append(("Saved for backward", "MiB", saved, "smaller", "larger"))
    for axes, (title, unit, pair, better, worse) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        bars = axes.bar(("reference", "fused"), (pair.reference, pair.fused), color=(REFERENCE, FUSED), width=0.62)
        axes.bar_label(bars, fmt=lambda height: f"{height:.3g}" if height < 1000 else f"{height:.0f}", padding=2)
        gain = ratio(pair)
        verdict = f"{gain:.2f}x {better}" if gain >= 1 else f"{1 / gain:.2f}x {worse}"
        axes.set_title(f"{title}\n", fontsize=11, color=INK)
        axes.text(0.5, 1.02, verdict, transform=axes.transAxes, ha="center", va="bottom", color=FUSED, weight="bold")
        axes.set_ylabel(unit)
        axes.margins(y=0.15)
        _finish(axes)


def _draw_strip(figure: SubFigure, images: Images, classes: Sequence[str], predictions: Tensor) -> None:
    """A random choice of test images; up to SHOWN_WRONG of the wrongly classified ones close the strip, in red."""
    order = torch.randperm(len(predictions), generator=torch.Generator().manual_seed(0))
    is_right = predictions[order] == images.labels[order]
    right, wrong = order[is_right], order[~is_right]
    right = right[: SHOWN - min(len(wrong), SHOWN_WRONG)]
    chosen = torch.cat([right, wrong[: SHOWN - len(right)]]).tolist()
    figure.suptitle(
        f"Test images with the fused network's prediction: {len(wrong)} of {len(predictions)} are wrong"
        + (" (on the right, in red)" if len(wrong) else ""),
        fontsize=11,
        color=INK,
    )
    for axes, index in zip(figure.subplots(1, SHOWN, squeeze=False)[0], chosen, strict=False):
        predicted, true = classes[int(predictions[index])], classes[int(images.labels[index])]
        axes.imshow(images.pixels[index].permute(1, 2, 0).numpy())
        label = predicted if predicted == true else f"{predicted}\n(true: {true})"
        axes.set_xlabel(label, fontsize=9, color=INK if predicted == true else WRONG)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
