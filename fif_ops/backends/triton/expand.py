"""The cheap half: raw primary maps to their cheap maps, and to the primary half of the output; or statistics alone.

Program (s, block, slot): the cheap maps number s of BC primary maps, on tiles slot, slot + slots, ... of BP pixels,
counted through the whole batch. Normalisation and activation are worked out anew at each of the K * K taps: cheaper
than a round trip, and no program waits for another. The programs of s = 0 also write the primary maps.
Bytes per pixel: M read (K * K times from the first-level cache), M + N written; for statistics nothing is written.
Limit: memory in channels_last; the load units in NCHW, where shifted 16-bit rows come two bytes at a time.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    activate,
    add_tile,
    channel_offsets,
    cheap_map,
    flat_rows,
    pixel_offsets,
    save_statistics,
    scale_shift,
    statistics,
    store_partials,
    strides,
)


@triton.jit
def expand_kernel(
    raw, raw_batch, raw_step,
    weight,  # [N, K, K]
    source1, slots1, conv_bias1, weight1, bias1, mean1, var1, eps1,  # normalisation of the primary maps
    source2, slots2, conv_bias2, weight2, bias2, mean2, var2, eps2,  # and of the cheap ones
    out, out_batch, out_step,
    partials,  # [slots, 3, N] or None: of the cheap maps before normalisation; then there is no output
    stats1, stats2, momentum1, momentum2,  # [2, M] and [2, N] to write, or None
    images, height, width, rows, columns, maps, kept_primary, kept_cheap, tiles, slots,
    BC: tl.constexpr, BP: tl.constexpr, VI: tl.constexpr, VO: tl.constexpr, VW: tl.constexpr, VN: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, LAST: tl.constexpr,
    ACTIVATION1: tl.constexpr, ACTIVATION2: tl.constexpr, FROM1: tl.constexpr, FROM2: tl.constexpr,
    UPDATE1: tl.constexpr, UPDATE2: tl.constexpr, WRITE_PRIMARY: tl.constexpr,
):  # fmt: skip
    """UPDATE: whether running statistics take a step. The primary half has kept_primary maps, the cheap kept_cheap."""
    raw_batch, raw_step = strides(raw_batch, raw_step, VI)
    out_batch, out_step = strides(out_batch, out_step, VO)
    width, maps, kept_primary, kept_cheap = width * VW, maps * VN, kept_primary * VN, kept_cheap * VN
    cheap = maps * S
    blocks = tl.cdiv(maps, BC)
    s = tl.program_id(0) % S
    slot = tl.program_id(0) // S // blocks
    source = tl.program_id(0) // S % blocks * BC + tl.arange(0, BC)
    ok = source < maps
    channel = source * S + s

    m1, rstd1, variance1 = statistics(source, ok, maps, source1, slots1, mean1, var1, eps1, conv_bias1, FROM1)
    scale1, shift1 = scale_shift(source, ok, m1, rstd1, weight1, bias1, conv_bias1, FROM1)
    if (slot == 0) & (s == 0):
        if UPDATE1:
            save_statistics(stats1, mean1, var1, source, ok, maps, m1, rstd1, variance1, None, momentum1)
        else:
            save_statistics(stats1, None, None, source, ok, maps, m1, rstd1, variance1, None, momentum1)
    if partials is None:
        m2, rstd2, variance2 = statistics(channel, ok, cheap, source2, slots2, mean2, var2, eps2, conv_bias2, FROM2)
        scale2, shift2 = scale_shift(channel, ok, m2, rstd2, weight2, bias2, conv_bias2, FROM2)
        if slot == 0:
            if UPDATE2:
                save_statistics(stats2, mean2, var2, channel, ok, cheap, m2, rstd2, variance2, conv_bias2, momentum2)
            else:
                save_statistics(stats2, None, None, channel, ok, cheap, m2, rstd2, variance2, None, momentum2)

    count = tl.full((), 0.0, tl.float32)
    seen_mean = tl.zeros((BC,), dtype=tl.float32)
    squares = tl.zeros((BC,), dtype=tl.float32)
    for tile in range(slot, tiles, slots):
        image, h, w, inside = flat_rows(tile, images, height, width, BP)
        pixel = h * width + w
        at = pixel_offsets(image, pixel, raw_batch, raw_step, LAST)[None, :]
        raw_places = raw + at + channel_offsets(source, raw_step, LAST)[:, None]
        z = cheap_map(raw_places, raw_step, weight + channel * (K * K), ok, h, w, inside, height, width, rows, columns,
                      scale1, shift1, K, ACTIVATION1, LAST)  # fmt: skip
        if partials is not None:
            count, seen_mean, squares = add_tile(z, inside, count, seen_mean, squares)
        else:
            places = out + pixel_offsets(image, pixel, out_batch, out_step, LAST)[None, :]
            if WRITE_PRIMARY:
                mask = (ok & (source < kept_primary) & (s == 0))[:, None] & inside[None, :]
                v = tl.load(raw_places, mask=mask, other=0.0).to(tl.float32)
                y = activate(v * scale1[:, None] + shift1[:, None], ACTIVATION1)
                primary_places = places + channel_offsets(source, out_step, LAST)[:, None]
                tl.store(primary_places, y.to(out.dtype.element_ty), mask=mask)
            z = activate(z * scale2[:, None] + shift2[:, None], ACTIVATION2)
            mask = (ok & (channel < kept_cheap))[:, None] & inside[None, :]
            places += channel_offsets(channel + kept_primary, out_step, LAST)[:, None]
            tl.store(places, z.to(out.dtype.element_ty), mask=mask)
    if partials is not None:
        store_partials(partials, slot, channel, ok, cheap, count, seen_mean, squares)
