// Inference: primary product, normalisation, activation, depthwise, normalisation, activation, concatenation, in one
// pass.
//
// A task takes one image and some blocks of channels and walks down the map in tiles of rows. Per tile and block it
// computes the primary maps (one halo of rows ahead) straight into their place in the output, then reads them back from
// cache for the depthwise part, which goes to its own place. Memory traffic per pixel: C read, M + N written, nothing
// else. Limit: memory for large maps with few channels, the multiply-add units elsewhere.
#include <type_traits>

#include "../kept.h"
#include "content.h"
#include "packed.h"

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
    if (!p.splice) map = {scratch.get(), p.primary * p.pixels(), p.pixels()};
  }
  T* at(const Problem& p, const Place& at) const {
    return static_cast<T*>(map.data) + (p.splice ? at.n : at.slot) * map.batch;
  }
};

template <class T, int K>
void infer_planar(const Problem& p, const InferArgs& a, const Threads& threads) {
  using A = Compute<T>;
  const Computed<T> primary_weight(a.primary_weight, p.has_primary ? p.primary * p.in_channels : 0);
  const Computed<T> cheap_weight(a.cheap_weight, p.cheap() * K * K);
  const ScaleShift<A> primary_norm(a.primary, p.primary), cheap_norm(a.cheap, p.cheap());
  constexpr int64_t kAhead = 2 * kLanes<A>;  // the next tile's pixels, in most blocks
  const bool by_parts = in_parts(p);
  const int64_t block = by_parts ? RowsInParts::block(p.primary, threads.count) : even_block(p.primary, kTileRows);
  const int64_t blocks = ceil_div(p.primary, block);
  const RowsInParts parts(a.primary_weight, by_parts ? p.primary : 0, p.in_channels, block, threads.count);
  const PrimaryMaps<T> maps(p, a, max_of<int64_t>(threads.count, p.batch * blocks < threads.count ? p.batch : 0));

  auto primary = [&](const Place& at) {
    const int64_t m = at.block * block, pixel = at.row * p.width;
    if (!p.has_primary) {
      for (int64_t c = m; c < min_of(m + block, p.primary); ++c)
        normalise<A>(
            static_cast<const T*>(a.x.data) + at.n * a.x.batch + c * a.x.step + pixel,
            maps.at(p, at) + c * maps.map.step + pixel, (at.stop - at.row) * p.width, p.activation,
            [&, c](int64_t, Mask) { return splat<A>(primary_norm.scale()[c]); },
            [&, c](int64_t, Mask) { return splat<A>(primary_norm.shift()[c]); });
      return;
    }
    if constexpr (std::is_same_v<T, float>)
      if (by_parts)
        return parts.multiply(m, static_cast<const float*>(a.x.data) + at.n * a.x.batch + pixel, a.x.step,
                              {.c = maps.at(p, at) + m * maps.map.step + pixel,
                               .c_row = maps.map.step,
                               .rows = min_of(block, p.primary - m),
                               .cols = (at.stop - at.row) * p.width,
                               .scale = primary_norm.scale() + m,
                               .shift = primary_norm.shift() + m,
                               .activation = p.activation},
                              at.thread);
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
                       .activation = p.activation,
                       .b_ahead = kAhead});
  };
  auto cheap = [&](const Place& at) {
    for (int64_t m = at.block * block; m < min_of((at.block + 1) * block, p.primary); ++m) {
      const T* in = maps.at(p, at) + m * maps.map.step;
      for (int64_t j = m * p.multiplier; j < (m + 1) * p.multiplier; ++j) {
        const int64_t channel = p.kept_primary() + j;
        if (channel >= p.out_channels) return;
        T* out = static_cast<T*>(a.out.data) + at.n * a.out.batch + channel * a.out.step;
        A taps[K * K];
        FIF_UNROLL for (int t = 0; t < K * K; ++t) taps[t] = cheap_weight.get()[j * K * K + t] * cheap_norm.scale()[j];
        with_activation<A>(p.activation, [&](auto activation) {
          // Holds copies: what a store might change would be read again after each.
          auto emit = [=](int64_t pixel, Vec<A> v, Mask mask) {
            if (!kFreeMasks && is_full<A>(mask))
              store(out + pixel, activation.value(v));
            else
              store(out + pixel, activation.value(v), mask);
          };
          depthwise_plane<K, A>(in, p.height, p.width, at.row, at.stop, taps, cheap_norm.shift()[j], emit);
        });
      }
    }
  };
  sweep(p, threads, blocks, tile_rows(p, p.in_channels * sizeof(T)), primary, cheap);
}

// Whether a vector along a row of the map would leave a quarter of its lanes empty.
template <class A>
bool few_pixels(const Problem& p) {
  return p.width <= kLanes<A> * 3 / 4;
}

// What packed parameters depend on.
KeptKey content_of(const Problem& p, const InferArgs& a) {
  const int64_t size = p.dtype == Dtype::f64 ? 8
      : p.dtype == Dtype::f32                ? 4
                                             : 2,
                compute = p.dtype == Dtype::f64 ? 8 : 4;
  ContentHash hash;
  hash.add(a.primary_weight, p.primary * p.depth() * size);  // nothing without a product
  hash.add(a.cheap_weight, p.cheap() * p.kernel * p.kernel * size);
  auto add = [&](const Affine& norm, int64_t channels) {
    const void* const all[] = {norm.mean, norm.rstd, norm.weight, norm.bias};
    for (const void* values : all) hash.add(values, channels * compute);
  };
  add(a.primary, p.primary);
  add(a.cheap, p.cheap());
  KeptKey key{{},
              {p.primary, p.in_channels, p.primary_kernel, p.multiplier, p.kernel, int64_t(p.dtype), p.channels_last}};
  hash.finish(key.numbers, 7, key.content);
  return key;
}

}  // namespace

uint64_t fingerprint(const void* const* parts, const int64_t* bytes, int64_t count) {
  ContentHash hash;
  for (int64_t i = 0; i < count; ++i) hash.add(parts[i], bytes[i]);
  uint64_t content[2];
  hash.finish(bytes, static_cast<int>(count), content);
  return content[0] ^ content[1];
}

void infer(const Problem& p, const InferArgs& a, const Threads& threads) {
  bool planar = !p.channels_last && p.primary_kernel == 1 && p.stride == 1 && !p.depthwise_kernel;
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    planar = planar && !few_pixels<Compute<T>>(p);
    if (planar) with_kernel_size(p.kernel, [&](auto k) { infer_planar<T, decltype(k)::value>(p, a, threads); });
  });
  if (planar) return;
  if (a.packed) return infer_channels(p, a, threads);
  Kept kept(content_of(p, a), packed_bytes(p));
  if (kept.fresh) {
    pack(p, a, kept.data);
    kept.publish();
  }
  InferArgs with_packed = a;
  with_packed.packed = kept.data;
  infer_channels(p, with_packed, threads);
}

}  // namespace fif::FIF_ISA
