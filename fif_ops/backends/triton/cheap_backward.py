"""Backward through the cheap half: first the sums that its batch normalisation needs, then all of its gradients.

sums_kernel, program (s, block, slot): as in expand.py, on flat tiles; y and z are recomputed from raw.
cheap_backward_kernel, program (block, slot): BC primary maps on tiles of TI images x TH rows x TW columns with a halo
(as in fused.py), and one after another their S cheap maps:
  1. z on the whole tile, from raw; with grad and the sums, dz, the gradient before the cheap normalisation.
  2. dz into the program's private scratch, barrier, K * K shifted reads back: each adds to the gradient of the primary
     map, and times y to one number of the cheap kernel's gradient. Barrier.
Then the primary activation's slope, and partial sums for the primary normalisation.
Bytes per pixel: M + N read for the sums; M + 2 N + M (spliced) read and M written after. Limit: the first-level cache.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    STATS,
    activate,
    activation_gradient,
    channel_offsets,
    cheap_map,
    flat_rows,
    halo_tile,
    parameter,
    pixel_offsets,
    scale_shift,
    statistics,
    strides,
    total,
)


@triton.jit
def sums_kernel(
    grad, grad_batch, grad_step,
    raw, raw_batch, raw_step,
    weight,  # [N, K, K]
    stats1, weight1, bias1, stats2, weight2, bias2,  # stats: [2, channels] of mean, rstd
    partials,  # [slots, 2, N]: sums over pixels of g * normalised z, and of g
    images, height, width, rows, columns, maps, kept_primary, kept_cheap, tiles, slots,
    BC: tl.constexpr, BP: tl.constexpr, VG: tl.constexpr, VI: tl.constexpr, VW: tl.constexpr, VN: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, LAST: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """g is the gradient of the normalised cheap map."""
    grad_batch, grad_step = strides(grad_batch, grad_step, VG)
    raw_batch, raw_step = strides(raw_batch, raw_step, VI)
    width, maps, kept_primary, kept_cheap = width * VW, maps * VN, kept_primary * VN, kept_cheap * VN
    cheap = maps * S
    blocks = tl.cdiv(maps, BC)
    slot = tl.program_id(0) // S // blocks
    source = tl.program_id(0) // S % blocks * BC + tl.arange(0, BC)
    ok = source < maps
    channel = source * S + tl.program_id(0) % S
    m1, rstd1, _ = statistics(source, ok, maps, stats1, 0, None, None, 0.0, None, STATS)
    scale1, shift1 = scale_shift(source, ok, m1, rstd1, weight1, bias1, None, STATS)
    m2, rstd2, _ = statistics(channel, ok, cheap, stats2, 0, None, None, 0.0, None, STATS)
    scale2, shift2 = scale_shift(channel, ok, m2, rstd2, weight2, bias2, None, STATS)
    plain = tl.zeros((BC,), dtype=tl.float32)
    centred = tl.zeros((BC,), dtype=tl.float32)
    for tile in range(slot, tiles, slots):
        image, h, w, inside = flat_rows(tile, images, height, width, BP)
        pixel = h * width + w
        at = pixel_offsets(image, pixel, raw_batch, raw_step, LAST)[None, :]
        raw_places = raw + at + channel_offsets(source, raw_step, LAST)[:, None]
        z = cheap_map(raw_places, raw_step, weight + channel * (K * K), ok, h, w, inside, height, width,
                      rows, columns, scale1, shift1, K, ACTIVATION, LAST)  # fmt: skip
        at = pixel_offsets(image, pixel, grad_batch, grad_step, LAST)[None, :]
        at += channel_offsets(channel + kept_primary, grad_step, LAST)[:, None]
        mask = (ok & (channel < kept_cheap))[:, None] & inside[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        g = activation_gradient(g, z * scale2[:, None] + shift2[:, None], ACTIVATION)
        g = tl.where(mask, g, 0.0)
        plain += tl.sum(g, 1)
        centred += tl.sum(g * (z - m2[:, None]), 1)
    at = partials + slot * (2 * cheap) + channel
    tl.store(at, centred * rstd2, mask=ok)
    tl.store(at + cheap, plain, mask=ok)


@triton.jit
def cheap_backward_kernel(  # noqa: PLR0915, one pass over a tile, top to bottom
    grad, grad_batch, grad_step,
    raw, raw_batch, raw_step,
    weight,  # [N, K, K]
    stats1, weight1, bias1, stats2, weight2, bias2,
    partials2, slots2,  # what sums_kernel left
    scratch,  # [programs, TI * TH * TW, BC], or [programs, BC, TI * TH * TW] in NCHW
    grad_maps, maps_batch, maps_step,  # gradient of the normalised primary maps, out
    partials1,  # [slots, 2, M]: sums over pixels of that times the normalised map, and of that
    partials_weight,  # [slots, N, K * K]
    images, height, width, rows, columns, maps, kept_primary, kept_cheap, tiles_h, tiles_w, tiles, slots, count,
    BC: tl.constexpr, TI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, HH: tl.constexpr, HW: tl.constexpr,
    VG: tl.constexpr, VI: tl.constexpr, VO: tl.constexpr, VW: tl.constexpr, VN: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr, LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    """BATCH: whether the cheap statistics are the batch's, over ``count`` pixels. TAPS: power of two, S * K * K fit."""
    BP: tl.constexpr = TI * TH * TW
    R: tl.constexpr = K // 2
    grad_batch, grad_step = strides(grad_batch, grad_step, VG)
    raw_batch, raw_step = strides(raw_batch, raw_step, VI)
    maps_batch, maps_step = strides(maps_batch, maps_step, VO)
    width, maps, kept_primary, kept_cheap = width * VW, maps * VN, kept_primary * VN, kept_cheap * VN
    blocks = tl.cdiv(maps, BC)
    slot = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    ok = channel < maps
    m1, rstd1, _ = statistics(channel, ok, maps, stats1, 0, None, None, 0.0, None, STATS)
    scale1, shift1 = scale_shift(channel, ok, m1, rstd1, weight1, bias1, None, STATS)
    place = tl.arange(0, BP)
    lane = tl.arange(0, BC)
    tap_of = tl.arange(0, TAPS)
    scratch += tl.program_id(0).to(tl.int64) * (BC * BP)
    if LAST:
        kept_places = scratch + place[None, :] * BC + lane[:, None]
    else:
        kept_places = scratch + place[None, :] + lane[:, None] * BP
    weight_sums = tl.zeros((BC, TAPS), dtype=tl.float32)
    plain = tl.zeros((BC,), dtype=tl.float32)
    centred = tl.zeros((BC,), dtype=tl.float32)
    for tile in range(slot, tiles, slots):
        image, h, w, inside, own = halo_tile(tile, tiles_h, tiles_w, images, height, width, TI, TH, TW, HH, HW)
        pixel = h * width + w
        at = pixel_offsets(image, pixel, raw_batch, raw_step, LAST)[None, :]
        raw_places = raw + at + channel_offsets(channel, raw_step, LAST)[:, None]
        grad_places = grad + pixel_offsets(image, pixel, grad_batch, grad_step, LAST)[None, :]
        own_mask = ok[:, None] & own[None, :]
        dy = tl.zeros((BC, BP), dtype=tl.float32)
        for s in range(S):
            cheap = channel * S + s
            z = cheap_map(raw_places, raw_step, weight + cheap * (K * K), ok, h, w, inside, height, width,
                          rows, columns, scale1, shift1, K, ACTIVATION, LAST)  # fmt: skip
            m2, rstd2, _ = statistics(cheap, ok, maps * S, stats2, 0, None, None, 0.0, None, STATS)
            scale2, shift2 = scale_shift(cheap, ok, m2, rstd2, weight2, bias2, None, STATS)
            to_channel = channel_offsets(cheap + kept_primary, grad_step, LAST)[:, None]
            mask = (ok & (cheap < kept_cheap))[:, None] & inside[None, :]
            g = tl.load(grad_places + to_channel, mask=mask, other=0.0).to(tl.float32)
            dz = activation_gradient(g, z * scale2[:, None] + shift2[:, None], ACTIVATION)
            if BATCH:
                of_product = total(partials2, cheap, ok, 2 * maps * S, slots2) / count
                of_gradient = total(partials2, cheap + maps * S, ok, 2 * maps * S, slots2) / count
                dz -= of_gradient[:, None] + (z - m2[:, None]) * (rstd2 * of_product)[:, None]
            dz = tl.where(inside[None, :], dz * scale2[:, None], 0.0)
            tl.store(kept_places, dz.to(scratch.dtype.element_ty))
            tl.debug_barrier()
            v = tl.load(raw_places, mask=own_mask, other=0.0).to(tl.float32)
            y = activate(v * scale1[:, None] + shift1[:, None], ACTIVATION)
            y = tl.where(own_mask, y, 0.0)
            for i in range(rows):
                row_ok = own & (h + R >= i) & (h + R < height + i)
                for j in range(K if columns is None else columns):
                    near = row_ok & (w >= j - R) & (w < width + (j - R))
                    to = (R - i) * TW + (R - j)
                    d = tl.load(kept_places + to * (BC if LAST else 1), mask=near[None, :], other=0.0).to(tl.float32)
                    tap = tl.load(weight + cheap * (K * K) + i * K + j, mask=ok, other=0.0).to(tl.float32)
                    dy += d * tap[:, None]
                    here = tap_of == s * (K * K) + i * K + j
                    weight_sums += tl.where(here[None, :], tl.sum(d * y, 1)[:, None], 0.0)
            tl.debug_barrier()
        v = tl.load(raw_places, mask=own_mask, other=0.0).to(tl.float32)
        mask = (ok & (channel < kept_primary))[:, None] & own[None, :]
        dy += tl.load(grad_places + channel_offsets(channel, grad_step, LAST)[:, None], mask=mask, other=0.0)
        g = activation_gradient(dy, v * scale1[:, None] + shift1[:, None], ACTIVATION)
        g = tl.where(own_mask, g, 0.0)
        at = pixel_offsets(image, pixel, maps_batch, maps_step, LAST)[None, :]
        at += channel_offsets(channel, maps_step, LAST)[:, None]
        tl.store(grad_maps + at, g.to(grad_maps.dtype.element_ty), mask=own_mask)
        plain += tl.sum(g, 1)
        centred += tl.sum(g * (v - parameter(stats1, channel, ok)[:, None]), 1)
    at = partials1 + slot * (2 * maps) + channel
    tl.store(at, centred * rstd1, mask=ok)
    tl.store(at + maps, plain, mask=ok)
    at = partials_weight + (slot * maps + channel).to(tl.int64)[:, None] * (S * K * K) + tap_of[None, :]
    tl.store(at, weight_sums, mask=ok[:, None] & (tap_of < S * K * K)[None, :])
