"""Backward through the primary convolution and its normalisation, and the reduction of all partial sums.

The gradient of a raw map is scale * (g - a - b * normalised map): draw, worked out from g and raw wherever it is read.
primary_backward_kernel has two roles, by program number:
  - input: BC channels of x on flat tiles of BP pixels of x, W1 transposed times draw, over the group's maps;
  - weight: BC maps x BC channels of W1, the sum over its share of the pixels of draw times x; partial, [slots, M, C/G].
Without a primary convolution draw itself goes out (maps_gradient_kernel).
reduce_kernel adds the partial sums of everything, in a fixed order, one program per BLOCK numbers.
Bytes per pixel: input 2 M read, C written; weight 2 M (per block of channels) + C (per block of maps) read. Limit:
memory; the tensor cores where M and C are several hundred.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    STATS,
    channel_offsets,
    flat_tile,
    group_channels,
    parameter,
    pixel_offsets,
    statistics,
    strides,
    total,
)


@triton.jit
def raw_gradient(channel, ok, channels, stats, weight, partials, slots, count, BATCH: tl.constexpr):
    """Per channel (mean, scale, a, b) of draw = scale * g - a - b * (raw - mean)."""
    mean, rstd, _ = statistics(channel, ok, channels, stats, 0, None, None, 0.0, None, STATS)
    scale = rstd
    if weight is not None:
        scale = scale * parameter(weight, channel, ok)
    a = tl.zeros(channel.shape, dtype=tl.float32)
    b = tl.zeros(channel.shape, dtype=tl.float32)
    if BATCH:
        b = total(partials, channel, ok, 2 * channels, slots) / count * scale * rstd
        a = total(partials, channel + channels, ok, 2 * channels, slots) / count * scale
    return mean, scale, a, b


@triton.jit
def draw_tile(g_places, raw_places, mask, mean, scale, a, b, BATCH: tl.constexpr):
    """[channels, pixels] of draw, zero outside ``mask``."""
    g = tl.load(g_places, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
    if BATCH:
        v = tl.load(raw_places, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(mask, g - a[:, None] - b[:, None] * (v - mean[:, None]), 0.0)
    return g


@triton.jit
def maps_gradient_kernel(
    grad_maps, maps_batch, maps_step, raw, raw_batch, raw_step, grad_x, grad_x_batch, grad_x_step,
    stats, norm_weight, partials, partial_slots,
    images, pixels, maps, count, tiles, slots,
    BC: tl.constexpr, BP: tl.constexpr,
    VM: tl.constexpr, VI: tl.constexpr, VO: tl.constexpr, VP: tl.constexpr, VN: tl.constexpr,
    LAST: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    maps_batch, maps_step = strides(maps_batch, maps_step, VM)
    raw_batch, raw_step = strides(raw_batch, raw_step, VI)
    grad_x_batch, grad_x_step = strides(grad_x_batch, grad_x_step, VO)
    pixels, maps = pixels * VP, maps * VN
    blocks = tl.cdiv(maps, BC)
    slot = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    ok = channel < maps
    mean, scale, a, b = raw_gradient(channel, ok, maps, stats, norm_weight, partials, partial_slots, count, BATCH)
    for tile in range(slot, tiles, slots):
        image, pixel, inside = flat_tile(tile, images, pixels, BP)
        g_places = grad_maps + pixel_offsets(image, pixel, maps_batch, maps_step, LAST)[None, :]
        g_places += channel_offsets(channel, maps_step, LAST)[:, None]
        raw_places = raw + pixel_offsets(image, pixel, raw_batch, raw_step, LAST)[None, :]
        raw_places += channel_offsets(channel, raw_step, LAST)[:, None]
        out = grad_x + pixel_offsets(image, pixel, grad_x_batch, grad_x_step, LAST)[None, :]
        out += channel_offsets(channel, grad_x_step, LAST)[:, None]
        mask = ok[:, None] & inside[None, :]
        draw = draw_tile(g_places, raw_places, mask, mean, scale, a, b, BATCH)
        tl.store(out, draw.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def input_role(
    program, grad_maps, maps_batch, maps_step, raw, raw_batch, raw_step, grad_x, grad_x_batch, grad_x_step,
    weight, stats, norm_weight, partials, partial_slots, coefficients,
    images, pixels, width, x_pixels, x_width, depth, maps, groups, count, tiles, slots,
    BC: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    STRIDE: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(depth, BC) * groups
    slot = program // blocks
    group, channel, ok = group_channels(program % blocks, depth, groups, BC)
    in_group = channel - group * depth
    coefficients += program.to(tl.int64) * 4 * maps
    for start in range(0, maps, BK):  # once a program, since the sums behind them take a while to add up
        k = start + tl.arange(0, BK)
        k_ok = k < maps
        mean, scale, a, b = raw_gradient(
            group * maps + k, k_ok, maps * groups, stats, norm_weight, partials, partial_slots, count, BATCH
        )
        tl.store(coefficients + k, mean, mask=k_ok)
        tl.store(coefficients + maps + k, scale, mask=k_ok)
        tl.store(coefficients + 2 * maps + k, a, mask=k_ok)
        tl.store(coefficients + 3 * maps + k, b, mask=k_ok)
    tl.debug_barrier()
    for tile in range(slot, tiles, slots):
        image, x_pixel, inside = flat_tile(tile, images, x_pixels, BP)
        if STRIDE == 1:
            pixel = x_pixel
            used = inside
        else:  # pixels that no window starts at have no gradient
            x_row = x_pixel // x_width
            x_column = x_pixel % x_width
            pixel = x_row // STRIDE * width + x_column // STRIDE
            used = inside & (x_row % STRIDE == 0) & (x_column % STRIDE == 0)
        g_pixels = grad_maps + pixel_offsets(image, pixel, maps_batch, maps_step, LAST)[None, :]
        raw_pixels = raw + pixel_offsets(image, pixel, raw_batch, raw_step, LAST)[None, :]
        acc = tl.zeros((BC, BP), dtype=tl.float32)
        for start in range(0, maps, BK):
            k = start + tl.arange(0, BK)
            k_ok = k < maps
            mean = tl.load(coefficients + k, mask=k_ok, other=0.0)
            scale = tl.load(coefficients + maps + k, mask=k_ok, other=0.0)
            a = tl.load(coefficients + 2 * maps + k, mask=k_ok, other=0.0)
            b = tl.load(coefficients + 3 * maps + k, mask=k_ok, other=0.0)
            row = group * maps + k
            draw = draw_tile(
                g_pixels + channel_offsets(row, maps_step, LAST)[:, None],
                raw_pixels + channel_offsets(row, raw_step, LAST)[:, None],
                k_ok[:, None] & used[None, :], mean, scale, a, b, BATCH,
            )  # fmt: skip
            at = row.to(tl.int64)[None, :] * depth + in_group[:, None]
            w = tl.load(weight + at, mask=ok[:, None] & k_ok[None, :], other=0.0)
            acc = tl.dot(w, draw.to(w.dtype), acc, input_precision=PRECISION)
        out = grad_x + pixel_offsets(image, x_pixel, grad_x_batch, grad_x_step, LAST)[None, :]
        out += channel_offsets(channel, grad_x_step, LAST)[:, None]
        tl.store(out, acc.to(grad_x.dtype.element_ty), mask=ok[:, None] & inside[None, :])


@triton.jit
def weight_role(
    program, grad_maps, maps_batch, maps_step, raw, raw_batch, raw_step, x, x_batch, x_step,
    stats, norm_weight, partials, partial_slots, partials_weight,
    images, pixels, width, x_width, depth, maps, groups, count, tiles, slots,
    BC: tl.constexpr, BP: tl.constexpr,
    STRIDE: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(depth, BC)
    blocks = tl.cdiv(maps, BC) * groups
    slot = program // (columns * blocks)
    group, row, row_ok = group_channels(program // columns % blocks, maps, groups, BC)
    column = program % columns * BC + tl.arange(0, BC)
    column_ok = column < depth
    mean, scale, a, b = raw_gradient(
        row, row_ok, maps * groups, stats, norm_weight, partials, partial_slots, count, BATCH
    )
    acc = tl.zeros((BC, BC), dtype=tl.float32)
    for tile in range(slot, tiles, slots):
        image, pixel, inside = flat_tile(tile, images, pixels, BP)
        x_pixel = pixel if STRIDE == 1 else pixel // width * (STRIDE * x_width) + pixel % width * STRIDE
        g_places = grad_maps + pixel_offsets(image, pixel, maps_batch, maps_step, LAST)[None, :]
        raw_places = raw + pixel_offsets(image, pixel, raw_batch, raw_step, LAST)[None, :]
        draw = draw_tile(
            g_places + channel_offsets(row, maps_step, LAST)[:, None],
            raw_places + channel_offsets(row, raw_step, LAST)[:, None],
            row_ok[:, None] & inside[None, :], mean, scale, a, b, BATCH,
        )  # fmt: skip
        at = pixel_offsets(image, x_pixel, x_batch, x_step, LAST)[:, None]
        at += channel_offsets(group * depth + column, x_step, LAST)[None, :]
        v = tl.load(x + at, mask=inside[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(draw.to(v.dtype), v, acc, input_precision=PRECISION)
    at = (slot.to(tl.int64) * maps * groups + row)[:, None] * depth + column[None, :]
    tl.store(partials_weight + at, acc, mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def primary_backward_kernel(
    grad_maps, maps_batch, maps_step, raw, raw_batch, raw_step, x, x_batch, x_step, grad_x, grad_x_batch, grad_x_step,
    weight, stats, norm_weight, partials, partial_slots,
    coefficients,  # [input programs, 4, M/G], private to each
    partials_weight,  # [weight slots, M, C/G]
    images, pixels, width, x_pixels, x_width, depth, maps, groups, count,
    input_tiles, input_slots, input_programs, weight_tiles, weight_slots,
    BC: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    VM: tl.constexpr, VI: tl.constexpr, VX: tl.constexpr, VO: tl.constexpr, VP: tl.constexpr,
    VK: tl.constexpr, VN: tl.constexpr,
    STRIDE: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr,
    INPUT: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """The first input_programs programs do the input, the others the weight; INPUT, WEIGHT: what is wanted."""
    maps_batch, maps_step = strides(maps_batch, maps_step, VM)
    raw_batch, raw_step = strides(raw_batch, raw_step, VI)
    x_batch, x_step = strides(x_batch, x_step, VX)
    grad_x_batch, grad_x_step = strides(grad_x_batch, grad_x_step, VO)
    pixels, x_pixels, depth, maps = pixels * VP, x_pixels * VP, depth * VK, maps * VN
    program = tl.program_id(0)
    if program < input_programs:
        if INPUT:
            input_role(program, grad_maps, maps_batch, maps_step, raw, raw_batch, raw_step,
                       grad_x, grad_x_batch, grad_x_step, weight, stats, norm_weight, partials, partial_slots,
                       coefficients, images, pixels, width, x_pixels, x_width, depth, maps, groups, count,
                       input_tiles, input_slots, BC, BP, BK, STRIDE, LAST, PRECISION, BATCH)  # fmt: skip
    elif WEIGHT:
        weight_role(program - input_programs, grad_maps, maps_batch, maps_step, raw, raw_batch, raw_step,
                    x, x_batch, x_step, stats, norm_weight, partials, partial_slots, partials_weight,
                    images, pixels, width, x_width, depth, maps, groups, count,
                    weight_tiles, weight_slots, BC, BP, STRIDE, LAST, PRECISION, BATCH)  # fmt: skip


@triton.jit
def add_slots(partials, slots, out, length, block, BLOCK: tl.constexpr):
    """Numbers block * BLOCK and on: out = sum over the slots of partials [slots, length]."""
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < length
    result = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(slots):
        result += tl.load(partials + at, mask=ok, other=0.0)
        partials += length
    tl.store(out + at, result.to(out.dtype.element_ty), mask=ok)


@triton.jit
def reduce_kernel(
    norm1, norm1_slots, grad_norm1, norm1_length,
    norm2, norm2_slots, grad_norm2, norm2_length,
    cheap, cheap_slots, grad_cheap, cheap_length,
    primary, primary_slots, grad_primary, primary_length,  # None and 0 where it is not wanted
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    end1 = tl.cdiv(norm1_length, BLOCK)
    end2 = end1 + tl.cdiv(norm2_length, BLOCK)
    end3 = end2 + tl.cdiv(cheap_length, BLOCK)
    if block < end1:
        add_slots(norm1, norm1_slots, grad_norm1, norm1_length, block, BLOCK)
    elif block < end2:
        add_slots(norm2, norm2_slots, grad_norm2, norm2_length, block - end1, BLOCK)
    elif block < end3:
        add_slots(cheap, cheap_slots, grad_cheap, cheap_length, block - end2, BLOCK)
    elif primary is not None:
        add_slots(primary, primary_slots, grad_primary, primary_length, block - end3, BLOCK)
