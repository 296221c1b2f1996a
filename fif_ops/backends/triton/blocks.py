"""Pieces that the kernels share: addresses, the primary product, activations, statistics. None is launched by itself.

Tiles are [channels, pixels] in both memory formats; ``LAST`` (channels_last) only changes addresses, and Triton lays
lanes along whatever is contiguous. Sizes and strides come in units of a constexpr (``VX`` and the like), a power of two
that divides them, which is how the compiler learns that 128-bit accesses are aligned.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# Where mean and rstd of a normalisation come from.
NONE = tl.constexpr(0)  # there is no normalisation: mean 0, rstd 1
RUNNING = tl.constexpr(1)  # running mean and variance
PARTIALS = tl.constexpr(2)  # the kernel before left [slots, 3, channels]: count, mean, sum of squared deviations
STATS = tl.constexpr(3)  # [2, channels] of mean, rstd


# ---- addresses: 64 bits wherever a stride is a factor


@triton.jit
def wide(value):
    """A whole number in 64 bits, also where the argument is known when compiling."""
    return tl.full((), 1, tl.int64) * value


@triton.jit
def strides(batch, step, VECTOR: tl.constexpr):
    """A map's strides from their units."""
    return wide(batch) * VECTOR, wide(step) * VECTOR


@triton.jit
def channel_offsets(channel, step, LAST: tl.constexpr):
    return channel.to(tl.int64) if LAST else channel.to(tl.int64) * step


@triton.jit
def pixel_offsets(image, pixel, batch, step, LAST: tl.constexpr):
    return image.to(tl.int64) * batch + (pixel.to(tl.int64) * step if LAST else pixel.to(tl.int64))


@triton.jit
def shift_offset(shift, step, LAST: tl.constexpr):
    """How far the pixel ``shift`` further on is."""
    return wide(shift) * step if LAST else shift


@triton.jit
def flat_tile(tile, images, pixels, BP: tl.constexpr):
    """Images and pixels of tile number ``tile`` of BP pixels, counted through the whole batch; which of them exist."""
    first = wide(tile) * BP
    image0 = first // pixels
    place = (first - image0 * pixels).to(tl.int32) + tl.arange(0, BP)
    image = image0.to(tl.int32) + place // pixels
    return image, place % pixels, image < images


@triton.jit
def flat_rows(tile, images, height, width, BP: tl.constexpr):
    """The same as images, rows and columns, by divisions that tell the compiler how far neighbours lie together."""
    first = wide(tile) * BP
    image0 = first // (height * width)
    place = (first - image0 * (height * width)).to(tl.int32) + tl.arange(0, BP)
    row = place // width
    image = image0.to(tl.int32) + row // height
    return image, row % height, place % width, image < images


@triton.jit
def halo_tile(tile, tiles_h, tiles_w, images, height, width,
              TI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, HH: tl.constexpr, HW: tl.constexpr):  # fmt: skip
    """Tile of TI images, TH rows and TW columns, of which the outer HH rows and HW columns belong to neighbours.

    Image, row and column of each place; whether it is inside the map; whether it is this tile's own pixel.
    """
    place = tl.arange(0, TI * TH * TW)
    row = place // TW % TH
    column = place % TW
    image = tile // (tiles_h * tiles_w) * TI + place // (TH * TW)
    h = tile // tiles_w % tiles_h * (TH - 2 * HH) + row - HH
    w = tile % tiles_w * (TW - 2 * HW) + column - HW
    inside = (image < images) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    own = inside & (row >= HH) & (row < TH - HH) & (column >= HW) & (column < TW - HW)
    return image, h, w, inside, own


@triton.jit
def group_channels(block, channels, groups, BC: tl.constexpr):
    """Group, channels and their mask of block number ``block``; blocks do not cross groups of ``channels``."""
    blocks = tl.cdiv(channels, BC)
    group = block // blocks
    inner = block % blocks * BC + tl.arange(0, BC)
    return group, group * channels + inner, inner < channels


# ---- the primary product


@triton.jit
def primary_product(x_pixels, pixel_ok, weight_rows, channel_ok, depth, x_step,
                    BC: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
                    PRECISION: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """[BC, BP] of weight rows times the pixels' ``depth`` input channels, in float32."""
    acc = tl.zeros((BC, BP), dtype=tl.float32)
    for start in range(0, depth, BK):
        k = start + tl.arange(0, BK)
        k_ok = k < depth
        w = tl.load(weight_rows[:, None] + k[None, :], mask=channel_ok[:, None] & k_ok[None, :], other=0.0)
        x_ok = k_ok[:, None] & pixel_ok[None, :]
        x = tl.load(x_pixels[None, :] + channel_offsets(k, x_step, LAST)[:, None], mask=x_ok, other=0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return acc


# ---- activations; the codes are those of csrc/problem.h. Comparisons, not min and max, so that NaN passes.


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        v = tl.where(v < 0.0, 0.0, v)
    if ACTIVATION == 2:
        v = tl.where(v < 0.0, 0.0, tl.where(v > 6.0, 6.0, v))
    if ACTIVATION == 3:
        gate = tl.where(v + 3.0 < 0.0, 0.0, v + 3.0)
        v = v * tl.where(gate > 6.0, 6.0, gate) * (1.0 / 6.0)
    if ACTIVATION == 4:
        v = v / (1.0 + tl.exp(-v))
    if ACTIVATION == 5:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.70710678118654752))
    return v


@triton.jit
def activation_gradient(g, u, ACTIVATION: tl.constexpr):
    """d activation / d u times g, at the argument u; on a kink the slope that torch takes."""
    if ACTIVATION == 1:
        g = tl.where(u <= 0.0, 0.0, g)
    if ACTIVATION == 2:
        g = tl.where((u <= 0.0) | (u >= 6.0), 0.0, g)
    if ACTIVATION == 3:
        g = g * tl.where(u <= -3.0, 0.0, tl.where(u < 3.0, u * (1.0 / 3.0) + 0.5, 1.0))
    if ACTIVATION == 4:
        s = 1.0 / (1.0 + tl.exp(-u))
        g = g * s * (1.0 + u * (1.0 - s))
    if ACTIVATION == 5:
        cdf = 0.5 * (1.0 + tl.erf(u * 0.70710678118654752))
        g = g * (cdf + u * 0.39894228040143268 * tl.exp(u * u * -0.5))
    return g


# ---- statistics and normalisation, one value a channel, in float32


@triton.jit
def parameter(values, channel, ok):
    return tl.load(values + channel, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def total(partials, channel, ok, width, slots):
    """Sum over the slots of partials [slots, width] at ``channel``; always in the same order."""
    CHUNK: tl.constexpr = 32
    sums = tl.zeros((channel.shape[0], CHUNK), dtype=tl.float32)
    for start in range(0, slots, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        mask = ok[:, None] & (slot < slots)[None, :]
        at = channel.to(tl.int64)[:, None] + (slot.to(tl.int64) * width)[None, :]
        sums += tl.load(partials + at, mask=mask, other=0.0)
    return tl.sum(sums, 1)


@triton.jit
def merged(partials, channel, ok, channels, slots):
    """Mean, sum of squared deviations and count of all slots together (Chan et al.), in a fixed order."""
    CHUNK: tl.constexpr = 32
    width = 3 * channels
    counts = tl.zeros((channel.shape[0], CHUNK), dtype=tl.float32)
    sums = tl.zeros((channel.shape[0], CHUNK), dtype=tl.float32)
    for start in range(0, slots, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        mask = ok[:, None] & (slot < slots)[None, :]
        at = partials + channel[:, None] + (slot * width)[None, :]
        n = tl.load(at, mask=mask, other=0.0)
        counts += n
        sums += n * tl.load(at + channels, mask=mask, other=0.0)
    count = tl.sum(counts, 1)
    count = tl.where(ok, count, 1.0)
    mean = tl.sum(sums, 1) / count
    squares = tl.zeros((channel.shape[0], CHUNK), dtype=tl.float32)
    for start in range(0, slots, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        mask = ok[:, None] & (slot < slots)[None, :]
        at = partials + channel[:, None] + (slot * width)[None, :]
        n = tl.load(at, mask=mask, other=0.0)
        away = tl.load(at + channels, mask=mask, other=0.0) - mean[:, None]
        squares += tl.load(at + 2 * channels, mask=mask, other=0.0) + n * away * away
    return mean, tl.sum(squares, 1), count


@triton.jit
def add_tile(v, ok, count, mean, squares):
    """Merges the pixels ``ok`` of v [BC, BP] into count, mean and sum of squared deviations (Chan et al.)."""
    added = tl.sum(ok.to(tl.float32), 0)
    tile_mean = tl.sum(tl.where(ok[None, :], v, 0.0), 1) / added
    away = tl.where(ok[None, :], v - tile_mean[:, None], 0.0)
    both = count + added
    delta = tile_mean - mean
    squares += tl.sum(away * away, 1) + delta * delta * (count * added / both)
    return both, mean + delta * (added / both), squares


@triton.jit
def store_partials(partials, slot, channel, ok, channels, count, mean, squares):
    at = partials + slot * (3 * channels) + channel
    tl.store(at, tl.zeros_like(mean) + count, mask=ok)
    tl.store(at + channels, mean, mask=ok)
    tl.store(at + 2 * channels, squares, mask=ok)


@triton.jit
def statistics(channel, ok, channels, source, slots, mean, var, eps, conv_bias, FROM: tl.constexpr):
    """Mean, rstd and, from partials, the unbiased variance. ``source``: partials or statistics, where they are used."""
    variance = tl.zeros(channel.shape, dtype=tl.float32)
    if FROM == RUNNING:
        m = parameter(mean, channel, ok)
        if conv_bias is not None:  # normalising a convolution without its bias needs the mean without it too
            m -= parameter(conv_bias, channel, ok)
        rstd = 1.0 / tl.sqrt(parameter(var, channel, ok) + eps)
    elif FROM == PARTIALS:
        m, squares, count = merged(source, channel, ok, channels, slots)
        rstd = 1.0 / tl.sqrt(squares / count + eps)
        variance = squares / tl.maximum(count - 1.0, 1.0)
    elif FROM == STATS:
        m = parameter(source, channel, ok)
        rstd = parameter(source + channels, channel, ok)
    else:
        m = tl.zeros(channel.shape, dtype=tl.float32)
        rstd = m + 1.0
    return m, rstd, variance


@triton.jit
def scale_shift(channel, ok, mean, rstd, weight, bias, conv_bias, FROM: tl.constexpr):
    """The normalised value is v * scale + shift; without a normalisation the convolution's bias is the shift."""
    scale = rstd
    if weight is not None:
        scale = scale * parameter(weight, channel, ok)
    shift = -mean * scale
    if FROM == NONE:
        if conv_bias is not None:
            shift += parameter(conv_bias, channel, ok)
    elif bias is not None:
        shift += parameter(bias, channel, ok)
    return scale, shift


@triton.jit
def save_statistics(stats, running_mean, running_var, channel, ok, channels, mean, rstd, variance, conv_bias, momentum):
    """[mean, rstd] into ``stats``, and the running statistics' step, each if it is there."""
    if stats is not None:
        tl.store(stats + channel, mean, mask=ok)
        tl.store(stats + channels + channel, rstd, mask=ok)
    if running_mean is not None:
        if conv_bias is not None:
            mean += parameter(conv_bias, channel, ok)
        old = parameter(running_mean, channel, ok)
        fresh = old * (1.0 - momentum) + mean * momentum
        tl.store(running_mean + channel, fresh.to(running_mean.dtype.element_ty), mask=ok)
        old = parameter(running_var, channel, ok)
        fresh = old * (1.0 - momentum) + variance * momentum
        tl.store(running_var + channel, fresh.to(running_var.dtype.element_ty), mask=ok)


# ---- the cheap convolution, from maps in memory


@triton.jit
def add_tap(acc, raw, raw_step, weight, channel_ok, w, row_ok, i, j, width, scale, shift,
            K: tl.constexpr, ACTIVATION: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    R: tl.constexpr = K // 2
    ok = (row_ok & (w >= R - j) & (w < width + (R - j)))[None, :]  # w alone, whose alignment is known
    to = shift_offset((i - R) * width + (j - R), raw_step, LAST)
    v = tl.load(raw + to, mask=channel_ok[:, None] & ok, other=0.0).to(tl.float32)
    y = activate(v * scale[:, None] + shift[:, None], ACTIVATION)
    tap = tl.load(weight + i * K + j, mask=channel_ok, other=0.0).to(tl.float32)
    return acc + tl.where(ok, y, 0.0) * tap[:, None]


@triton.jit
def cheap_map(raw, raw_step, weight, channel_ok, h, w, pixel_ok, height, width, rows, columns, scale, shift,
              K: tl.constexpr, ACTIVATION: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Depthwise K x K over activated maps, recomputed at every tap. ``raw``: [BC, BP] pointers; ``weight``: [BC].

    The zero padding comes after normalisation and activation. ``rows`` is K once more, as a number that the compiler
    does not know: it would unroll all taps and run out of registers. So is ``columns``, or None to unroll a row, of
    which the middle one is aligned in NCHW.
    """
    R: tl.constexpr = K // 2
    acc = tl.zeros(raw.shape, dtype=tl.float32)
    for i in range(rows):
        row_ok = pixel_ok & (h + i >= R) & (h + i < height + R)
        if columns is None:
            for j in tl.static_range(K):
                acc = add_tap(acc, raw, raw_step, weight, channel_ok, w, row_ok, i, j, width, scale, shift,
                              K, ACTIVATION, LAST)  # fmt: skip
        else:
            for j in range(columns):
                acc = add_tap(acc, raw, raw_step, weight, channel_ok, w, row_ok, i, j, width, scale, shift,
                              K, ACTIVATION, LAST)  # fmt: skip
    return acc
