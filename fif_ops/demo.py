"""The main job: train HWNet on real images twice as a drop-in pair, fused and reference, and compare the two."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import FusedFiF, __version__, backends, data, explain, info, ops, plot, report, training
from .models import hwnet

NAMES = ("reference", "fused")
LATENCY_BATCHES = (1, 64)


@dataclass(frozen=True)
class Settings:
    """The demo's options; see ``python -m fif_ops demo --help``."""

    data: Path | None = None
    size: int = 32  # pixels
    limit: int | None = None
    width: float = 0.5
    epochs: int = 7
    batch_size: int = 64
    learning_rate: float = 0.05
    seed: int = 0
    rounds: int = 25
    threads: int | None = None
    channels_last: bool = False
    dtype: str = "float32"
    out: Path = Path("out")


def run(settings: Settings) -> int:
    """Runs the demo; returns 0 if both networks agree, 1 if they disagree, 2 if it cannot run."""
    console = Console()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        backends.wanted(None)  # a wrong FIF_OPS_BACKEND is best named before minutes of training
        settings.out.mkdir(parents=True, exist_ok=True)
        splits = load(settings, console)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return execute(settings, splits, console)


def load(settings: Settings, console: Console) -> data.Splits:
    """The images asked for, with a progress bar while files are decoded and one line about files left out."""
    if settings.data is None:
        return data.digits(settings.size, settings.limit)
    with progress_bar(console, "reading images") as advance:
        splits = data.class_folders(settings.data, settings.size, settings.limit, advance)
    if splits.unreadable:
        named = "; ".join(splits.unreadable[:3]) + ("; ..." if len(splits.unreadable) > 3 else "")
        print(f"warning: skipped {len(splits.unreadable)} unreadable images: {named}", file=sys.stderr)
    return splits


def execute(settings: Settings, splits: data.Splits, console: Console) -> int:
    """Trains, compares, measures and reports; returns 0 if the networks agree, else 1."""
    statistics = data.channel_statistics(splits.train.pixels)
    batches = data.training_batches(splits, statistics, settings.batch_size, settings.seed)
    tests = data.evaluation_batches(splits.test, statistics, 256)
    steps = settings.epochs * len(batches)
    summary = (
        f"HWNet {settings.width:g} on {splits.name}: {len(splits.train.labels):,} training and "
        f"{len(splits.test.labels):,} test images, {len(splits.classes)} classes, epochs: {settings.epochs}"
    )
    console.print(summary, highlight=False)
    runs = {name: start_run(settings, len(splits.classes), steps, name == "fused") for name in NAMES}
    with progress_bar(console, "training both networks", steps) as advance:
        training.train(runs, batches, tests, settings.epochs, advance)
    with console.status("comparing and measuring"):
        result = measure(settings, splits, runs, batches, tests)
        logits, _ = training.predict(runs["fused"].model, tests, runs["fused"].numerics)
    machine = info.machine()
    report.write_json(
        settings.out / "demo.json",
        result,
        {
            "settings": vars(settings),
            "machine": machine,
            "versions": versions(),
            "library": ops.library_info(),
            "data": describe(splits, statistics),
        },
    )
    footnote = (
        f"{machine['processor']}, threads: {machine['threads']}, torch {torch.__version__}, fif_ops {__version__}"
    )
    plot.save(settings.out / "demo.png", result, splits, logits.argmax(1), summary, footnote)
    report.show(console, result, settings.out)
    return 1 if result.disagreements else 0


def start_run(settings: Settings, classes: int, steps: int, fused: bool) -> training.Run:
    """A network with the first weights that the seed gives, the same fused or not, ready to train."""
    torch.manual_seed(settings.seed)
    model = hwnet(settings.width, num_classes=classes, in_size=settings.size, fused=fused)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    numerics = training.Numerics(settings.channels_last, getattr(torch, settings.dtype))
    return training.Run.start(model, steps, settings.learning_rate, numerics)


def measure(
    settings: Settings,
    splits: data.Splits,
    runs: Mapping[str, training.Run],
    batches: DataLoader,
    tests: DataLoader,
) -> report.Result:
    """All figures of the trained pair, taken on copies: the networks stay as training left them."""
    images, labels = next(iter(batches))
    images = runs["fused"].numerics.place(images)
    twin = start_run(settings, len(splits.classes), 1, fused=False)
    twin.model.load_state_dict(runs["fused"].model.state_dict())
    agreement = training.compare(runs["fused"].copy(), twin, tests, (images, labels))
    saved = {name: training.saved_bytes(run.copy(), images, labels) for name, run in runs.items()}
    copies = {name: run.copy() for name, run in runs.items()}
    steps = {name: partial(run.step, images, labels) for name, run in copies.items()}
    step_ms = training.interleaved_milliseconds(steps, settings.rounds)
    return report.Result(
        step_loss=report.Pair(*(runs[name].step_loss for name in NAMES)),
        test_accuracy=report.Pair(*(runs[name].test_accuracy for name in NAMES)),
        test_images=len(splits.test.labels),
        agreement=agreement,
        reduced_precision=settings.dtype != "float32",
        paths=units_by_backend(runs["fused"].copy(), images),
        batch_size=len(labels),
        step_ms=report.Pair(*(step_ms[name] for name in NAMES)),
        latency_ms={count: latency(runs, images, count, settings.rounds) for count in LATENCY_BATCHES},
        saved_bytes=report.Pair(*(saved[name] for name in NAMES)),
    )


def latency(runs: Mapping[str, training.Run], images: Tensor, count: int, rounds: int) -> report.Pair[float]:
    """Median ms of one forward pass of ``count`` images in evaluation mode."""
    repeated = images.repeat(-(-count // len(images)), 1, 1, 1)[:count]
    batch = [(runs["fused"].numerics.place(repeated), torch.zeros(count))]
    actions = {name: partial(training.predict, run.model, batch, run.numerics) for name, run in runs.items()}
    medians = training.interleaved_milliseconds(actions, rounds)
    return report.Pair(*(medians[name] for name in NAMES))


def units_by_backend(run: training.Run, images: Tensor) -> dict[str, int]:
    """How many fused units each backend runs when the network trains on ``images``."""
    found: Counter[str] = Counter()

    def look(unit: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[explain(cast(FusedFiF, unit), inputs[0]).backend] += 1

    for module in run.model.modules():
        if isinstance(module, FusedFiF):
            module.register_forward_pre_hook(look)
    run.model.train()
    with run.numerics.autocast():
        run.model(images)
    return dict(found)


def describe(splits: data.Splits, statistics: data.Statistics) -> dict[str, Any]:
    """The images used, for the JSON file."""
    return {
        "name": splits.name,
        "classes": splits.classes,
        "train_images": len(splits.train.labels),
        "test_images": len(splits.test.labels),
        "mean": statistics.mean.tolist(),
        "std": statistics.std.tolist(),
        "unreadable": splits.unreadable,
    }


def versions() -> dict[str, str]:
    """Versions of everything that takes part."""
    packages = ("torch", "numpy", "scikit-learn", "matplotlib", "rich", "pillow")
    found = {name: version(name) for name in packages}
    return {"fif_ops": __version__, "python": platform.python_version(), **found}


@contextmanager
def progress_bar(console: Console, label: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar with times; yields ``advance(done, total)``."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(TextColumn(label), *columns, console=console) as bar:
        task = bar.add_task(label, total=total)

        def advance(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        yield advance
