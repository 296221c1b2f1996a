"""The Triton backend: the unit's operators in the namespace ``fif_ops_triton``, and who may run them.

Importing this package imports nothing of Triton: the operators are declared here with their fake kernels, and the first
call on a CUDA tensor imports what it needs. With TRITON_INTERPRET=1 in the environment they take CPU tensors too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch

from ... import ops
from .. import AnyPrimary, Problem
from .host import INTERPRETED, KERNEL_SIZES

OLDEST_TRITON = (3, 6)
OLDEST_DEVICE = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NORMS = (
    "Tensor? weight1, Tensor? bias1, Tensor{}? mean1, Tensor{}? var1, "
    "Tensor? weight2, Tensor? bias2, Tensor{}? mean2, Tensor{}? var2, float eps1, float eps2, "
    "int out_channels, int activation, bool splice"
)
_LAST = "*, int stride=1, int groups=1, bool tf32=False"
_CONVOLUTIONS = "Tensor? primary_weight, Tensor cheap_weight"
_SCHEMAS = (
    f"infer(Tensor x, {_CONVOLUTIONS}, Tensor? primary_bias, Tensor? cheap_bias, {_NORMS.format(*[''] * 4)}, {_LAST})"
    " -> Tensor",
    f"train(Tensor x, {_CONVOLUTIONS}, Tensor? primary_bias, Tensor? cheap_bias, "
    f"{_NORMS.format('(a!)', '(b!)', '(c!)', '(d!)')}, bool batch1, bool batch2, float momentum1, float momentum2, "
    f"{_LAST}) -> (Tensor, Tensor, Tensor, Tensor)",
    f"backward(Tensor grad, Tensor x, {_CONVOLUTIONS}, Tensor raw, Tensor stats1, Tensor stats2, Tensor? weight1, "
    "Tensor? bias1, Tensor? weight2, Tensor? bias2, int activation, bool splice, bool batch1, bool batch2, "
    f"bool need_x, bool need_primary_weight, {_LAST}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _implementation(module: str, name: str) -> Callable[..., Any]:
    """Runs the launcher of that name, imported at the first call, on the device of the operator's first tensor."""

    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)

    def run(first: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return launcher()(first, *arguments, **options)
        return launcher()(first, *arguments, **options)

    return run


def _declare() -> torch.library.Library:
    library = torch.library.Library("fif_ops_triton", "DEF")
    for schema in _SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = (("forward", "infer"), ("forward", "train"), ("backward", "backward"))
    fakes: tuple[Callable[..., Any], ...] = (ops.fake_infer, ops.fake_train, ops.fake_backward)
    for (module, name), fake in zip(kernels, fakes, strict=True):
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            library.impl(name, _implementation(module, name), key)
        torch.library.register_fake(f"fif_ops_triton::{name}", fake, lib=library)
    return library


LIBRARY = _declare()  # unregisters the operators when it is collected


def triton_reason() -> str:
    """Why Triton cannot be used, or ""; imports it only if its version fits."""
    return _reason()


# What torch.compiler.assume_constant_result does, which would import all of torch.compile here: a graph takes the
# answer as it is, and does not trace how it is found.
triton_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _reason() -> str:
    try:
        installed = importlib.util.find_spec("triton") is not None
    except ValueError:  # somebody put another module of this name into sys.modules
        installed = False
    if not installed:
        return "Triton is not installed (pip install triton)"
    versions = [_version_of(name) for name in ("triton", "pytorch-triton")]
    version = next((v for v in versions if v), "")
    if version and tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    try:
        for module in ("forward", "backward"):
            importlib.import_module(f"{__name__}.{module}")
        if not INTERPRETED and torch.cuda.is_available():
            # Compiles what Triton calls the GPU's driver by: better refused now than at the first launch.
            importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # a broken Triton must not take the package with it
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"Triton {version} does not work here ({what[:200]})"
    return ""


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


class Triton(AnyPrimary):
    name = "triton"
    namespace = "fif_ops_triton"

    def unavailable(self) -> str:
        if not INTERPRETED and not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU"
        if torch.version.hip is not None:
            return "torch is built for AMD GPUs, for which the kernels were never compiled"
        return triton_reason()

    def reason(self, problem: Problem) -> str:
        x, cheap = problem.x, problem.cheap_weight
        if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
            return f"x is on {x.device}, not on cuda"
        if self.unavailable():
            return self.unavailable()
        if x.dtype not in DTYPES:
            return f"x is {x.dtype}, not one of {', '.join(str(dtype) for dtype in DTYPES)}"
        if x.is_cuda and (capability := torch.cuda.get_device_capability(x.device)) < OLDEST_DEVICE:
            return f"{x.device} has compute capability {capability}, older than {OLDEST_DEVICE}"
        if cheap.shape[1] != 1:
            return f"a cheap kernel reads {cheap.shape[1]} primary maps, not 1"
        if cheap.shape[2] not in KERNEL_SIZES:
            return f"the cheap kernel size is {cheap.shape[2]}, not one of {', '.join(map(str, KERNEL_SIZES))}"
        if x.shape[2] * x.shape[3] >= 1 << 30:
            return "x has 2^30 pixels an image, or more"
        return "x is empty" if x.numel() == 0 else ""
