"""``python -m fif_ops tune``: times the Triton kernels' candidate configurations on the GPU at hand, then the backends
against each other, and keeps the best.

Every shape belongs to a bucket (fif_ops/backends/triton/config.py) with a short list of candidates. Each candidate runs
the whole operator of that bucket, checked first against the composition in plain PyTorch: a wrong result is never kept.
So does each backend that can run the unit, and the fastest over all shapes of a bucket comes first from then on
(fif_ops/backends/__init__.py). Choices go to a cache file, read by later processes at their first launch.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends import tuned
from .functional import feature_augment
from .ops import ACTIVATION_CODES
from .reference import Norm, compose

FAILED = 2
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Relative L2 error against the composition in float32; tf32 is what torch's own switch allows.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 2e-2, torch.float32: 1e-4}
ACTIVATION = "silu"  # which has no kinks, on whose sides rounding may put a value
# (input channels, primary maps, side) of units of GhostNet and HWNet.
SHAPES = (
    (16, 8, 112),
    (24, 36, 56),
    (72, 12, 56),
    (64, 32, 28),
    (72, 20, 28),
    (120, 20, 28),
    (80, 92, 14),
    (184, 40, 14),
    (112, 336, 14),
    (160, 480, 7),
    (960, 80, 7),
)


class Shape(NamedTuple):
    channels: int
    maps: int
    side: int
    batch: int
    dtype: torch.dtype
    last: bool
    kernel: int = 3
    tf32: bool = False

    @property
    def name(self) -> str:
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        layout = "channels_last" if self.last else "NCHW"
        return f"{self.channels}-{self.maps}@{self.side} b{self.batch} {self.kernel}x{self.kernel} {dtype} {layout}"


class Settings(NamedTuple):
    """Options of the command."""

    batches: tuple[int, ...] = (1, 32, 128)
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    formats: tuple[str, ...] = ("channels_last", "contiguous")
    rounds: int = 20
    dry_run: bool = False


class Task(NamedTuple):
    """One operator on one shape: ``kernels`` are the buckets that decide how it runs."""

    run: Callable[[], Sequence[Tensor]]
    wanted: Sequence[Tensor]
    kernels: tuple[str, ...]


def shapes(settings: Settings) -> Iterator[Shape]:
    """All shapes to measure, in the order in which they are measured."""
    for name, layout, batch, sizes in itertools.product(settings.dtypes, settings.formats, settings.batches, SHAPES):
        yield Shape(*sizes, batch, DTYPES[name], layout == "channels_last")


class Inputs(NamedTuple):
    """Random numbers for a shape, and what plain PyTorch makes of them in float32."""

    x: Tensor
    w1: Tensor
    w2: Tensor
    norms: list[list[Tensor]]  # weight, bias, running mean and variance of each
    upstream: Tensor
    inferred: Tensor
    trained: Tensor
    gradients: Sequence[Tensor]  # of x, w1 and w2


def random_inputs(shape: Shape, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    layout = torch.channels_last if shape.last else torch.contiguous_format
    x = random(shape.batch, shape.channels, shape.side, shape.side).to(shape.dtype, memory_format=layout)
    w1 = (random(shape.maps, shape.channels, 1, 1) * shape.channels**-0.5).to(shape.dtype)
    w2 = (random(shape.maps, 1, shape.kernel, shape.kernel) / shape.kernel).to(shape.dtype)
    norms = [[*random(3, shape.maps), random(shape.maps).abs() + 0.5] for _ in range(2)]

    def composed(training: bool) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.float().requires_grad_(training) for t in (x, w1, w2)]
        given = given_norms(norms, training)
        return compose(*leaves, primary_norm=given[0], cheap_norm=given[1], activation=ACTIVATION), leaves

    made, leaves = composed(True)
    upstream = random(*made.shape).to(shape.dtype, memory_format=layout)
    gradients = torch.autograd.grad(made, leaves, upstream.float())
    return Inputs(x, w1, w2, norms, upstream, composed(False)[0].detach(), made.detach(), gradients)


def given_norms(norms: list[list[Tensor]], training: bool) -> list[Norm]:
    return [Norm(n[0], n[1], n[2], n[3], training, 0.0, 1e-5) for n in norms]


def tasks(inputs: Inputs, tf32: bool) -> list[Task]:
    """Training forward, inference and training backward of the Triton operators."""
    x, w1, w2, norms = inputs[:4]
    options = (1e-5, 1e-5, 2 * w1.shape[0], ACTIVATION_CODES[ACTIVATION], True)
    named = {"stride": 1, "groups": 1, "tf32": tf32}
    operators = torch.ops.fif_ops_triton

    def infer() -> Sequence[Tensor]:
        return (operators.infer(x, w1, w2, None, None, *norms[0], *norms[1], *options, **named),)

    def train() -> Sequence[Tensor]:
        return operators.train(x, w1, w2, None, None, *norms[0], *norms[1], *options, True, True, 0.0, 0.0, **named)

    _, raw, stats1, stats2 = train()

    def backward() -> Sequence[Tensor]:
        saved = (raw, stats1, stats2, *norms[0][:2], *norms[1][:2])
        return operators.backward(inputs.upstream, x, w1, w2, *saved, options[3], True, True, True, True, True, **named)

    # The forward of training first: it always runs the two kernels that inference may run, or fuse.
    return [
        Task(train, (inputs.trained,), ("product", "expand")),
        Task(infer, (inputs.inferred,), ("infer",)),
        Task(backward, inputs.gradients, ("cheap_backward", "primary_backward")),
    ]


def wrong(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> bool:
    """Whether any result is further off than its tolerance."""
    pairs = zip(found, wanted, strict=False)
    return any(not (a.float() - b).norm() <= tolerance * b.norm() for a, b in pairs)


def milliseconds(run: Callable[[], Any], rounds: int, flush: Tensor) -> float:
    """Median device time; ``flush`` is overwritten before each run, which empties the second-level cache."""
    times = []
    for _ in range(rounds):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(shape: Shape, inputs: Inputs, rounds: int, flush: Tensor, known: dict[str, int | str]) -> None:
    """Adds the best candidate of every bucket of this shape that is not in ``known`` yet."""
    from .backends.triton import config
    from .backends.triton.host import unit_of

    unit = unit_of(inputs.x, inputs.w1, inputs.w2, 2 * shape.maps, 4, True, 1, 1, shape.tf32)
    for task in tasks(inputs, shape.tf32):
        for kernel in task.kernels:
            bucket = config.bucket(kernel, unit)
            if bucket in known:
                continue
            times: dict[int, float] = {}
            for number in range(config.candidate_count(kernel, unit)):
                config.force(bucket, number)
                try:
                    if not wrong(task.run(), task.wanted, TOLERANCES[shape.dtype]):
                        times[number] = milliseconds(task.run, rounds, flush)
                except Exception as error:  # a candidate that this device has no room for is no candidate
                    if not _lacks_room(error):
                        raise
                finally:
                    config.force(bucket, None)
            if not times:
                raise RuntimeError(f"no configuration of {bucket!r} gives the right result for {shape.name}")
            known[bucket] = best = min(times, key=times.__getitem__)
            config.force(bucket, best)  # later buckets are measured together with this choice


def compare(shape: Shape, inputs: Inputs, rounds: int, flush: Tensor, found: dict[str, dict[str, list[float]]]) -> None:
    """Adds the times of every backend that runs this shape right, inference and a step of training, by bucket."""
    x, w1, w2 = (t.detach().requires_grad_() for t in inputs[:3])
    problem = backends.Problem(x, w1, w2, 1, 0, 1, False)

    def step(name: str, trains: bool) -> Sequence[Tensor]:
        norm1, norm2 = given_norms(inputs.norms, trains)
        with torch.set_grad_enabled(trains):
            out = feature_augment(x, w1, w2, primary_norm=norm1, cheap_norm=norm2, activation=ACTIVATION, backend=name)
        return (out, *torch.autograd.grad(out, (x, w1, w2), inputs.upstream)) if trains else (out,)

    for trains, wanted in ((False, (inputs.inferred,)), (True, (inputs.trained, *inputs.gradients))):
        times = found.setdefault(backends.bucket(problem, trains), {})
        for name in (name for name, backend in backends.BACKENDS.items() if backend.can_run(problem)):
            run = functools.partial(step, name, trains)
            if not wrong(run(), wanted, TOLERANCES[shape.dtype]):
                times.setdefault(name, []).append(milliseconds(run, rounds, flush))


def fastest(times: dict[str, list[float]]) -> str:
    """By the geometric mean, of the backends that ran all shapes."""
    shapes = max(map(len, times.values()))
    means = {name: sum(map(math.log, of)) for name, of in times.items() if len(of) == shapes}
    return min(means, key=means.__getitem__)


def _lacks_room(error: Exception) -> bool:
    return type(error).__name__ == "OutOfResources"


def run(settings: Settings) -> int:
    """Measures and saves; returns the exit status."""
    from .backends import triton as backend
    from .backends.triton import config

    every = list(shapes(settings))
    if settings.dry_run:
        print(f"{len(every)} shapes would be measured; the choices would go to {tuned.cache_path()}")
        for shape in every:
            print(f"  {shape.name}")
        return 0
    if reason := backend.Triton().unavailable():
        print(f"nothing to tune: {reason}", file=sys.stderr)
        return FAILED
    if not torch.cuda.is_available():
        print("nothing to tune: torch finds no NVIDIA GPU", file=sys.stderr)
        return FAILED
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        print("rich is missing, which tune needs for its progress: pip install 'fif_ops[demo]'", file=sys.stderr)
        return FAILED
    device = torch.device("cuda", torch.cuda.current_device())
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    known: dict[str, int | str] = {}
    times: dict[str, dict[str, list[float]]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            bar = progress.add_task("tuning", total=len(every))
            for shape in every:
                progress.update(bar, description=f"{shape.name:44}")
                inputs = random_inputs(shape, device)
                measure(shape, inputs, settings.rounds, flush, known)
                compare(shape, inputs, settings.rounds, flush, times)
                progress.advance(bar)
    finally:
        config.reset()
    numbers, names = len(known), {bucket: fastest(of) for bucket, of in times.items() if of}
    tuned.save(tuned.cache_path(), tuned.device_name(device), {**known, **names})
    print(f"{numbers} configurations and {len(names)} backends chosen for {tuned.device_name(device)}: ", end="")
    print(", ".join(f"{count} {name}" for name, count in Counter(names.values()).items()), f"({tuned.cache_path()})")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options, with the names of ``Settings``."""
    add = parser.add_argument
    add("--batches", type=int, nargs="+", metavar="N", default=Settings().batches, help="batch sizes to measure")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=Settings().dtypes, help="dtypes to measure")
    add(
        "--formats",
        nargs="+",
        choices=("channels_last", "contiguous"),
        default=Settings().formats,
        help="memory formats to measure",
    )
    add("--rounds", type=int, default=Settings().rounds, help="runs of each candidate")
    add("--dry-run", action="store_true", help="only list the shapes that would be measured")
