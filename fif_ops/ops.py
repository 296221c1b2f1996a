"""The binary library: loading it, what it says of itself, and the fake kernels of its operators.

``torch.ops.fif_ops.infer``, ``train`` and ``backward`` exist once it is loaded; csrc/ops.cpp has their schemas. Without
a library, or with one that does not fit, the package works on its reference path and ``library_info`` says why.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

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


def _ask(name: str) -> str:
    if _LIBRARY is None:
        return ""
    function = getattr(_LIBRARY, name)
    function.restype = ctypes.c_char_p
    return function().decode()


# The instruction set in use (or, with a bad FIF_OPS_CPU_ISA, what is wrong with it) and those that would run here.
CPU_ISA = _ask("fif_ops_cpu_isa")
CPU_ISAS = _ask("fif_ops_cpu_isas").split()
# The GPU architectures that the library was built for.
CUDA_ARCHS: list[str] = _built_for().get("cuda_archs", []) if LOADED else []


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


if LOADED:
    torch.library.register_fake("fif_ops::infer", fake_infer)
    torch.library.register_fake("fif_ops::train", fake_train)
    torch.library.register_fake("fif_ops::backward", fake_backward)
