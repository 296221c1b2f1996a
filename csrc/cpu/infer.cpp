// Inference: primary product, normalisation, activation, depthwise, normalisation, activation, concatenation, in one
// pass.
//
// A task takes one image and some blocks of channels and walks down the map in tiles of rows. Per tile and block it
// computes the primary maps (one halo of rows ahead) straight into their place in the output, then reads them back from
// cache for the depthwise part, which goes to its own place. Memory traffic per pixel: C read, M + N written, nothing
// else. Limit: memory for large maps with few channels, the multiply-add units elsewhere.
#include "pass.h"

namespace fif::FIF_ISA {
namespace {

// A block of channels in rows [row, stop) of image n. The slot names the private maps of an unspliced unit.
struct Place {
  int64_t n, block, row, stop, slot;
  int thread;
};

// Walks the unit: primary(place), then cheap(place) one halo of rows behind. Where there are too few (image, block)
// pairs for the threads, all of primary runs before cheap, each cut by rows.
template <class Primary, class Cheap>
void sweep(const Problem& p, const Threads& threads, int64_t blocks, int64_t rows, Primary primary, Cheap cheap) {
  if (p.batch * blocks < threads.count) {
    const int64_t cuts = min_of<int64_t>(threads.count, p.height);
    auto by_rows = [&](auto& part) {
      parallel(threads, p.batch * cuts, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / cuts, cut = task % cuts;
          for (int64_t b = 0; b < blocks; ++b)
            part(Place{n, b, cut * p.height / cuts, (cut + 1) * p.height / cuts, n, thread});
        }
      });
    };
    by_rows(primary);
    by_rows(cheap);
    return;
  }
  const int64_t halo = p.kernel / 2;
  const int64_t groups = p.batch % threads.count == 0 ? 1 : min_of<int64_t>(blocks, threads.count);
  parallel(threads, p.batch * groups, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / groups, group = task % groups;
      for (int64_t r = 0; r < p.height; r += rows) {
        const int64_t stop = min_of(p.height, r + rows);
        const int64_t from = r == 0 ? 0 : min_of(p.height, r + halo), to = min_of(p.height, stop + halo);
        for (int64_t b = group * blocks / groups; b < (group + 1) * blocks / groups; ++b) {
          if (from < to) primary(Place{n, b, from, to, thread, thread});
          cheap(Place{n, b, r, stop, thread, thread});
        }
      }
    }
  });
}

// Where the primary maps go: the front of the output, or scratch that only the cheap part reads.
template <class T>
struct PrimaryMaps {
  Scratch<T> scratch;
  Output map;
  PrimaryMaps(const Problem& p, const InferArgs& a, int64_t slots)
      : scratch(p.splice ? 0 : slots * p.primary * p.pixels()) {
    map = a.out;
    if (!p.splice) map = {scratch.get(), p.primary * p.pixels(), p.channels_last ? p.primary : p.pixels()};
  }
  T* at(const Problem& p, const Place& at) const {
    return static_cast<T*>(map.data) + (p.splice ? at.n : at.slot) * map.batch;
  }
};

template <class T, int K>
void infer_planar(const Problem& p, const InferArgs& a, const Threads& threads) {
  using A = Compute<T>;
  const Computed<T> primary_weight(a.primary_weight, p.primary * p.in_channels);
  const Computed<T> cheap_weight(a.cheap_weight, p.cheap() * K * K);
  const ScaleShift<A> primary_norm(a.primary, p.primary), cheap_norm(a.cheap, p.cheap());
  const int64_t blocks = ceil_div(p.primary, kTileRows), block = ceil_div(p.primary, blocks);
  const PrimaryMaps<T> maps(p, a, max_of<int64_t>(threads.count, p.batch * blocks < threads.count ? p.batch : 0));
  const Clamp<A> clamp(p.activation);

  auto primary = [&](const Place& at) {
    const int64_t m = at.block * block, pixel = at.row * p.width;
    gemm(Gemm<A, T, T>{.a = primary_weight.get() + m * p.in_channels,
                       .a_row = p.in_channels,
                       .a_k = 1,
                       .b = static_cast<const T*>(a.x.data) + at.n * a.x.batch + pixel,
                       .b_k = a.x.step,
                       .c = maps.at(p, at) + m * maps.map.step + pixel,
                       .c_row = maps.map.step,
                       .rows = min_of(block, p.primary - m),
                       .cols = (at.stop - at.row) * p.width,
                       .depth = p.in_channels,
                       .finish = Finish::by_row,
                       .scale = primary_norm.scale() + m,
                       .shift = primary_norm.shift() + m,
                       .activation = p.activation});
  };
  auto cheap = [&](const Place& at) {
    for (int64_t m = at.block * block; m < min_of((at.block + 1) * block, p.primary); ++m) {
      const T* in = maps.at(p, at) + m * maps.map.step;
      for (int64_t j = m * p.multiplier; j < (m + 1) * p.multiplier; ++j) {
        const int64_t channel = p.kept_primary() + j;
        if (channel >= p.out_channels) return;
        T* out = static_cast<T*>(a.out.data) + at.n * a.out.batch + channel * a.out.step;
        const Vec<A> scale = splat<A>(cheap_norm.scale()[j]), shift = splat<A>(cheap_norm.shift()[j]);
        depthwise_plane<K, A>(in, p.height, p.width, at.row, at.stop, cheap_weight.get() + j * K * K,
                              [&](int64_t pixel, Vec<A> v, Mask mask) {
                                v = activate<A>(v * scale + shift, p.activation, clamp);
                                if (!kFreeMasks && is_full<A>(mask))
                                  store(out + pixel, v);
                                else
                                  store(out + pixel, v, mask);
                              });
      }
    }
  };
  sweep(p, threads, blocks, tile_rows(p, p.in_channels * sizeof(T)), primary, cheap);
}

template <class T, int K>
void infer_channels_last(const Problem& p, const InferArgs& a, const Threads& threads) {
  using A = Compute<T>;
  constexpr int L = kLanes<A>;
  constexpr int64_t kVectors = 3;  // of channels in a block
  const Transposed<T> primary_weight(a.primary_weight, p.primary, p.in_channels);
  const Transposed<T> cheap_weight(a.cheap_weight, p.cheap(), K * K);
  const ScaleShift<A> primary_norm(a.primary, p.primary), cheap_norm(a.cheap, p.cheap());
  const int64_t vectors = ceil_div(p.primary, L), blocks = ceil_div(vectors, kVectors);
  const int64_t block = ceil_div(vectors, blocks) * L;
  const PrimaryMaps<T> maps(p, a, max_of<int64_t>(threads.count, p.batch * blocks < threads.count ? p.batch : 0));
  const Clamp<A> clamp(p.activation);
  constexpr int64_t kPixels = 4 * kTileRows;
  const Scratch<A> wide(sizeof(T) == sizeof(A) ? 0 : threads.count * kPixels * p.in_channels);

  auto primary = [&](const Place& at) {
    const int64_t m = at.block * block;
    if (m >= p.primary) return;
    Gemm<A, A, T> g{.a = nullptr,
                    .a_row = a.x.step,
                    .a_k = 1,
                    .b = primary_weight.get() + m,
                    .b_k = p.primary,
                    .c = maps.at(p, at) + at.row * p.width * maps.map.step + m,
                    .c_row = maps.map.step,
                    .rows = (at.stop - at.row) * p.width,
                    .cols = min_of(block, p.primary - m),
                    .depth = p.in_channels,
                    .finish = Finish::by_column,
                    .scale = primary_norm.scale() + m,
                    .shift = primary_norm.shift() + m,
                    .activation = p.activation};
    const T* x = static_cast<const T*>(a.x.data) + at.n * a.x.batch + at.row * p.width * a.x.step;
    if constexpr (sizeof(T) == sizeof(A)) {
      g.a = x;
      gemm(g);
    } else {
      // The broadcast operand must be in the compute type: some pixels at a time through a buffer.
      A* buffer = wide.get() + at.thread * kPixels * p.in_channels;
      g.a = buffer;
      g.a_row = p.in_channels;
      const int64_t pixels = g.rows;
      for (int64_t i = 0; i < pixels; i += kPixels) {
        g.rows = min_of(kPixels, pixels - i);
        widen_pixels(x + i * a.x.step, a.x.step, g.rows, p.in_channels, buffer);
        gemm(g);
        g.c += kPixels * g.c_row;
      }
    }
  };
  auto cheap = [&](const Place& at) {
    for (int64_t m = at.block * block; m < min_of((at.block + 1) * block, p.primary); m += L) {
      const Mask lanes = first_lanes(min_of<int64_t>(L, p.primary - m));
      const T* in = maps.at(p, at) + m;
      for (int64_t s = 0; s < p.multiplier; ++s) {
        const int64_t j = m * p.multiplier + s, channel = p.kept_primary() + j;
        if (channel >= p.out_channels) break;
        const Mask kept = lanes & first_lanes(ceil_div(p.out_channels - channel, p.multiplier));
        Vec<A> taps[K * K];
        FIF_UNROLL for (int t = 0; t < K * K; ++t) taps[t] =
            load_strided(cheap_weight.get() + t * p.cheap() + j, p.multiplier, lanes);
        const Vec<A> scale = load_strided(cheap_norm.scale() + j, p.multiplier, lanes);
        const Vec<A> shift = load_strided(cheap_norm.shift() + j, p.multiplier, lanes);
        T* out = static_cast<T*>(a.out.data) + at.n * a.out.batch + channel;
        auto emit = [&](int64_t pixel, Vec<A> v, Mask) {
          v = activate<A>(v * scale + shift, p.activation, clamp);
          T* at = out + pixel * a.out.step;
          if (p.multiplier != 1)
            store_strided(at, p.multiplier, v, kept);
          else if (!kFreeMasks && is_full<A>(kept))
            store(at, v);
          else
            store(at, v, kept);
        };
        if (!kFreeMasks && is_full<A>(lanes))
          depthwise_channels<K, !kFreeMasks, A>(in, maps.map.step, lanes, p.height, p.width, at.row, at.stop, taps,
                                                emit);
        else
          depthwise_channels<K, false, A>(in, maps.map.step, lanes, p.height, p.width, at.row, at.stop, taps, emit);
      }
    }
  };
  sweep(p, threads, blocks, tile_rows(p, p.in_channels * sizeof(T)), primary, cheap);
}

}  // namespace

void infer(const Problem& p, const InferArgs& a, const Threads& threads) {
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    with_kernel_size(p.kernel, [&](auto k) {
      if (p.channels_last)
        infer_channels_last<T, decltype(k)::value>(p, a, threads);
      else
        infer_planar<T, decltype(k)::value>(p, a, threads);
    });
  });
}

}  // namespace fif::FIF_ISA
