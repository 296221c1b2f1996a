"""What the launchers share: sizes of a unit, tensors as kernels see them, and the one function that launches."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import memory_format_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_SIZES = (3, 5)
# Of every compilation. maxnreg is the hardware's own limit: without it the assembler spills a little to fit more
# programs on a processor. Contraction to fused multiply-adds is the default up to Triton 3.9 only.
COMPILER_OPTIONS: dict[str, Any] = {"maxnreg": 255, "enable_fp_fusion": True}


class Unit(NamedTuple):
    """Sizes and options. ``maps`` are all M primary maps; ``last`` says that every map is channels_last."""

    images: int
    in_channels: int
    in_height: int
    in_width: int
    height: int
    width: int
    maps: int
    multiplier: int
    kernel: int
    kept_primary: int
    kept_cheap: int
    activation: int
    stride: int
    groups: int
    last: bool
    multiplies: bool  # there is a primary convolution; else x holds its maps
    precision: str
    dtype: torch.dtype

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def cheap(self) -> int:
        return self.maps * self.multiplier

    @property
    def group_maps(self) -> int:
        return self.maps // self.groups

    @property
    def depth(self) -> int:
        return self.in_channels // self.groups


def unit_of(
    x: Tensor,
    primary_weight: Tensor | None,
    cheap_weight: Tensor,
    out_channels: int,
    activation: int,
    splice: bool,
    stride: int,
    groups: int,
    tf32: bool,
) -> Unit:
    """Sizes, after the checks that keep any call from reading or writing outside a tensor."""
    _check(x.dim() == 4, f"x must have 4 dimensions (B, C, H, W), got {x.dim()}")
    _check(x.dtype in (torch.float32, torch.bfloat16, torch.float16), "x must be float32, bfloat16 or float16")
    images, channels, in_height, in_width = x.shape
    _check(channels > 0 and in_height > 0 and in_width > 0, "x must have channels and pixels")
    _check(in_height * in_width < 1 << 30, "x must have fewer than 2^30 pixels an image")
    _check(stride > 0, f"stride is {stride}: must be positive")
    _check(groups > 0 and channels % groups == 0, f"groups is {groups}: must divide x's {channels} channels")
    if primary_weight is None:
        _check(stride == 1 and groups == 1, "stride and groups must be 1 without a primary_weight")
    else:
        check_like(primary_weight, x, "primary_weight")
        shape = (primary_weight.shape[0], channels // groups, 1, 1)
        _check(
            tuple(primary_weight.shape) == shape and shape[0] > 0 and shape[0] % groups == 0,
            f"primary_weight must be (M, {channels // groups}, 1, 1), M a multiple of {groups}",
        )
    maps = channels if primary_weight is None else primary_weight.shape[0]
    check_like(cheap_weight, x, "cheap_weight")
    w = cheap_weight
    _check(
        w.dim() == 4 and w.shape[0] > 0 and w.shape[0] % maps == 0 and w.shape[1] == 1 and w.shape[2] == w.shape[3],
        f"cheap_weight must be (S * {maps}, 1, d, d)",
    )
    _check(w.shape[2] in KERNEL_SIZES, f"cheap_weight's d must be 3 or 5, got {w.shape[2]}")
    _check(0 <= activation <= 5, "activation must be a code from 0 to 5")
    most = w.shape[0] + (maps if splice else 0)
    _check(0 < out_channels <= most, f"out_channels is {out_channels}: must be from 1 to {most}")
    kept_primary = min(maps, out_channels) if splice else 0
    return Unit(
        images=images,
        in_channels=channels,
        in_height=in_height,
        in_width=in_width,
        height=(in_height - 1) // stride + 1,
        width=(in_width - 1) // stride + 1,
        maps=maps,
        multiplier=w.shape[0] // maps,
        kernel=w.shape[2],
        kept_primary=kept_primary,
        kept_cheap=out_channels - kept_primary,
        activation=activation,
        stride=stride,
        groups=groups,
        last=memory_format_of(x) == torch.channels_last,
        multiplies=primary_weight is not None,
        precision="tf32" if tf32 else "ieee",
        dtype=x.dtype,
    )


def _check(good: bool, message: str) -> None:
    if not good:
        raise RuntimeError(message)


def check_like(t: Tensor, x: Tensor, name: str) -> None:
    _check(t.device == x.device, f"{name} must be on x's device")
    _check(t.dtype == x.dtype, f"{name} must have x's dtype")


def check_map(t: Tensor, x: Tensor, unit: Unit, channels: int, name: str) -> None:
    check_like(t, x, name)
    shape = (unit.images, channels, unit.height, unit.width)
    _check(tuple(t.shape) == shape, f"{name} must be {shape}")


def parameter(t: Tensor | None, x: Tensor, channels: int, name: str) -> Tensor | None:
    """One value a channel, dense."""
    if t is None:
        return None
    _check(t.device == x.device, f"{name} must be on x's device")
    _check(tuple(t.shape) == (channels,), f"{name} must have {channels} values")
    _check(t.is_floating_point(), f"{name} must be float32, float64, bfloat16 or float16")
    return (t.float() if t.dtype == torch.float64 else t).contiguous()


class Map(NamedTuple):
    """A tensor (B, C, H, W) whose pixels lie at one regular step.

    NCHW: element (n, c, p) at n*batch + c*step + p. channels_last: at n*batch + p*step + c.
    """

    data: Tensor
    batch: int
    step: int

    def vector(self, run: int) -> int:
        """How many elements, dense along channels (channels_last) or pixels, one access may take; run: their number."""
        vector = 16 // self.data.element_size()
        numbers = (run, self.step, self.batch if self.data.shape[0] > 1 else 0)
        while any(number % vector for number in numbers):
            vector //= 2
        return vector


def map_arguments(name: str, m: Map | None, vector: int, prefix: str | None = None) -> dict[str, Any]:
    """A map as kernels take it: ``name``, and batch and pixel strides in vectors as ``prefix``_batch and _step."""
    prefix = prefix or name
    if m is None:
        return {name: None, f"{prefix}_batch": 0, f"{prefix}_step": 0}
    return {name: m.data, f"{prefix}_batch": m.batch // vector, f"{prefix}_step": m.step // vector}


def as_map(t: Tensor, last: bool) -> Map:
    """t as a Map; a copy of it only if its pixels lie at no regular step in this memory format."""
    height, width = t.shape[2:]
    if last:
        rows = height == 1 or width == 1 or t.stride(2) == width * t.stride(3)
        if not (t.shape[1] == 1 or t.stride(1) == 1) or not rows:
            t = t.contiguous(memory_format=torch.channels_last)
        step = t.stride(3) if width > 1 else t.stride(2) if height > 1 else t.shape[1]
        return Map(t, t.stride(0), step)
    if not (width == 1 or t.stride(3) == 1) or not (height == 1 or t.stride(2) == width):
        t = t.contiguous()
    return Map(t, t.stride(0), t.stride(1))


def new_map(like: Tensor, unit: Unit, channels: int) -> Tensor:
    layout = torch.channels_last if unit.last else torch.contiguous_format
    size = (unit.images, channels, unit.height, unit.width)
    return torch.empty(size, dtype=unit.dtype, device=like.device, memory_format=layout)


def new_floats(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is no less than ``number``, within bounds that are such powers themselves."""
    return min(max(1 << (number - 1).bit_length(), least), most)


def divisor(number: int, most: int = 8) -> int:
    """The largest power of two up to ``most`` that divides ``number``."""
    return min(number & -number, most) if number else most


def width_units(unit: Unit) -> tuple[int, int]:
    """Units of the width, and of the numbers of channels."""
    if not unit.last:
        return divisor(unit.width), 1
    return 1, min(divisor(unit.maps), divisor(unit.kept_primary), divisor(unit.kept_cheap))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; few where kernels are interpreted, so that programs have more than one tile there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def slots_for(device: torch.device, tiles: int, blocks: int, programs_each: int = 2) -> int:
    """Programs of one channel block: enough to fill the device, and a bounded number of partial sums."""
    return max(1, min(tiles, processors(device) * programs_each // blocks))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def launch(kernel: Any, programs: int, warps: int, stages: int, **arguments: Any) -> None:
    """The one place where kernels start, on the current stream of the current device."""
    kernel[(programs,)](**arguments, num_warps=warps, num_stages=stages, **COMPILER_OPTIONS)
