// The parameters of a unit as kernels with lanes along channels read them: by blocks of channels, normalisations
// folded.
#pragma once

#include "parts.h"

namespace fif::FIF_ISA {

// Channels m, m + 1, ... m + width - 1 of the primary maps; lanes beyond the last channel included.
struct ChannelBlock {
  int64_t m, width;
};

// Whether the product takes bf16 numbers as they lie in x: by tiles, or in pairs.
inline bool tiled(const Problem& p) { return kTiles && p.dtype == Dtype::bf16 && p.channels_last; }
// Whether it takes f32 numbers in parts, by tiles. Many planes of x are not worth turning by 90 degrees.
inline bool in_parts(const Problem& p) {
  if (p.dtype != Dtype::f32 || !p.has_primary || !parts_pay(p.depth(), p.primary)) return false;
  return p.channels_last || p.primary_kernel > 1 || p.in_channels <= 2 * p.primary;
}
inline PartChunks part_chunks(const Problem& p) {
  return {p.primary_kernel, int64_t(p.primary_kernel) * p.in_channels};
}
inline bool paired(const Problem& p) { return kBf16Dot && !kTiles && p.dtype == Dtype::bf16 && p.channels_last; }

// The channels of a unit in blocks of whole vectors, as few and as even as may be.
template <class A>
struct Blocks {
  static constexpr int kVectors = 3, L = kLanes<A>;
  const int64_t vectors, count;

  explicit Blocks(const Problem& p, int64_t threads = 1)
      : vectors(ceil_div(p.primary, L)), count(in_parts(p) ? few(threads) : number(tiled(p))) {}
  ChannelBlock operator[](int64_t i) const {
    const int64_t from = i * vectors / count * L;
    return {from, (i + 1) * vectors / count * L - from};
  }
  int64_t most() const { return ceil_div(vectors, count) * L; }  // channels of the widest

 private:
  // In parts, whose constants lie the same however they are cut, x is taken apart for every block.
  int64_t few(int64_t threads) const {
    const int64_t least = ceil_div(vectors, 4 * kVectors);
    return min_of(ceil_div(least, threads) * threads, ceil_div(vectors, 2));
  }
  int64_t number(bool tiled) const {
    // Four vectors at once, where the registers hold six pixels of them, want fewer loads than two times two.
    if (kRegisters == 32 && vectors == 4) return 1;
    // Tiles read all of x for every block; an even number of them, for two threads.
    if (tiled && vectors > 4) return ceil_div(vectors, 4 * kVectors) * 2;
    return ceil_div(vectors, kVectors);
  }
};

// Whether so many channels fit into half a vector.
template <class A>
constexpr bool half_wanted(int64_t channels) {
  return kHalves && sizeof(A) == 4 && channels <= kLanes<A> / 2;
}

// The parameters of a unit by blocks of channels; lanes beyond the last channel hold zeros.
template <class T>
class Constants {
  using A = Compute<T>;
  static constexpr int L = kLanes<A>;
  const Problem& p;
  const Blocks<A> blocks;
  const int64_t depth, padded;  // depth: of the product, 0 without one
  const int64_t lines;          // of numbers, or of pairs, for a channel
  const int64_t taps, depthwise_taps;
  A* const data;

 public:
  Constants(const Problem& problem, const void* memory)
      : p(problem), blocks(p), depth(p.has_primary ? p.depth() : 0), padded(blocks.vectors * L),
        lines(tiled(p)          ? TileChunks(depth).width() / 2
                  : in_parts(p) ? part_chunks(p).stream() / kTileDepth
                                : depth),
        taps(int64_t(p.kernel) * p.kernel), depthwise_taps(int64_t(p.depthwise_kernel) * p.depthwise_kernel),
        data(static_cast<A*>(const_cast<void*>(memory))) {}

  int64_t bytes() const { return (depthwise(padded, 0) - primary(0)) * int64_t(sizeof(A)); }
  // [depth, width of the block that begins at channel m]; where they are paired, [ceil(depth / 2), width] pairs; for
  // tiles [vectors of the block, pairs of all chunks, L], in parts as tile_gemm.h has them
  A* primary(int64_t m) const { return data + m * lines; }
  A* scale(int64_t m) const { return primary(padded) + m; }
  A* shift(int64_t m) const { return scale(m) + padded; }
  // [K * K + 1, L]: taps times scale, then shift, of the cheap maps number s of the vector at channel m
  A* cheap(int64_t m, int64_t s) const { return shift(padded) + (m * p.multiplier + s * L) * (taps + 1); }
  // The same of the depthwise convolution, for the primary maps (part 0) or their cheap maps number part - 1.
  A* depthwise(int64_t m, int64_t part) const {
    return cheap(padded, 0) + (depthwise_taps ? (m * (1 + p.multiplier) + part * L) * (depthwise_taps + 1) : 0);
  }

  void pack(const InferArgs& a) const {
    for (int64_t i = 0; p.has_primary && i < blocks.count; ++i) {
      if (tiled(p))
        pack_tiles(a, blocks[i]);
      else if (in_parts(p))
        pack_parts(a, blocks[i]);
      else
        pack_primary(a, blocks[i]);
    }
    for (int64_t m = 0; m < padded; m += L) {
      const int64_t channels = max_of<int64_t>(0, min_of<int64_t>(L, p.primary - m));
      const Mask lanes = first_lanes(channels);
      affine(a.primary, m, 1, lanes, scale(m), shift(m));
      for (int64_t s = 0; s < p.multiplier; ++s)
        pack_taps(a.cheap_weight, a.cheap, taps, m * p.multiplier + s, p.multiplier, lanes, cheap(m, s));
      for (int64_t part = 0; depthwise_taps && part <= p.multiplier; ++part) {
        const int64_t step = part ? p.multiplier : 1;
        const int64_t channel = part ? p.kept_primary() + m * step + part - 1 : m;
        const int64_t kept = part || p.splice ? ceil_div(max_of<int64_t>(0, p.out_channels - channel), step) : 0;
        pack_taps(a.depthwise_weight, a.depthwise, depthwise_taps, channel, step, first_lanes(min_of(channels, kept)),
                  depthwise(m, part));
      }
    }
  }

 private:
  // Where number k of the product's depth lies among a map's weights: depth runs over rows and columns of the window,
  // then channels, as a patch of a channels_last map lies in memory.
  int64_t place(int64_t k) const { return k % p.in_channels * (depth / p.in_channels) + k / p.in_channels; }

  void pack_tiles(const InferArgs& a, ChannelBlock block) const {
    const auto [m, width] = block;
    const T* weight = static_cast<const T*>(a.primary_weight) + m * depth;
    T* const to = reinterpret_cast<T*>(primary(m));
    memset(to, 0, width * lines * sizeof(A));
    for (int64_t i = 0; i < min_of(width, p.primary - m); ++i)
      for (int64_t k = 0; k < depth; ++k)
        to[((i / L * lines + k / 2) * L + i % L) * 2 + k % 2] = weight[i * depth + place(k)];
  }

  void pack_parts(const InferArgs& a, ChannelBlock block) const {
    if constexpr (sizeof(T) == 4) {
      const auto [m, width] = block;
      const PartChunks chunks = part_chunks(p);
      const float* weight = static_cast<const float*>(a.primary_weight) + m * depth;
      bf16* const to = reinterpret_cast<bf16*>(primary(m));
      memset(to, 0, width * lines * sizeof(A));
      for (int64_t i = 0; i < min_of(width, p.primary - m); ++i)
        for (int64_t k = 0; k < chunks.count(); ++k)
          for (int64_t n = 0; n < chunks.numbers(k); ++n)
            for (int part = 0; part < kParts; ++part)
              to[i / L * chunks.stream() + (k * kParts + part) * kTileNumbers + chunks.in_lanes(i % L, n)] =
                  part_of(weight[i * depth + place(k / chunks.each * chunks.depth + chunks.begin(k) + n)], part);
    }
  }

  void pack_primary(const InferArgs& a, ChannelBlock block) const {
    const auto [m, width] = block;
    const int64_t channels = min_of(width, p.primary - m);
    const T* weight = static_cast<const T*>(a.primary_weight) + m * depth;
    if (channels < width) memset(primary(m), 0, width * depth * sizeof(A));
    if (depth == p.in_channels)
      transpose(weight, depth, channels, depth, primary(m), width);
    else
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < channels; ++i) primary(m)[k * width + i] = to_compute(weight[i * depth + place(k)]);
    if (paired(p)) pair_up(primary(m), width);
  }

  // Rows 2k and 2k + 1 become row k; the values are bf16 ones, whose low halves are empty.
  void pair_up(A* rows, int64_t width) const {
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t i = 0; i < width; i += L) {
        const VecU even = (VecU)load(rows + k * width + i);
        const VecU odd = k + 1 < depth ? (VecU)load(rows + (k + 1) * width + i) : VecU{};
        store(rows + k / 2 * width + i, (Vec<A>)(even >> 16 | odd));
      }
  }

  // Of channels j, j + step, ...
  static void pack_taps(const void* weight, const Affine& norm, int64_t count, int64_t j, int64_t step, Mask lanes,
                        A* to) {
    A factor[L];
    affine(norm, j, step, lanes, factor, to + count * L);
    for (int64_t t = 0; t < count; ++t)
      store(to + t * L,
            load(factor) * load_strided(static_cast<const T*>(weight) + j * count + t, step * count, lanes));
  }
  static void affine(const Affine& norm, int64_t j, int64_t step, Mask lanes, A* scale, A* shift) {
    auto get = [&](const void* values, A otherwise) {
      return values ? load_strided(static_cast<const A*>(values) + j, step, lanes) : splat<A>(otherwise);
    };
    const Vec<A> factor = get(norm.rstd, 1) * get(norm.weight, 1);
    store(scale, factor);
    store(shift, get(norm.bias, 0) - get(norm.mean, 0) * factor);
  }
};

}  // namespace fif::FIF_ISA
