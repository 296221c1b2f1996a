"""The binary library: loading it, what it says of itself, and the fake kernels of its operators.

``torch.ops.fif_ops.infer``, ``train`` and ``backward`` exist once it is loaded; csrc/ops.cpp has their schemas. Without
a library, or with one that does not fit, the package works on its reference path and ``library_info`` says why.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import ACTIVATIONS, memory_format_of

# Codes of csrc/problem.h.
ACTIVATION_CODES: dict[str | None, int] = {
    name: code for code, name in enumerate([None, "relu", "relu6", "hardswish", "silu", "gelu"])
}
assert set(ACTIVATION_CODES) == {None, *ACTIVATIONS}

_HERE = Path(__file__).parent


def _built_for() -> dict[str, Any]:
    record = _HERE / "_build_info.json"
    return json.loads(record.read_text()) if record.is_file() else {}


def _load() -> tuple[Path, str, ctypes.CDLL | None]:
    """Path, reason why it is not loaded (empty if it is), and the library."""
    named = os.environ.get("FIF_OPS_LIBRARY", "")
    path = Path(named) if named else _HERE / "_C.so"
    if not path.is_file():
        if named:
            return path, f"FIF_OPS_LIBRARY names {named}, which is no file", None
        return (
            path,
            _built_for().get("no_kernels", "") or "the package was installed without its compiled kernels",
            None,
        )
    try:
        torch.ops.load_library(path)
        return path, "", ctypes.CDLL(str(path))
    except OSError as error:
        built_for = _built_for().get("torch", "(unknown)")
        reason = (
            f"{path.name} was built for torch {built_for} and does not load with torch {torch.__version__} ({error})"
        )
        return path, f"{reason}; reinstall fif_ops to build it for this torch", None


_PATH, ERROR, _LIBRARY = _load()
LOADED = _LIBRARY is not None


def operator(name: str) -> Any:
    """The operator of that name; None without the library."""
    return getattr(torch.ops.fif_ops, name).default if LOADED else None


def at_once(name: str) -> Any:
    """What calling the operator comes to: half a microsecond less, and nothing that torch.compile understands."""
    return operator(name)._op if LOADED else None


def _ask(name: str, *arguments: Any) -> str:
    """What the library's function of this name says; empty without it, as the CUDA ones are without nvcc."""
    function = getattr(_LIBRARY, name, None)
    if function is None:
        return ""
    function.restype = ctypes.c_char_p
    return function(*arguments).decode()


# The instruction set in use (or, with a bad FIF_OPS_CPU_ISA, what is wrong with it) and those that would run here.
CPU_ISA = _ask("fif_ops_cpu_isa")
CPU_ISAS = _ask("fif_ops_cpu_isas").split()
# The GPU architectures that the library was built for.
CUDA_ARCHS = _ask("fif_ops_cuda_archs").split()


class Launch(NamedTuple):
    """What the planner of the CUDA kernels expects of one launch; bytes to and from the second-level cache."""

    kernel: str
    tile: tuple[int, int]  # pixels of a block, height and width
    channels: int  # of a block
    blocks: int
    bytes_read: int
    bytes_written: int

    def __str__(self) -> str:
        height, width = self.tile
        traffic = f"{self.bytes_read / 2**20:.1f} MiB read, {self.bytes_written / 2**20:.1f} MiB written"
        return f"{self.kernel}: {self.blocks} blocks of {height}x{width} pixels by {self.channels} channels, {traffic}"


def cuda_plan(
    x: Tensor,
    primary_weight: Tensor,
    cheap_weight: Tensor,
    *,
    out_channels: int,
    splice: bool,
    stride: int,
    groups: int,
    fused_primary: bool,
    trains: bool,
    device: tuple[int, int, int],
) -> list[Launch]:
    """The launches of a unit on a GPU of so many multiprocessors and bytes of shared memory (of a block, of all).

    x may be a meta tensor: shape, dtype and memory format count. Without ``fused_primary`` torch does that convolution,
    and x is what it gives.
    """
    maps = primary_weight.shape[0]
    numbers = (
        *x.shape, maps, cheap_weight.shape[0] // maps, out_channels, cheap_weight.shape[2], stride, groups, splice,
        memory_format_of(x) == torch.channels_last, fused_primary, False, x.element_size(), trains, *device,
    )  # fmt: skip
    text = _ask("fif_ops_cuda_plan", (ctypes.c_int64 * len(numbers))(*numbers))
    rows = [line.split("\t") for line in text.splitlines()]
    return [Launch(row[0], (int(row[1]), int(row[2])), *map(int, row[3:])) for row in rows]


def library_info() -> dict[str, Any]:
    """Path, whether it is loaded and why not, the build's record, and the instruction sets that this processor runs."""
    return {
        "path": str(_PATH),
        "loaded": LOADED,
        "error": ERROR,
        "built_for": _built_for(),
        "cpu_isa": CPU_ISA,
        "cpu_isas": CPU_ISAS,
    }


def _new_map(x: Tensor, channels: int, stride: int = 1) -> Tensor:
    size = (x.shape[0], channels, -(x.shape[2] // -stride), -(x.shape[3] // -stride))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def fake_infer(
    x: Tensor, primary_weight: Tensor | None, cheap_weight: Tensor, *rest: Any, stride: int = 1, **_: Any
) -> Tensor:
    """What ``infer`` returns, without values; the operators of every backend share their fakes."""
    return _new_map(x, rest[12], stride)


def _compute_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fake_train(
    x: Tensor, primary_weight: Tensor | None, cheap_weight: Tensor, *rest: Any, stride: int = 1, **_: Any
) -> tuple[Tensor, ...]:
    """What ``train`` returns, without values."""
    maps, cheap = (x.shape[1] if primary_weight is None else primary_weight.shape[0]), cheap_weight.shape[0]
    kind = _compute_type(x)
    return (
        _new_map(x, rest[12], stride),
        x.new_empty(0) if primary_weight is None else _new_map(x, maps, stride),
        x.new_empty((2, maps), dtype=kind),
        x.new_empty((2, cheap), dtype=kind),
    )


def fake_backward(
    grad: Tensor, x: Tensor, primary_weight: Tensor | None, cheap_weight: Tensor, raw: Tensor, *rest: Any, **_: Any
) -> tuple[Tensor, ...]:
    """What ``backward`` returns, without values."""
    need_x, need_primary_weight = rest[10:12]
    kind = _compute_type(x)
    return (
        _new_map(x, x.shape[1]) if need_x else x.new_empty(0),
        x.new_empty(0) if primary_weight is None or not need_primary_weight else x.new_empty(primary_weight.shape),
        x.new_empty(cheap_weight.shape),
        x.new_empty((2, raw.shape[1]), dtype=kind),
        x.new_empty((2, cheap_weight.shape[0]), dtype=kind),
    )


def fake_strided_train(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What ``strided_train`` returns, without values."""
    channels, stride = x.shape[1], rest[-1]
    stats = x.new_empty((2, channels), dtype=_compute_type(x))
    return _new_map(x, channels, stride), _new_map(x, channels, stride), stats


def fake_strided_backward(
    grad: Tensor, x: Tensor, weight: Tensor, raw: Tensor, stats: Tensor, norm_weight: Any, need_x: bool, stride: int
) -> tuple[Tensor, ...]:
    """What ``strided_backward`` returns, without values."""
    grad_x = _new_map(x, x.shape[1]) if need_x else x.new_empty(0)
    return grad_x, x.new_empty(weight.shape), torch.empty_like(stats)


def fake_run(x: Tensor, program: Tensor, packed: Tensor, out_channels: int, stride: int) -> Tensor:
    """What ``run`` returns, without values; a stride of 0 stands for one pixel."""
    size = [-(-n // stride) if stride else 1 for n in x.shape[2:]]
    layout = memory_format_of(x)
    return torch.empty((x.shape[0], out_channels, *size), dtype=x.dtype, device=x.device, memory_format=layout)


def fake_follow(
    x: Tensor, program: Tensor, packed: Tensor, numbers: list[Tensor], content: int, out_channels: int, stride: int
) -> Tensor:
    """What ``follow`` returns, without values."""
    return fake_run(x, program, packed, out_channels, stride)


if LOADED:
    torch.library.register_fake("fif_ops::run", fake_run)
    torch.library.register_fake("fif_ops::follow", fake_follow)
    torch.library.register_fake("fif_ops::infer", fake_infer)
    torch.library.register_fake("fif_ops::train", fake_train)
    torch.library.register_fake("fif_ops::backward", fake_backward)
    torch.library.register_fake("fif_ops::strided_train", fake_strided_train)
    torch.library.register_fake("fif_ops::strided_backward", fake_strided_backward)
