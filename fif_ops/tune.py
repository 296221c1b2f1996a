"""``python -m fif_ops tune``: times the Triton kernels' candidate configurations on the GPU at hand and keeps the best.

Every shape belongs to a bucket (fif_ops/backends/triton/config.py) with a short list of candidates. Each candidate runs
the whole operator of that bucket, checked first against the composition in plain PyTorch: a wrong result is never kept.
Choices go to a cache file, read by later processes at their first launch.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Norm, compose

FAILED = 2
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Relative L2 error against the composition in float32; tf32 is what torch's own switch allows.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 2e-2, torch.float32: 1e-4}
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


def tasks(shape: Shape, device: torch.device) -> list[Task]:
    """Inference, training forward and backward of the unit, with what plain PyTorch makes of them."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    x = random(shape.batch, shape.channels, shape.side, shape.side).to(shape.dtype)
    x = x.contiguous(memory_format=torch.channels_last if shape.last else torch.contiguous_format)
    w1 = (random(shape.maps, shape.channels, 1, 1) * shape.channels**-0.5).to(shape.dtype)
    w2 = (random(shape.maps, 1, shape.kernel, shape.kernel) / shape.kernel).to(shape.dtype)
    norms = [[*random(3, shape.maps), random(shape.maps).abs() + 0.5] for _ in range(2)]
    options = (1e-5, 1e-5, 2 * shape.maps, 4, True)  # silu: no kinks, on whose sides rounding may put a value
    named = {"stride": 1, "groups": 1, "tf32": shape.tf32}
    operators = torch.ops.fif_ops_triton

    def infer() -> Sequence[Tensor]:
        return (operators.infer(x, w1, w2, None, None, *norms[0], *norms[1], *options, **named),)

    def train() -> Sequence[Tensor]:
        return operators.train(x, w1, w2, None, None, *norms[0], *norms[1], *options, True, True, 0.0, 0.0, **named)

    out, raw, stats1, stats2 = train()
    upstream = random(*out.shape).to(out)

    def backward() -> Sequence[Tensor]:
        affine = (*norms[0][:2], *norms[1][:2])
        saved = (raw, stats1, stats2)
        return operators.backward(upstream, x, w1, w2, *saved, *affine, 4, True, True, True, True, True, **named)

    def composed(training: bool) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.float().requires_grad_(training) for t in (x, w1, w2)]
        given = [Norm(n[0], n[1], n[2], n[3], training, 0.0, 1e-5) for n in norms]
        made = compose(*leaves, primary_norm=given[0], cheap_norm=given[1], activation="silu")
        return made, leaves

    made, leaves = composed(True)
    gradients = torch.autograd.grad(made, leaves, upstream.float())
    return [
        Task(infer, (composed(False)[0].detach(),), ("infer", "product", "expand")),
        Task(train, (made.detach(),), ("product", "expand")),
        Task(backward, gradients, ("expand", "cheap_backward", "primary_backward")),
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


def measure(shape: Shape, device: torch.device, rounds: int, flush: Tensor, known: dict[str, int]) -> None:
    """Adds the best candidate of every bucket of this shape that is not in ``known`` yet."""
    from .backends.triton import config
    from .backends.triton.host import unit_of

    made = tasks(shape, device)
    x = torch.empty(shape.batch, shape.channels, shape.side, shape.side, dtype=shape.dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last if shape.last else torch.contiguous_format)
    w1, w2 = x.new_empty(shape.maps, shape.channels, 1, 1), x.new_empty(shape.maps, 1, shape.kernel, shape.kernel)
    unit = unit_of(x, w1, w2, 2 * shape.maps, 4, True, 1, 1, shape.tf32)
    for task in made:
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
            known[bucket] = min(times, key=times.__getitem__)
            config.force(bucket, known[bucket])  # later buckets are measured together with this choice


def _lacks_room(error: Exception) -> bool:
    return type(error).__name__ == "OutOfResources"


def run(settings: Settings) -> int:
    """Measures and saves; returns the exit status."""
    from .backends import triton as backend
    from .backends.triton import config

    every = list(shapes(settings))
    if settings.dry_run:
        print(f"{len(every)} shapes would be measured; the choices would go to {config.cache_path()}")
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
    known: dict[str, int] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            bar = progress.add_task("tuning", total=len(every))
            for shape in every:
                progress.update(bar, description=f"{shape.name:44}")
                measure(shape, device, settings.rounds, flush, known)
                progress.advance(bar)
    finally:
        config.reset()
    name = torch.cuda.get_device_name(device)
    config.save(config.cache_path(), name, known)
    changed = sum(number != 0 for number in known.values())
    print(f"{len(known)} buckets measured on {name}, {changed} of them now differ from the rule: {config.cache_path()}")
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
