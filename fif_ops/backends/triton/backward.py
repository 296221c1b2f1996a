"""Launcher of the backward pass: at most four kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import config as configs
from .cheap_backward import cheap_backward_kernel, sums_kernel
from .host import (
    Map,
    Unit,
    as_map,
    cdiv,
    check_map,
    divisor,
    launch,
    map_arguments,
    new_floats,
    new_map,
    parameter,
    power_of_two,
    processors,
    slots_for,
    unit_of,
    width_units,
)
from .primary_backward import maps_gradient_kernel, primary_backward_kernel, reduce_kernel

REDUCE_BLOCK = 256


class Norms:
    """[mean, rstd] and parameters of both normalisations."""

    def __init__(self, x: Tensor, unit: Unit, stats: tuple[Tensor, Tensor], affine: tuple[Tensor | None, ...]) -> None:
        self.stats1, self.stats2 = stats
        for t, channels, name in ((self.stats1, unit.maps, "stats1"), (self.stats2, unit.cheap, "stats2")):
            shaped = tuple(t.shape) == (2, channels) and t.is_contiguous()
            if not shaped or t.dtype != torch.float32 or t.device != x.device:
                raise RuntimeError(f"{name} must be what train returned")
        self.weight1 = parameter(affine[0], x, unit.maps, "weight1")
        self.bias1 = parameter(affine[1], x, unit.maps, "bias1")
        self.weight2 = parameter(affine[2], x, unit.cheap, "weight2")
        self.bias2 = parameter(affine[3], x, unit.cheap, "bias2")

    def arguments(self) -> dict[str, Tensor | None]:
        return {
            "stats1": self.stats1,
            "weight1": self.weight1,
            "bias1": self.bias1,
            "stats2": self.stats2,
            "weight2": self.weight2,
            "bias2": self.bias2,
        }


def _run(unit: Unit, m: Map) -> int:
    """Elements that lie dense: channels, or a row."""
    return m.data.shape[1] if unit.last else unit.width


def run_sums(unit: Unit, grad: Map, raw: Map, weight: Tensor, norms: Norms) -> Tensor:
    """[slots, 2, N]: the gradients of the cheap normalisation's weight and bias, in parts."""
    device = raw.data.device
    config = configs.pick("expand", unit, device)
    blocks = cdiv(unit.maps, config.channels) * unit.multiplier
    tiles = cdiv(unit.images * unit.pixels, config.pixels)
    slots = slots_for(device, tiles, blocks)
    partials = new_floats(raw.data, slots, 2, unit.cheap)
    vg, vi = grad.vector(_run(unit, grad)), raw.vector(_run(unit, raw))
    vw, vn = width_units(unit)
    launch(
        sums_kernel,
        blocks * slots,
        config.warps,
        config.stages,
        **map_arguments("grad", grad, vg),
        **map_arguments("raw", raw, vi),
        weight=weight,
        **norms.arguments(),
        partials=partials,
        images=unit.images,
        height=unit.height,
        width=unit.width // vw,
        rows=unit.kernel,
        columns=None if unit.kernel == 3 else unit.kernel,
        maps=unit.maps // vn,
        kept_primary=unit.kept_primary // vn,
        kept_cheap=unit.kept_cheap // vn,
        tiles=tiles,
        slots=slots,
        BC=config.channels,
        BP=config.pixels,
        VG=vg,
        VI=vi,
        VW=vw,
        VN=vn,
        K=unit.kernel,
        S=unit.multiplier,
        LAST=unit.last,
        ACTIVATION=unit.activation,
    )
    return partials


def run_cheap(
    unit: Unit, grad: Map, raw: Map, weight: Tensor, norms: Norms, sums: Tensor, batch: bool
) -> tuple[Map, Tensor, Tensor]:
    """Gradient of the normalised primary maps; parts of the primary normalisation's and of the cheap kernels'."""
    device = raw.data.device
    config = configs.pick("cheap_backward", unit, device)
    images, rows, columns = config.tile
    tiles_h, tiles_w = cdiv(unit.height, config.own[0]), cdiv(unit.width, config.own[1])
    tiles = cdiv(unit.images, images) * tiles_h * tiles_w
    blocks = cdiv(unit.maps, config.channels)
    slots = slots_for(device, tiles, blocks)
    # In float32: batch statistics make sums over dz vanish, of which rounding would leave a rest.
    scratch = new_floats(raw.data, blocks * slots, config.channels * config.pixels)
    out = as_map(new_map(raw.data, unit, unit.maps), unit.last)
    partials = new_floats(raw.data, slots, 2, unit.maps)
    partials_weight = new_floats(raw.data, slots, unit.cheap, unit.kernel * unit.kernel)
    vg, vi, vo = (m.vector(_run(unit, m)) for m in (grad, raw, out))
    vw, vn = width_units(unit)
    launch(
        cheap_backward_kernel,
        blocks * slots,
        config.warps,
        config.stages,
        **map_arguments("grad", grad, vg),
        **map_arguments("raw", raw, vi),
        weight=weight,
        **norms.arguments(),
        partials2=sums,
        slots2=sums.shape[0],
        scratch=scratch,
        **map_arguments("grad_maps", out, vo, "maps"),
        partials1=partials,
        partials_weight=partials_weight,
        images=unit.images,
        height=unit.height,
        width=unit.width // vw,
        rows=unit.kernel,
        columns=None if unit.kernel == 3 else unit.kernel,
        maps=unit.maps // vn,
        kept_primary=unit.kept_primary // vn,
        kept_cheap=unit.kept_cheap // vn,
        tiles_h=tiles_h,
        tiles_w=tiles_w,
        tiles=tiles,
        slots=slots,
        count=float(unit.images * unit.pixels),
        BC=config.channels,
        TI=images,
        TH=rows,
        TW=columns,
        HH=config.halo[0],
        HW=config.halo[1],
        VG=vg,
        VI=vi,
        VO=vo,
        VW=vw,
        VN=vn,
        K=unit.kernel,
        S=unit.multiplier,
        TAPS=power_of_two(unit.multiplier * unit.kernel**2, 16, 1 << 20),
        LAST=unit.last,
        ACTIVATION=unit.activation,
        BATCH=batch,
    )
    return out, partials, partials_weight


def run_maps_gradient(
    unit: Unit, grad_maps: Map, raw: Map, grad_x: Map, norms: Norms, partials: Tensor, batch: bool
) -> None:
    """Gradient of the raw primary maps, where another convolution made them."""
    device = raw.data.device
    config = configs.pick("expand", unit, device)
    blocks = cdiv(unit.maps, config.channels)
    tiles = cdiv(unit.images * unit.pixels, config.pixels)
    slots = slots_for(device, tiles, blocks, 8)
    run = unit.maps if unit.last else unit.pixels
    vm, vi, vo = grad_maps.vector(run), raw.vector(run), grad_x.vector(run)
    vp, vn = (1, divisor(unit.maps)) if unit.last else (divisor(unit.pixels), 1)
    launch(
        maps_gradient_kernel,
        blocks * slots,
        config.warps,
        config.stages,
        **map_arguments("grad_maps", grad_maps, vm, "maps"),
        **map_arguments("raw", raw, vi),
        **map_arguments("grad_x", grad_x, vo),
        stats=norms.stats1,
        norm_weight=norms.weight1,
        partials=partials,
        partial_slots=partials.shape[0],
        images=unit.images,
        pixels=unit.pixels // vp,
        maps=unit.maps // vn,
        count=float(unit.images * unit.pixels),
        tiles=tiles,
        slots=slots,
        BC=config.channels,
        BP=config.pixels,
        VM=vm,
        VI=vi,
        VO=vo,
        VP=vp,
        VN=vn,
        LAST=unit.last,
        BATCH=batch,
    )


def run_primary(
    unit: Unit,
    grad_maps: Map,
    raw: Map,
    x: Map,
    weight: Tensor,
    grad_x: Map | None,
    norms: Norms,
    partials: Tensor,
    batch: bool,
    need_weight: bool,
) -> Tensor | None:
    """grad_x, if there is one; returns the weight's gradient in parts, if it is wanted: [slots, M, C/groups]."""
    device = x.data.device
    config = configs.pick("primary_backward", unit, device)
    rows, columns = cdiv(unit.group_maps, config.channels), cdiv(unit.depth, config.channels)
    in_pixels = unit.in_height * unit.in_width
    input_tiles, weight_tiles = cdiv(unit.images * in_pixels, config.pixels), 0
    input_blocks, weight_blocks = columns * unit.groups, rows * columns * unit.groups
    input_slots = max(1, min(input_tiles, cdiv(4 * processors(device), input_blocks)))
    input_programs = input_blocks * input_slots if grad_x is not None else 0
    weight_tiles = cdiv(unit.images * unit.pixels, config.pixels)
    weight_slots = slots_for(device, weight_tiles, weight_blocks)
    weight_programs = weight_blocks * weight_slots if need_weight else 0
    coefficients = new_floats(x.data, max(1, input_programs), 4, unit.group_maps) if grad_x is not None else None
    partials_weight = new_floats(x.data, weight_slots, unit.maps, unit.depth) if need_weight else None
    vm, vi = (m.vector(unit.group_maps if unit.last else unit.pixels) for m in (grad_maps, raw))
    vx = x.vector(unit.depth if unit.last else in_pixels)
    vo = grad_x.vector(unit.depth if unit.last else in_pixels) if grad_x else 1
    vp = 1 if unit.last else min(divisor(unit.pixels), divisor(in_pixels))
    vk, vn = divisor(unit.depth), divisor(unit.group_maps)
    launch(
        primary_backward_kernel,
        input_programs + weight_programs,
        config.warps,
        config.stages,
        **map_arguments("grad_maps", grad_maps, vm, "maps"),
        **map_arguments("raw", raw, vi),
        **map_arguments("x", x, vx),
        **map_arguments("grad_x", grad_x, vo),
        weight=weight,
        stats=norms.stats1,
        norm_weight=norms.weight1,
        partials=partials,
        partial_slots=partials.shape[0],
        coefficients=coefficients,
        partials_weight=partials_weight,
        images=unit.images,
        pixels=unit.pixels // vp,
        width=unit.width,
        x_pixels=in_pixels // vp,
        x_width=unit.in_width,
        depth=unit.depth // vk,
        maps=unit.group_maps // vn,
        groups=unit.groups,
        count=float(unit.images * unit.pixels),
        input_tiles=input_tiles,
        input_slots=input_slots,
        input_programs=input_programs,
        weight_tiles=weight_tiles,
        weight_slots=weight_slots,
        BC=config.channels,
        BP=config.pixels,
        BK=config.depth,
        VM=vm,
        VI=vi,
        VX=vx,
        VO=vo,
        VP=vp,
        VK=vk,
        VN=vn,
        STRIDE=unit.stride,
        LAST=unit.last,
        PRECISION=unit.precision,
        BATCH=batch,
        INPUT=grad_x is not None,
        WEIGHT=need_weight,
    )
    return partials_weight


def run_reduce(parts: list[tuple[Tensor | None, Tensor | None]]) -> None:
    """Sums over the slots: (partials [slots, ...], where they go) of both norms, cheap weight and primary weight."""
    arguments: dict[str, object] = {}
    programs = 0
    for name, target, (partials, out) in zip(
        ("norm1", "norm2", "cheap", "primary"),
        ("grad_norm1", "grad_norm2", "grad_cheap", "grad_primary"),
        parts,
        strict=True,
    ):
        length = 0 if out is None else out.numel()
        arguments |= {
            name: partials,
            f"{name}_slots": 0 if partials is None else partials.shape[0],
            target: out,
            f"{name}_length": length,
        }
        programs += cdiv(length, REDUCE_BLOCK)
    launch(reduce_kernel, programs, 4, 2, **arguments, BLOCK=REDUCE_BLOCK)


def backward(
    grad: Tensor,
    x: Tensor,
    primary_weight: Tensor | None,
    cheap_weight: Tensor,
    raw: Tensor,
    stats1: Tensor,
    stats2: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    activation: int,
    splice: bool,
    batch1: bool,
    batch2: bool,
    need_x: bool,
    need_primary_weight: bool,
    stride: int = 1,
    groups: int = 1,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``backward``: gradients of x, primary_weight, cheap_weight and [weight, bias] of both norms.

    What is not wanted is empty. Without a primary weight x holds the raw maps, and the first is their gradient.
    """
    if grad.dim() != 4:
        raise RuntimeError(f"grad must have 4 dimensions, got {grad.dim()}")
    unit = unit_of(x, primary_weight, cheap_weight, grad.shape[1], activation, splice, stride, groups, tf32)
    check_map(grad, x, unit, grad.shape[1], "grad")
    check_map(raw, x, unit, unit.maps, "raw")
    norms = Norms(x, unit, (stats1, stats2), (weight1, bias1, weight2, bias2))
    need_weight = need_primary_weight and primary_weight is not None
    layout = torch.channels_last if unit.last else torch.contiguous_format
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if need_x else x.new_empty(0)
    grad_w1 = x.new_empty(primary_weight.shape if need_weight and primary_weight is not None else (0,))
    grad_w2 = x.new_empty(cheap_weight.shape)
    grad_norm1, grad_norm2 = new_floats(x, 2, unit.maps), new_floats(x, 2, unit.cheap)
    results = (grad_x, grad_w1, grad_w2, grad_norm1, grad_norm2)
    if unit.images == 0:
        for t in results:
            t.zero_()
        return results
    maps, upstream, taps = as_map(raw, unit.last), as_map(grad, unit.last), cheap_weight.contiguous()
    sums = run_sums(unit, upstream, maps, taps, norms)
    grad_maps, partials1, parts_cheap = run_cheap(unit, upstream, maps, taps, norms, sums, batch2)
    parts_primary: Tensor | None = None
    target = as_map(grad_x, unit.last) if need_x else None
    if primary_weight is None:
        if target is not None:
            run_maps_gradient(unit, grad_maps, maps, target, norms, partials1, batch1)
    elif need_x or need_weight:
        source, weight = as_map(x, unit.last), primary_weight.contiguous()
        parts_primary = run_primary(
            unit, grad_maps, maps, source, weight, target, norms, partials1, batch1, need_weight
        )
    run_reduce(
        [
            (partials1, grad_norm1),
            (sums, grad_norm2),
            (parts_cheap, grad_w2),
            (parts_primary, grad_w1 if need_weight else None),
        ]
    )
    return results
