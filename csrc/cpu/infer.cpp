// Inference: primary product, normalisation, activation, depthwise, normalisation, activation, concatenation, in one
// pass.
//
// A task takes one image and some blocks of channels and walks down the map in tiles of rows. Per tile and block it
// computes the primary maps (one halo of rows ahead) straight into their place in the output, then reads them back from
// cache for the depthwise part, which goes to its own place. Memory traffic per pixel: C read, M + N written, nothing
// else. Limit: memory for large maps with few channels, the multiply-add units elsewhere.
#include "../kept.h"
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
    if (!p.splice) map = {scratch.get(), p.primary * p.pixels(), p.pixels()};
  }
  T* at(const Problem& p, const Place& at) const {
    return static_cast<T*>(map.data) + (p.splice ? at.n : at.slot) * map.batch;
  }
};

// out[i] = activation(in[i] * scale(i) + shift(i)), for maps that another convolution made.
template <class A, class In, class Out, class Scale, class Shift>
void normalise(const In* in, Out* out, int64_t count, Activation activation, Scale scale, Shift shift) {
  with_activation<A>(activation, [&](auto act) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const Mask m = first_lanes(min_of<int64_t>(kLanes<A>, count - i));
      store(out + i, act.value(load(in + i, m) * scale(i, m) + shift(i, m)), m);
    }
  });
}

template <class T, int K>
void infer_planar(const Problem& p, const InferArgs& a, const Threads& threads) {
  using A = Compute<T>;
  const Computed<T> primary_weight(a.primary_weight, p.has_primary ? p.primary * p.in_channels : 0);
  const Computed<T> cheap_weight(a.cheap_weight, p.cheap() * K * K);
  const ScaleShift<A> primary_norm(a.primary, p.primary), cheap_norm(a.cheap, p.cheap());
  constexpr int64_t kAhead = 2 * kLanes<A>;  // the next tile's pixels, in most blocks
  const int64_t blocks = ceil_div(p.primary, kTileRows), block = ceil_div(p.primary, blocks);
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

// ---- lanes along channels: channels_last maps, and planes of few pixels, where rows would waste lanes

// The parameters of a unit by blocks of channels, in whole vectors; lanes beyond the last channel hold zeros.
template <class A>
struct Blocks {
  static constexpr int kVectors = 3;  // of channels in a block
  int64_t count, width;               // blocks, channels of one

  explicit Blocks(const Problem& p)
      : count(ceil_div(ceil_div(p.primary, kLanes<A>), kVectors)),
        width(ceil_div(ceil_div(p.primary, kLanes<A>), count) * kLanes<A>) {
    count = ceil_div(p.primary, width);
  }
};

// Two sums over everything, of the words and of the sums so far: any one word that changes shows in the first, words
// that change places in the second.
class ContentHash {
 public:
  void add(const void* values, int64_t bytes) {
    const char* at = static_cast<const char*>(values);
    if (!at) {
      add(VecU{} + 1u);
      return;
    }
    for (; bytes >= kVectorBytes; bytes -= kVectorBytes, at += kVectorBytes)
      add(*(const VectorOf<uint32_t, kVectorBytes>::unaligned*)at);
    VecU rest{};
    memcpy(&rest, at, bytes);
    add(rest);
  }
  KeptKey key(const int64_t (&numbers)[6]) const {
    KeptKey key{{0x243f6a8885a308d3, 0x13198a2e03707344}, {}};
    auto mix = [&](uint64_t value) {
      key.content[0] = (key.content[0] ^ value) * 0x9e3779b97f4a7c15;
      key.content[0] ^= key.content[0] >> 29;
      key.content[1] = (key.content[1] + value) * 0xc2b2ae3d27d4eb4f;
      key.content[1] ^= key.content[1] >> 31;
    };
    for (int i = 0; i < kVectorBytes / 4; ++i) mix(uint64_t(sums_[i]) << 32 | words_[i]);
    for (int i = 0; i < 6; ++i) mix(key.numbers[i] = numbers[i]);
    return key;
  }

 private:
  FIF_INLINE void add(VecU v) {
    words_ += v;
    sums_ += words_;
  }
  VecU words_{}, sums_{};
};

template <class T>
class Parameters {
  using A = Compute<T>;
  static constexpr int L = kLanes<A>;
  const Problem& p;
  const int64_t width, depth, taps, padded;  // depth: of the product, 0 without one
  Kept memory_;

 public:
  Parameters(const Problem& problem, const InferArgs& a, const Blocks<A>& blocks)
      : p(problem), width(blocks.width), depth(p.has_primary ? p.in_channels : 0), taps(int64_t(p.kernel) * p.kernel),
        padded(blocks.count * width),
        memory_(key(p, a), padded * (depth + 2 + p.multiplier * (taps + 1)) * int64_t(sizeof(A))) {
    if (!memory_.fresh) return;
    pack(a);
    memory_.publish();
  }
  // Whether the product takes bf16 numbers in pairs, as they lie in x.
  static bool paired(const Problem& p) { return kBf16Dot && p.dtype == Dtype::bf16 && p.channels_last; }
  // [C, width] of the block that begins at channel m; where they are paired, [ceil(C / 2), width] pairs
  A* primary(int64_t m) const { return static_cast<A*>(memory_.data) + m * depth; }
  A* scale(int64_t m) const { return primary(padded) + m; }
  A* shift(int64_t m) const { return scale(m) + padded; }
  // [K * K + 1, L]: taps times scale, then shift, of the cheap maps number s of the vector at channel m
  A* cheap(int64_t m, int64_t s) const { return shift(padded) + (m * p.multiplier + s * L) * (taps + 1); }

 private:
  static KeptKey key(const Problem& p, const InferArgs& a) {
    ContentHash hash;
    hash.add(a.primary_weight, p.primary * p.in_channels * int64_t(sizeof(T)));  // nothing without a product
    hash.add(a.cheap_weight, p.cheap() * p.kernel * p.kernel * int64_t(sizeof(T)));
    const Affine* const norms[] = {&a.primary, &a.cheap};
    for (const Affine* norm : norms) {
      const int64_t bytes = (norm == &a.primary ? p.primary : p.cheap()) * int64_t(sizeof(A));
      hash.add(norm->mean, bytes);
      hash.add(norm->rstd, bytes);
      hash.add(norm->weight, bytes);
      hash.add(norm->bias, bytes);
    }
    return hash.key({p.primary, p.in_channels, p.multiplier, p.kernel, int64_t(p.dtype), paired(p)});
  }

  void pack(const InferArgs& a) const {
    const T* weight = static_cast<const T*>(a.primary_weight);
    for (int64_t m = 0; p.has_primary && m < p.primary; m += width) {
      const int64_t channels = min_of(width, p.primary - m);
      if (channels < width) memset(primary(m), 0, width * p.in_channels * sizeof(A));
      transpose(weight + m * p.in_channels, p.in_channels, channels, p.in_channels, primary(m), width);
      if (paired(p)) pair_up(primary(m));
    }
    const T* cheap_weight = static_cast<const T*>(a.cheap_weight);
    for (int64_t m = 0; m < padded; m += L) {
      const Mask lanes = first_lanes(max_of<int64_t>(0, min_of<int64_t>(L, p.primary - m)));
      put(a.primary, m, 1, lanes, scale(m), shift(m));
      for (int64_t s = 0; s < p.multiplier; ++s) {
        const int64_t j = m * p.multiplier + s;
        A *to = cheap(m, s), factor[L];
        put(a.cheap, j, p.multiplier, lanes, factor, to + taps * L);
        for (int64_t t = 0; t < taps; ++t)
          store(to + t * L, load(factor) * load_strided(cheap_weight + j * taps + t, p.multiplier * taps, lanes));
      }
    }
  }

  // Rows 2k and 2k + 1 become row k; the values are bf16 ones, whose low halves are empty.
  void pair_up(A* rows) const {
    for (int64_t k = 0; k < p.in_channels; k += 2)
      for (int64_t i = 0; i < width; i += L) {
        const VecU even = (VecU)load(rows + k * width + i);
        const VecU odd = k + 1 < p.in_channels ? (VecU)load(rows + (k + 1) * width + i) : VecU{};
        store(rows + k / 2 * width + i, (Vec<A>)(even >> 16 | odd));
      }
  }
  static void put(const Affine& affine, int64_t at, int64_t stride, Mask lanes, A* scale, A* shift) {
    auto get = [&](const void* values, A otherwise) {
      return values ? load_strided(static_cast<const A*>(values) + at, stride, lanes) : splat<A>(otherwise);
    };
    const Vec<A> factor = get(affine.rstd, 1) * get(affine.weight, 1);
    store(scale, factor);
    store(shift, get(affine.bias, 0) - get(affine.mean, 0) * factor);
  }
};

template <class T, int K>
class ChannelWise {
  using A = Compute<T>;
  static constexpr int L = kLanes<A>, P = K / 2;
  static constexpr int64_t kPixels = 4 * kTileRows;  // that are widened at a time
  const Problem& p;
  const InferArgs& a;
  const Blocks<A> blocks;
  const Parameters<T> parameters;
  const int64_t rows;  // of a tile
  const int64_t x_pixel, x_channel;

 public:
  ChannelWise(const Problem& problem, const InferArgs& args)
      : p(problem), a(args), blocks(p), parameters(p, a, blocks), rows(tile()), x_pixel(p.channels_last ? a.x.step : 1),
        x_channel(p.channels_last ? 1 : a.x.step) {}

  void run(const Threads& threads) const {
    const int64_t pairs = p.batch * blocks.count;
    const int64_t cuts = pairs >= threads.count ? 1 : min_of(p.height, ceil_div(threads.count, pairs));
    const int64_t tile_size = rows * p.width * blocks.width, y_size = tile_size + 2 * P * p.width * blocks.width;
    const int64_t wide_size = sizeof(T) == sizeof(A) ? 0 : kPixels * p.in_channels;
    const int64_t each = y_size + (direct() ? 0 : tile_size) + wide_size;
    const Scratch<A> memory(threads.count * each);
    parallel(threads, pairs * cuts, [&](int64_t begin, int64_t end, int thread) {
      A *y = memory.get() + thread * each, *wide = y + y_size, *z = wide + wide_size;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pair = task / cuts, cut = task % cuts;
        segment(pair / blocks.count, pair % blocks.count * blocks.width, cut * p.height / cuts,
                (cut + 1) * p.height / cuts, y, z, wide);
      }
    });
  }

 private:
  int64_t tile() const {
    constexpr int64_t kBytes = 64 * 1024, kLeast = P == 0 ? 1 : 4 * P;
    const int64_t fit = kBytes / (p.width * blocks.width * int64_t(sizeof(A)));
    return fit + 2 * P >= p.height ? p.height : min_of(p.height, max_of(fit, kLeast));
  }

  // A block of channels in rows [begin, end) of image n. y holds the primary maps of a tile and its halo, dense, in the
  // compute type; what the next tile needs of them moves to the front.
  void segment(int64_t n, int64_t m, int64_t begin, int64_t end, A* y, A* z, A* wide) const {
    const int64_t line = p.width * blocks.width;
    int64_t done = max_of<int64_t>(0, begin - P);
    for (int64_t r = begin; r < end; r += rows) {
      const int64_t stop = min_of(end, r + rows), first = r - P, reach = min_of(p.height, stop + P);
      primary(n, m, done, reach, y + (done - first) * line, wide);
      done = reach;
      cheap(n, m, r, stop, y - first * line, z);
      const int64_t next = stop - P;
      if (stop < end && next < done) memmove(y, y + (next - first) * line, (done - next) * line * sizeof(A));
    }
  }

  // The primary maps that another convolution made.
  void normalised(const T* x, int64_t m, int64_t pixels, A* y) const {
    const int64_t channels = min_of(blocks.width, p.primary - m);
    if (!p.channels_last) transpose(x, x_channel, channels, pixels, y, blocks.width);
    auto scale = [&](int64_t i, Mask) { return load(parameters.scale(m) + i); };
    auto shift = [&](int64_t i, Mask) { return load(parameters.shift(m) + i); };
    for (int64_t i = 0; i < pixels; ++i) {
      A* to = y + i * blocks.width;
      if (p.channels_last)
        normalise<A>(x + i * x_pixel, to, channels, p.activation, scale, shift);
      else
        normalise<A>(to, to, channels, p.activation, scale, shift);
    }
  }

  // Of the block at channel m, for pixels of x.
  template <class X, class Weight>
  Gemm<X, Weight, A> product(const X* x, const Weight* weight, int64_t m, int64_t pixels, A* y) const {
    return {.a = x,
            .a_row = x_pixel,
            .a_k = x_channel,
            .b = weight,
            .b_k = blocks.width,
            .c = y,
            .c_row = blocks.width,
            .rows = pixels,
            .cols = blocks.width,
            .depth = p.in_channels,
            .finish = Finish::by_column,
            .scale = parameters.scale(m),
            .shift = parameters.shift(m),
            .activation = p.activation};
  }

  void primary(int64_t n, int64_t m, int64_t row, int64_t stop, A* y, A* wide) const {
    const T* x = static_cast<const T*>(a.x.data) + n * a.x.batch + row * p.width * x_pixel;
    const int64_t pixels = (stop - row) * p.width;
    if (!p.has_primary) return normalised(x + m * x_channel, m, pixels, y);
#if defined(FIF_BF16_DOT)
    if constexpr (sizeof(T) == 2)
      if (parameters.paired(p)) {
        gemm(product(reinterpret_cast<const bf16*>(x), reinterpret_cast<const bf16_pair*>(parameters.primary(m)), m,
                     pixels, y));
        return;
      }
#endif
    Gemm<A, A, A> g = product<A, A>(nullptr, parameters.primary(m), m, pixels, y);
    if constexpr (sizeof(T) == sizeof(A)) {
      g.a = x;
      gemm(g);
    } else {
      // The broadcast operand must be in the compute type: some pixels at a time through a buffer.
      g.a = wide;
      g.a_row = p.channels_last ? p.in_channels : 1;
      g.a_k = p.channels_last ? 1 : kPixels;
      for (int64_t i = 0; i < pixels; i += kPixels) {
        g.rows = min_of(kPixels, pixels - i);
        if (p.channels_last)
          widen_lines(x + i * x_pixel, x_pixel, g.rows, p.in_channels, wide, p.in_channels);
        else
          widen_lines(x + i, x_channel, p.in_channels, g.rows, wide, kPixels);
        gemm(g);
        g.c += kPixels * g.c_row;
      }
    }
  }

  // Whether cheap maps go from registers to their place; else they make a stop in z, so that one kernel serves all.
  bool direct() const { return p.channels_last && p.multiplier == 1 && is_clamp(p.activation); }

  // y points to where row 0 of the map would be.
  void cheap(int64_t n, int64_t m0, int64_t r, int64_t stop, const A* y, A* z) const {
    T* const image = static_cast<T*>(a.out.data) + n * a.out.batch;
    const int64_t step = blocks.width, channels = min_of(step, p.primary - m0);
    const int64_t first = r * p.width, count = stop * p.width - first;
    if (p.splice && !direct()) place(y + first * step, count, channels, image, m0, 1, first);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const int64_t channel = p.kept_primary() + m0 * p.multiplier + s;
      const int64_t kept = min_of(channels, ceil_div(max_of<int64_t>(0, p.out_channels - channel), p.multiplier));
      for (int64_t m = 0; m < channels; m += L) {
        const Mask lanes = first_lanes(min_of<int64_t>(L, channels - m));
        if (direct())
          cheap_direct(y + m, m0 + m, r, stop, lanes, first_lanes(max_of<int64_t>(0, min_of<int64_t>(L, kept - m))),
                       image);
        else if (m < kept)
          cheap_vector(
              y + m, m0 + m, s, r, stop,
              [=, to = z + m - first * step](int64_t pixel, Vec<A> v) { store(to + pixel * step, v); },
              [](int64_t, Vec<A>) {});
      }
      if (direct() || kept == 0) continue;
      with_activation<A>(p.activation, [&](auto act) {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t m = 0; m < kept; m += L) store(z + i * step + m, act.value(load(z + i * step + m)));
      });
      place(z, count, kept, image, channel, p.multiplier, first);
    }
  }

  // Maps of pixels [first, first + count), dense, to channels channel, channel + stride, ... of the output.
  void place(const A* maps, int64_t count, int64_t channels, T* image, int64_t channel, int64_t stride,
             int64_t first) const {
    const int64_t step = blocks.width;
    if (!p.channels_last)
      return transpose_out(maps, step, count, channels, image + channel * a.out.step + first, a.out.step * stride);
    T* to = image + first * a.out.step + channel;
    for (int64_t i = 0; i < count; ++i, maps += step, to += a.out.step)
      for (int64_t m = 0; m < channels; m += L) {
        const Mask lanes = first_lanes(min_of<int64_t>(L, channels - m));
        if (stride == 1)
          store(to + m, load(maps + m), lanes);
        else
          store_strided(to + m * stride, stride, load(maps + m), lanes);
      }
  }

  // Lambdas hold copies: what a store might change would be read again after each.
  void cheap_direct(const A* y, int64_t m, int64_t r, int64_t stop, Mask lanes, Mask kept, T* image) const {
    const int64_t step = a.out.step;
    const Clamp<A> clamp(p.activation);
    auto emit = [=, to = image + p.kept_primary() + m](int64_t pixel, Vec<A> v) {
      __builtin_prefetch(to + (pixel + 32) * step, 1);
      store(to + pixel * step, clamp(v), kept);
    };
    if (p.splice)
      cheap_vector(y, m, 0, r, stop, emit,
                   [=, to = image + m](int64_t pixel, Vec<A> v) { store(to + pixel * step, v, lanes); });
    else if (kept)
      cheap_vector(y, m, 0, r, stop, emit, [](int64_t, Vec<A>) {});
  }

  template <class Emit, class Tee>
  void cheap_vector(const A* y, int64_t m, int64_t s, int64_t r, int64_t stop, Emit emit, Tee tee) const {
    const A* constants = parameters.cheap(m, s);
    Vec<A> taps[K * K];
    FIF_UNROLL for (int t = 0; t < K * K; ++t) taps[t] = load(constants + t * L);
    depthwise_channels<K, A>(y, blocks.width, p.height, p.width, r, stop, taps, load(constants + K * K * L), tee, emit);
  }
};

}  // namespace

void infer(const Problem& p, const InferArgs& a, const Threads& threads) {
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    with_kernel_size(p.kernel, [&](auto k) {
      if (p.channels_last || few_pixels<Compute<T>>(p))
        ChannelWise<T, decltype(k)::value>(p, a).run(threads);
      else
        infer_planar<T, decltype(k)::value>(p, a, threads);
    });
  });
}

}  // namespace fif::FIF_ISA
