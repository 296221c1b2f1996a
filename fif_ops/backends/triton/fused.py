"""Inference in one launch: primary product, normalisation, activation, cheap convolution, both halves of the output.

Program (block, slot): BC primary maps and their cheap ones, on tiles slot, slot + slots, ... of TI images x TH rows x
TW columns, of which HH rows and HW columns on every side are halo (none where a tile spans the map).
  1. Product over tile and halo, normalised, activated; zero outside the map, whatever the normalisation adds.
  2. The tile's own pixels go to the output, all of them to the program's private scratch, which stays in the
     second-level cache because the grid is no larger than the device holds at once.
  3. Barrier; the cheap convolution reads K * K shifted tiles back; barrier, since the next tile overwrites the scratch.
Of the ways compared (gathers, banded products, streamed rows, a split) this one needs the fewest registers for a tile.
Bytes per pixel: C * (1 + halo share) read, M + N written. Limit: memory for few channels, the cache for many.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    activate,
    channel_offsets,
    group_channels,
    halo_tile,
    pixel_offsets,
    primary_product,
    scale_shift,
    statistics,
    strides,
)


@triton.jit
def fused_kernel(
    x, x_batch, x_step, x_width,
    weight, cheap_weight,  # [M, C/groups], [M * S, K, K]
    conv_bias1, weight1, bias1, mean1, var1, eps1,
    conv_bias2, weight2, bias2, mean2, var2, eps2,
    out, out_batch, out_step,
    scratch,  # [programs, TI * TH * TW, BC], or [programs, BC, TI * TH * TW] in NCHW
    images, height, width, rows, columns, depth, maps, groups, kept_primary, kept_cheap, tiles_h, tiles_w, tiles, slots,
    BC: tl.constexpr, TI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr,
    HH: tl.constexpr, HW: tl.constexpr,
    VX: tl.constexpr, VK: tl.constexpr, VO: tl.constexpr, VW: tl.constexpr, VN: tl.constexpr,
    STRIDE: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, FROM1: tl.constexpr, FROM2: tl.constexpr,
):  # fmt: skip
    """``maps`` and ``depth`` are those of one group. The output: kept_primary primary maps, then kept_cheap others."""
    BP: tl.constexpr = TI * TH * TW
    R: tl.constexpr = K // 2
    x_batch, x_step = strides(x_batch, x_step, VX)
    out_batch, out_step = strides(out_batch, out_step, VO)
    width, depth, kept_primary, kept_cheap = width * VW, depth * VK, kept_primary * VN, kept_cheap * VN
    maps = maps * VN
    blocks = tl.cdiv(maps, BC) * groups
    slot = tl.program_id(0) // blocks
    group, channel, ok = group_channels(tl.program_id(0) % blocks, maps, groups, BC)
    m1, rstd1, _ = statistics(channel, ok, maps * groups, None, 0, mean1, var1, eps1, conv_bias1, FROM1)
    scale1, shift1 = scale_shift(channel, ok, m1, rstd1, weight1, bias1, conv_bias1, FROM1)

    place = tl.arange(0, BP)
    lane = tl.arange(0, BC)
    scratch += tl.program_id(0).to(tl.int64) * (BC * BP)
    if LAST:
        kept_places = scratch + place[None, :] * BC + lane[:, None]
    else:
        kept_places = scratch + place[None, :] + lane[:, None] * BP
    for tile in range(slot, tiles, slots):
        image, h, w, inside, own = halo_tile(tile, tiles_h, tiles_w, images, height, width, TI, TH, TW, HH, HW)
        x_pixel = h * width + w if STRIDE == 1 else (h * x_width + w) * STRIDE
        x_places = x + pixel_offsets(image, x_pixel, x_batch, x_step, LAST)
        x_places += channel_offsets(group * depth + tl.zeros((1,), tl.int32), x_step, LAST)
        weight_rows = weight + channel.to(tl.int64) * depth
        y = primary_product(x_places, inside, weight_rows, ok, depth, x_step, BC, BP, BK, PRECISION, LAST)
        y = activate(y * scale1[:, None] + shift1[:, None], ACTIVATION)
        y = tl.where(inside[None, :], y, 0.0).to(out.dtype.element_ty)
        tl.store(kept_places, y)
        out_places = out + pixel_offsets(image, h * width + w, out_batch, out_step, LAST)
        mask = (ok & (channel < kept_primary))[:, None] & own[None, :]
        tl.store(out_places[None, :] + channel_offsets(channel, out_step, LAST)[:, None], y, mask=mask)
        tl.debug_barrier()
        for s in range(S):
            cheap = channel * S + s
            m2, rstd2, _ = statistics(cheap, ok, maps * groups * S, None, 0, mean2, var2, eps2, conv_bias2, FROM2)
            scale2, shift2 = scale_shift(cheap, ok, m2, rstd2, weight2, bias2, conv_bias2, FROM2)
            z = tl.zeros((BC, BP), dtype=tl.float32)
            for i in range(rows):  # K, see cheap_map
                row_ok = own & (h + i >= R) & (h + i < height + R)
                for j in range(K if columns is None else columns):
                    near = row_ok & (w >= R - j) & (w < width + (R - j))
                    to = (i - R) * TW + (j - R)
                    v = tl.load(kept_places + to * (BC if LAST else 1), mask=near[None, :], other=0.0)
                    tap = tl.load(cheap_weight + cheap * (K * K) + i * K + j, mask=ok, other=0.0).to(tl.float32)
                    z += v.to(tl.float32) * tap[:, None]
            z = activate(z * scale2[:, None] + shift2[:, None], ACTIVATION)
            mask = (ok & (cheap < kept_cheap))[:, None] & own[None, :]
            to_channel = channel_offsets(cheap + kept_primary, out_step, LAST)
            tl.store(out_places[None, :] + to_channel[:, None], z.to(out.dtype.element_ty), mask=mask)
        tl.debug_barrier()
