"""The primary product: maps [M] of x's channels [C/groups], normalised and activated, or raw with partial statistics.

Program (block, slot): BC maps of one group on tiles slot, slot + slots, ... of BP pixels, counted through the whole
batch, so that small maps fill tiles. Chunks of BK channels of x go to the tensor cores through Triton's own pipeline;
blocks of maps are the fastest index of the grid, so that x comes from memory once, then from the second-level cache.
Bytes per pixel: C read, M written. Limit: memory; the tensor cores where C is several hundred.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    activate,
    add_tile,
    channel_offsets,
    flat_tile,
    group_channels,
    pixel_offsets,
    primary_product,
    scale_shift,
    statistics,
    store_partials,
    strides,
)


@triton.jit
def product_kernel(
    x, x_batch, x_step, x_width,
    weight,  # [M, C/groups]
    conv_bias, norm_weight, norm_bias, mean, var, eps,
    out, out_batch, out_step,
    partials,  # [slots, 3, M] or None
    images, pixels, width, depth, maps, groups, tiles, slots,
    BC: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    VX: tl.constexpr, VK: tl.constexpr, VO: tl.constexpr, VP: tl.constexpr, VN: tl.constexpr,
    STRIDE: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr, FROM: tl.constexpr, MULTIPLY: tl.constexpr, STORE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Without MULTIPLY the maps are x itself, for its statistics alone."""
    x_batch, x_step = strides(x_batch, x_step, VX)
    out_batch, out_step = strides(out_batch, out_step, VO)
    pixels, depth, maps = pixels * VP, depth * VK, maps * VN
    blocks = tl.cdiv(maps, BC) * groups
    slot = tl.program_id(0) // blocks
    group, channel, ok = group_channels(tl.program_id(0) % blocks, maps, groups, BC)
    if MULTIPLY:
        weight_rows = weight + channel.to(tl.int64) * depth
    if NORM:
        m, rstd, _ = statistics(channel, ok, maps * groups, None, 0, mean, var, eps, conv_bias, FROM)
        scale, shift = scale_shift(channel, ok, m, rstd, norm_weight, norm_bias, conv_bias, FROM)
    count = tl.full((), 0.0, tl.float32)
    seen_mean = tl.zeros((BC,), dtype=tl.float32)
    squares = tl.zeros((BC,), dtype=tl.float32)
    for tile in range(slot, tiles, slots):
        image, pixel, inside = flat_tile(tile, images, pixels, BP)
        x_pixel = pixel if STRIDE == 1 else pixel // width * (STRIDE * x_width) + pixel % width * STRIDE
        x_places = x + pixel_offsets(image, x_pixel, x_batch, x_step, LAST)
        mask = ok[:, None] & inside[None, :]
        if MULTIPLY:
            x_places += channel_offsets(group * depth + tl.zeros((1,), tl.int32), x_step, LAST)
            y = primary_product(x_places, inside, weight_rows, ok, depth, x_step, BC, BP, BK, PRECISION, LAST)
        else:
            at = x_places[None, :] + channel_offsets(channel, x_step, LAST)[:, None]
            y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            y = activate(y * scale[:, None] + shift[:, None], ACTIVATION)
        elif conv_bias is not None:
            y += tl.load(conv_bias + channel, mask=ok, other=0.0).to(tl.float32)[:, None]
        y = y.to(x.dtype.element_ty)
        if STORE:
            at = pixel_offsets(image, pixel, out_batch, out_step, LAST)[None, :]
            tl.store(out + at + channel_offsets(channel, out_step, LAST)[:, None], y, mask=mask)
        if partials is not None:
            count, seen_mean, squares = add_tile(y.to(tl.float32), inside, count, seen_mean, squares)
    if partials is not None:
        store_partials(partials, slot, channel, ok, maps * groups, count, seen_mean, squares)
