"""Launchers of inference (one or two kernels) and of the training forward (at most three)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import config as configs
from .expand import expand_kernel
from .fused import fused_kernel
from .host import (
    Map,
    Unit,
    as_map,
    cdiv,
    divisor,
    launch,
    map_arguments,
    new_floats,
    new_map,
    parameter,
    processors,
    slots_for,
    unit_of,
    width_units,
)
from .product import product_kernel

NONE, RUNNING, PARTIALS, STATS = range(4)


class Norm:
    """One normalisation as the operators take it: parameters, and where kernels find mean and rstd."""

    def __init__(
        self,
        x: Tensor,
        channels: int,
        name: str,
        conv_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
    ) -> None:
        if (mean is None) != (var is None):
            raise RuntimeError(f"{name}_norm needs both running_mean and running_var, or neither")
        self.conv_bias = parameter(conv_bias, x, channels, f"{name}_bias")
        self.weight = parameter(weight, x, channels, f"{name}_norm weight")
        self.bias = parameter(bias, x, channels, f"{name}_norm bias")
        self.mean = parameter(mean, x, channels, f"{name}_norm running_mean")
        self.var = parameter(var, x, channels, f"{name}_norm running_var")
        self.eps = eps
        self.source: Tensor | None = None  # partial or final statistics
        self.slots = 0
        self.origin = NONE if mean is None else RUNNING
        self.momentum = 0.0
        self.running = (mean, var)

    def check_frozen(self, name: str) -> None:
        if self.origin == NONE and (self.weight is not None or self.bias is not None):
            raise RuntimeError(f"{name}_norm without statistics must have no weight and no bias")

    def from_partials(self, partials: Tensor) -> None:
        self.source, self.slots, self.origin = partials, partials.shape[0], PARTIALS

    def from_stats(self, stats: Tensor) -> None:
        self.source, self.slots, self.origin = stats, 0, STATS

    @property
    def steps(self) -> bool:
        """Whether the running statistics take a step: there are some, and the batch's to step to."""
        return self.origin == PARTIALS and self.mean is not None and self.momentum != 0.0

    def finish(self) -> None:
        """Copies running statistics back that took a step where they could not take it in place."""
        if not self.steps:  # frozen ones stay as they are, to the last digit
            return
        for running, dense in zip(self.running, (self.mean, self.var), strict=True):
            if running is not None and dense is not None and dense.data_ptr() != running.data_ptr():
                running.copy_(dense)


class _Identity:
    conv_bias = weight = bias = mean = var = source = None
    eps, slots, origin, momentum, steps = 0.0, 0, NONE, 0.0, False


def run_product(
    unit: Unit, x: Map, weight: Tensor | None, norm: Norm, out: Map | None, *, normalise: bool, statistics: bool
) -> Tensor | None:
    """x's primary maps into ``out``; with ``statistics`` their partial ones are returned: [slots, 3, M]."""
    device = x.data.device
    config = configs.pick("product", unit, device)
    blocks = cdiv(unit.group_maps, config.channels) * unit.groups
    tiles = cdiv(unit.images * unit.pixels, config.pixels)
    slots = slots_for(device, tiles, blocks) if statistics else tiles
    partials = new_floats(x.data, slots, 3, unit.maps) if statistics else None
    vx = x.vector(unit.depth if unit.last else unit.in_height * unit.in_width)
    vo = out.vector(out.data.shape[1] if unit.last else unit.pixels) if out else 1
    vk, vn, vp = divisor(unit.depth), divisor(unit.group_maps), 1 if unit.last else divisor(unit.pixels)
    launch(
        product_kernel,
        blocks * slots,
        config.warps,
        config.stages,
        **map_arguments("x", x, vx),
        x_width=unit.in_width,
        weight=weight,
        conv_bias=norm.conv_bias,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        mean=norm.mean,
        var=norm.var,
        eps=norm.eps,
        **map_arguments("out", out, vo),
        partials=partials,
        images=unit.images,
        pixels=unit.pixels // vp,
        width=unit.width,
        depth=unit.depth // vk,
        maps=unit.group_maps // vn,
        groups=unit.groups,
        tiles=tiles,
        slots=slots,
        BC=config.channels,
        BP=config.pixels,
        BK=config.depth,
        VX=vx,
        VK=vk,
        VO=vo,
        VP=vp,
        VN=vn,
        STRIDE=unit.stride,
        LAST=unit.last,
        PRECISION=unit.precision,
        ACTIVATION=unit.activation,
        FROM=norm.origin,
        MULTIPLY=weight is not None,
        STORE=out is not None,
        NORM=normalise,
    )
    return partials


def run_expand(
    unit: Unit,
    raw: Map,
    weight: Tensor,
    norm1: Norm | _Identity,
    norm2: Norm,
    out: Map | None,
    *,
    activated: bool = False,
    write_primary: bool = False,
    stats: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor | None:
    """raw's maps to the output; without one, partial statistics of the cheap maps [slots, 3, N] are returned.

    ``activated``: raw is normalised and activated already, as the product kernel leaves it in the output.
    """
    device = raw.data.device
    config = configs.pick("expand", unit, device)
    blocks = cdiv(unit.maps, config.channels) * unit.multiplier
    tiles = cdiv(unit.images * unit.pixels, config.pixels)
    partials = None
    slots = tiles
    if out is None:
        slots = slots_for(device, tiles, blocks)
        partials = new_floats(raw.data, slots, 3, unit.cheap)
    elif PARTIALS in (norm1.origin, norm2.origin):
        slots = slots_for(device, tiles, blocks, 8)  # every program merges the partials first
    vi = raw.vector(unit.maps if unit.last else unit.width)
    vo = out.vector(out.data.shape[1] if unit.last else unit.width) if out else 1
    vw, vn = width_units(unit)
    launch(
        expand_kernel,
        blocks * slots,
        config.warps,
        config.stages,
        **map_arguments("raw", raw, vi),
        weight=weight,
        source1=norm1.source,
        slots1=norm1.slots,
        conv_bias1=norm1.conv_bias,
        weight1=norm1.weight,
        bias1=norm1.bias,
        mean1=norm1.mean,
        var1=norm1.var,
        eps1=norm1.eps,
        source2=norm2.source,
        slots2=norm2.slots,
        conv_bias2=norm2.conv_bias,
        weight2=norm2.weight,
        bias2=norm2.bias,
        mean2=norm2.mean,
        var2=norm2.var,
        eps2=norm2.eps,
        **map_arguments("out", out, vo),
        partials=partials,
        stats1=stats[0],
        stats2=stats[1],
        momentum1=norm1.momentum,
        momentum2=norm2.momentum,
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
        VI=vi,
        VO=vo,
        VW=vw,
        VN=vn,
        K=unit.kernel,
        S=unit.multiplier,
        LAST=unit.last,
        ACTIVATION1=0 if activated else unit.activation,
        ACTIVATION2=unit.activation,
        FROM1=norm1.origin,
        FROM2=norm2.origin,
        UPDATE1=norm1.steps,
        UPDATE2=norm2.steps,
        WRITE_PRIMARY=write_primary and unit.kept_primary > 0,
    )
    return partials


def run_fused(
    unit: Unit, x: Map, weight: Tensor, cheap_weight: Tensor, norm1: Norm, norm2: Norm, out: Map, config: configs.Config
) -> None:
    """Inference in one launch."""
    images, rows, columns = config.tile
    tiles_h, tiles_w = cdiv(unit.height, config.own[0]), cdiv(unit.width, config.own[1])
    tiles = cdiv(unit.images, images) * tiles_h * tiles_w
    blocks = cdiv(unit.group_maps, config.channels) * unit.groups
    # As many programs as are resident at once, so that the scratch stays in the cache.
    slots = max(1, min(tiles, cdiv(processors(x.data.device) * 16 // config.warps, blocks)))
    scratch = torch.empty(blocks * slots * config.channels * config.pixels, dtype=unit.dtype, device=x.data.device)
    vx = x.vector(unit.depth if unit.last else unit.in_width)
    vo = out.vector(out.data.shape[1] if unit.last else unit.width)
    vw = 1 if unit.last else divisor(unit.width)
    vn = min(divisor(unit.group_maps), divisor(unit.kept_primary), divisor(unit.kept_cheap)) if unit.last else 1
    vk = divisor(unit.depth)
    launch(
        fused_kernel,
        blocks * slots,
        config.warps,
        config.stages,
        **map_arguments("x", x, vx),
        x_width=unit.in_width,
        weight=weight,
        cheap_weight=cheap_weight,
        conv_bias1=norm1.conv_bias,
        weight1=norm1.weight,
        bias1=norm1.bias,
        mean1=norm1.mean,
        var1=norm1.var,
        eps1=norm1.eps,
        conv_bias2=norm2.conv_bias,
        weight2=norm2.weight,
        bias2=norm2.bias,
        mean2=norm2.mean,
        var2=norm2.var,
        eps2=norm2.eps,
        **map_arguments("out", out, vo),
        scratch=scratch,
        images=unit.images,
        height=unit.height,
        width=unit.width // vw,
        rows=unit.kernel,
        columns=None if unit.kernel == 3 else unit.kernel,
        depth=unit.depth // vk,
        maps=unit.group_maps // vn,
        groups=unit.groups,
        kept_primary=unit.kept_primary // vn,
        kept_cheap=unit.kept_cheap // vn,
        tiles_h=tiles_h,
        tiles_w=tiles_w,
        tiles=tiles,
        slots=slots,
        BC=config.channels,
        TI=images,
        TH=rows,
        TW=columns,
        BK=config.depth,
        HH=config.halo[0],
        HW=config.halo[1],
        VX=vx,
        VK=vk,
        VO=vo,
        VW=vw,
        VN=vn,
        STRIDE=unit.stride,
        LAST=unit.last,
        PRECISION=unit.precision,
        ACTIVATION=unit.activation,
        K=unit.kernel,
        S=unit.multiplier,
        FROM1=norm1.origin,
        FROM2=norm2.origin,
    )


def infer(
    x: Tensor,
    primary_weight: Tensor | None,
    cheap_weight: Tensor,
    primary_bias: Tensor | None,
    cheap_bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    eps1: float,
    eps2: float,
    out_channels: int,
    activation: int,
    splice: bool,
    stride: int = 1,
    groups: int = 1,
    tf32: bool = False,
) -> Tensor:
    """The operator ``infer``: (B, out_channels, H', W')."""
    unit = unit_of(x, primary_weight, cheap_weight, out_channels, activation, splice, stride, groups, tf32)
    norm1 = Norm(x, unit.maps, "primary", primary_bias, weight1, bias1, mean1, var1, eps1)
    norm2 = Norm(x, unit.cheap, "cheap", cheap_bias, weight2, bias2, mean2, var2, eps2)
    norm1.check_frozen("primary")
    norm2.check_frozen("cheap")
    out = new_map(x, unit, out_channels)
    if unit.images == 0:
        return out
    source, target, taps = as_map(x, unit.last), as_map(out, unit.last), cheap_weight.contiguous()
    if primary_weight is None:
        run_expand(unit, source, taps, norm1, norm2, target, write_primary=True)
        return out
    weight = primary_weight.contiguous()
    config = configs.inference(unit, x.device)
    if config is not None:
        run_fused(unit, source, weight, taps, norm1, norm2, target, config)
        return out
    in_output = unit.kept_primary == unit.maps
    maps = target if in_output else as_map(new_map(x, unit, unit.maps), unit.last)
    run_product(unit, source, weight, norm1, maps, normalise=True, statistics=False)
    run_expand(unit, maps, taps, _Identity(), norm2, target, activated=True, write_primary=not in_output)
    return out


def train(
    x: Tensor,
    primary_weight: Tensor | None,
    cheap_weight: Tensor,
    primary_bias: Tensor | None,
    cheap_bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    eps1: float,
    eps2: float,
    out_channels: int,
    activation: int,
    splice: bool,
    batch1: bool,
    batch2: bool,
    momentum1: float,
    momentum2: float,
    stride: int = 1,
    groups: int = 1,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``train``: output, raw primary maps (none without a primary weight), [mean, rstd] of both norms."""
    unit = unit_of(x, primary_weight, cheap_weight, out_channels, activation, splice, stride, groups, tf32)
    if primary_weight is None and primary_bias is not None:
        raise RuntimeError("primary_bias must be part of x's maps where there is no primary_weight")
    norm1 = Norm(x, unit.maps, "primary", primary_bias, weight1, bias1, mean1, var1, eps1)
    norm2 = Norm(x, unit.cheap, "cheap", cheap_bias, weight2, bias2, mean2, var2, eps2)
    norm1.momentum, norm2.momentum = momentum1, momentum2
    for norm, batch, name in ((norm1, batch1, "primary"), (norm2, batch2, "cheap")):
        if not batch:
            norm.check_frozen(name)
    out = new_map(x, unit, out_channels)
    raw = x.new_empty(0) if primary_weight is None else new_map(x, unit, unit.maps)
    stats1, stats2 = new_floats(x, 2, unit.maps), new_floats(x, 2, unit.cheap)
    if unit.images == 0:
        stats1.zero_()
        stats2.zero_()
        return out, raw, stats1, stats2
    source, target, taps = as_map(x, unit.last), as_map(out, unit.last), cheap_weight.contiguous()
    maps = source
    if primary_weight is not None:
        maps = as_map(raw, unit.last)
    if primary_weight is not None or batch1:
        weight = None if primary_weight is None else primary_weight.contiguous()
        into = None if primary_weight is None else maps
        partials = run_product(unit, source, weight, norm1, into, normalise=False, statistics=batch1)
        if partials is not None:
            norm1.from_partials(partials)
    norm1.conv_bias = None  # the raw maps have it
    final1: Tensor | None = stats1
    if batch2:
        partials = run_expand(unit, maps, taps, norm1, norm2, None, stats=(stats1, None))
        norm1.finish()
        norm1.from_stats(stats1)
        assert partials is not None
        norm2.from_partials(partials)
        final1 = None
    run_expand(unit, maps, taps, norm1, norm2, target, write_primary=True, stats=(final1, stats2))
    norm1.finish()
    norm2.finish()
    return out, raw, stats1, stats2
