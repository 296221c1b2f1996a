"""Who can run a unit, and why not.

One predicate per backend answers both questions: the automatic choice takes the first backend that can run the problem,
an explicit choice raises the reason of one that cannot. The reference runs everything. The first to be asked is the one
that ``python -m fif_ops tune`` found to be the fastest on this GPU, where it measured.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..reference import memory_format_of
from . import tuned


class Problem(NamedTuple):
    """What decides which backend runs a unit: its tensors and the options that not every kernel has."""

    x: Tensor
    primary_weight: Tensor
    cheap_weight: Tensor
    stride: int
    padding: int
    groups: int
    cuts_primary: bool  # out_channels drops some of the primary maps


class Backend:
    """A way to run units; reasons say why this machine, or this problem, rules it out ("" if it does not)."""

    name: str
    namespace: str  # of its operators infer, train and backward in torch.ops

    def fuses_primary(self, problem: Problem, trains: bool) -> bool:
        """Whether the operators do the primary convolution too; else torch does it, and they take its maps."""
        return True

    def unavailable(self) -> str:
        """Why this backend can run nothing here, or ""."""
        return ""

    def plan(self, problem: Problem, out_channels: int, splice: bool, trains: bool) -> list[ops.Launch]:
        """The launches that the problem takes, where a planner decides on them."""
        return []

    def reason(self, problem: Problem) -> str:
        """Why this backend cannot run the problem, or ""."""
        return ""

    def can_run(self, problem: Problem, raise_error: bool = False) -> bool:
        """Whether the backend runs the problem; with ``raise_error``, ValueError with the reason if it does not."""
        reason = self.reason(problem)
        if reason and raise_error:
            raise ValueError(f"backend={self.name!r} cannot run this unit: {reason}")
        return not reason


class _Reference(Backend):
    name = "reference"
    namespace = ""


class AnyPrimary(Backend):
    """Takes any primary convolution: what the kernels do not fuse, torch's convolution does before them."""

    def fuses_primary(self, problem: Problem, trains: bool) -> bool:
        primary = problem.primary_weight
        # A block of the kernels works on maps of one group: few maps would leave it idle.
        wide_groups = problem.groups == 1 or primary.shape[0] >= 8 * problem.groups
        return primary.shape[2] == primary.shape[3] == 1 and problem.padding == 0 and wide_groups


class _Kernels(Backend):
    """The binary kernels of one kind of device."""

    namespace = "fif_ops"
    device: str
    dtypes: tuple[torch.dtype, ...]
    cheap_sizes: tuple[int, ...]

    def reason(self, problem: Problem) -> str:
        x, cheap = problem.x, problem.cheap_weight
        if x.device.type != self.device:
            return f"x is on {x.device}, not on {self.device}"
        if self.unavailable():
            return self.unavailable()
        if x.dtype not in self.dtypes:
            return f"x is {x.dtype}, not one of {', '.join(str(dtype) for dtype in self.dtypes)}"
        if reason := self.primary_reason(problem):
            return reason
        if cheap.shape[1] != 1:
            return f"a cheap kernel reads {cheap.shape[1]} primary maps, not 1"
        if cheap.shape[2] not in self.cheap_sizes:
            return f"the cheap kernel size is {cheap.shape[2]}, not one of {', '.join(map(str, self.cheap_sizes))}"
        if problem.cuts_primary:
            return "out_channels drops some of the primary maps"
        return "x is empty" if x.numel() == 0 else ""

    def primary_reason(self, problem: Problem) -> str:
        """Why the operators cannot take the primary maps, or ""."""
        return ""


class _Cpu(AnyPrimary, _Kernels):
    name = device = "cpu"
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    cheap_sizes = (1, 3, 5, 7)

    def fuses_primary(self, problem: Problem, trains: bool) -> bool:
        kernel = problem.primary_weight.shape[2]
        if trains and self._torch_multiplies_faster(problem):
            return False
        if trains or problem.groups > 1 or problem.primary_weight.shape[3] != kernel:
            return problem.stride == problem.groups == 1 and super().fuses_primary(problem, trains)
        return kernel in (1, 3, 5, 7) and problem.padding == kernel // 2

    def _torch_multiplies_faster(self, problem: Problem) -> bool:
        """Training multiplies in float32, torch in pairs of bfloat16 where the processor does: that pays for another
        pass over large products, save in NCHW on large maps. The order of its sums may depend on the threads."""
        x, primary = problem.x, problem.primary_weight
        multiplies_pairs = x.dtype == torch.bfloat16 and ops.CPU_ISA in ("avx512bf16", "amx")
        if not multiplies_pairs or torch.are_deterministic_algorithms_enabled():
            return False
        pixels = x.shape[2] * x.shape[3]
        large = x.shape[0] * pixels * primary.shape[0] * primary.shape[1] >= 15_000_000
        return large and (pixels <= 256 or memory_format_of(x) == torch.channels_last)

    def unavailable(self) -> str:
        if not ops.LOADED:
            return ops.ERROR
        return "" if ops.CPU_ISA in ops.CPU_ISAS else ops.CPU_ISA


class _Cuda(AnyPrimary, _Kernels):
    # Cheap maps of one primary map whose sums fit into the shared memory of every GPU, by kernel size.
    most_cheap: ClassVar[dict[int, int]] = {3: 7, 5: 4}

    name = device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cheap_sizes = (3, 5)

    def unavailable(self) -> str:
        if not ops.LOADED:
            return ops.ERROR
        if not ops.CUDA_ARCHS:
            return "the library was built without nvcc"
        return "" if torch.cuda.is_available() else "torch finds no NVIDIA GPU"

    def primary_reason(self, problem: Problem) -> str:
        cheap = problem.cheap_weight
        multiplier, most = cheap.shape[0] // problem.primary_weight.shape[0], self.most_cheap.get(cheap.shape[2], 1)
        if multiplier > most:
            return f"a primary map has {multiplier} cheap ones of {cheap.shape[2]}x{cheap.shape[3]}, more than {most}"
        return self.device_reason(problem.x)

    def plan(self, problem: Problem, out_channels: int, splice: bool, trains: bool) -> list[ops.Launch]:
        x, primary, cheap, stride, padding, groups, _ = problem
        fused = self.fuses_primary(problem, trains)
        if not fused:
            maps = F.conv2d(x.to("meta"), primary.to("meta"), None, stride, padding, 1, groups)
            x = maps.contiguous(memory_format=memory_format_of(x))
            stride = groups = 1
        return ops.cuda_plan(
            x, primary, cheap, out_channels=out_channels, splice=splice, stride=stride, groups=groups,
            fused_primary=fused, trains=trains, device=self.device_sizes(problem.x),
        )  # fmt: skip

    def device_sizes(self, x: Tensor) -> tuple[int, int, int]:
        """Multiprocessors, and bytes of shared memory that a block and a multiprocessor may have."""
        found = torch.cuda.get_device_properties(x.device)
        shared = found.shared_memory_per_multiprocessor
        return found.multi_processor_count, shared - 1024, shared  # a block's kilobyte is the system's

    def device_reason(self, x: Tensor) -> str:
        """Why this GPU cannot run the library's kernels, or ""."""
        major, minor = torch.cuda.get_device_capability(x.device)
        oldest = min(map(int, ops.CUDA_ARCHS))
        return "" if 10 * major + minor >= oldest else f"{x.device} is sm_{major}{minor}, older than sm_{oldest}"


from .triton import Triton  # noqa: E402  (after the base class that it needs)
from .triton.host import power_of_two  # noqa: E402

# The binary kernels first, where no measurement says otherwise; Triton takes those units on a GPU that they refuse, and
# CPU tensors only where it is interpreted.
_ORDER: tuple[Backend, ...] = (_Cuda(), _Cpu(), Triton(), _Reference())
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ORDER}
REFERENCE = BACKENDS["reference"]

_ASKED = os.environ.get("FIF_OPS_BACKEND", "")  # read once: a lookup in os.environ takes a microsecond
_forced: list[str] = []  # names of the blocks of ``use`` that we are in; a plain list, which torch.compile can read


def _checked(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: must be one of {', '.join(map(repr, BACKENDS))}")
    return name


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block, every unit runs on the backend of this name, or raises ValueError with the reason why not."""
    _forced.append(_checked(name, "name"))
    try:
        yield
    finally:
        _forced.pop()


def wanted(backend: str | None) -> str | None:
    """The backend that the caller, ``use`` or the variable FIF_OPS_BACKEND asks for, in this order; None: any."""
    if backend is not None:
        return _checked(backend, "backend")
    if _forced:
        return _forced[-1]
    return _checked(_ASKED, "FIF_OPS_BACKEND") if _ASKED else None


def bucket(problem: Problem, trains: bool) -> str:
    """Units that share a measured choice of backend: nothing of them changes from batch to batch."""
    x, primary, cheap, stride, padding, groups, cuts = problem
    kind = str(x.dtype).removeprefix("torch.")
    if x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        kind = "tf32"
    layout = "last" if memory_format_of(x) == torch.channels_last else "nchw"
    sizes = "x".join(str(power_of_two(n, 16, 512)) for n in (primary.shape[1], primary.shape[0]))
    primary_kind = f"{primary.shape[2]}s{stride}p{padding}g{groups}{' cut' if cuts else ''}"
    made = f"{sizes} primary {primary_kind} cheap {cheap.shape[2]}"
    return f"backend {'training' if trains else 'inference'} {kind} {layout} {made}"


def measured(problem: Problem, trains: bool) -> Backend | None:
    """The backend that was the fastest for such units on this device, where that was measured."""
    device = problem.x.device
    return BACKENDS.get(tuned.fastest(device, bucket(problem, trains))) if tuned.any_choice(device) else None


def order(problem: Problem, trains: bool) -> tuple[Backend, ...]:
    """All backends, in the order in which this problem takes the first that can run it."""
    best = measured(problem, trains)
    return _ORDER if best is None else (best, *(backend for backend in _ORDER if backend is not best))


def choose(problem: Problem, backend: str | None = None, trains: bool = False) -> Backend:
    """The backend that runs the problem. Raises ValueError if the one asked for cannot."""
    name = wanted(backend)
    if name is not None:
        BACKENDS[name].can_run(problem, raise_error=True)
        return BACKENDS[name]
    chosen = next(candidate for candidate in order(problem, trains) if not candidate.reason(problem))
    if chosen is REFERENCE and not ops.LOADED:
        _tell_once()
    return chosen


@functools.cache
def _tell_once() -> None:
    reason = BACKENDS["cpu"].unavailable()
    warnings.warn(f"fif_ops runs on its reference path: {reason}", RuntimeWarning, stacklevel=5)


def describe() -> list[tuple[str, bool, str]]:
    """(name, available here, reason) of every backend, in the order in which they are tried."""
    return [(b.name, not b.unavailable(), b.unavailable()) for b in _ORDER]
