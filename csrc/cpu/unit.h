// What the two training passes share: units, the order in which they are visited, and sums over the batch.
//
// Batch normalisation and the depthwise part both stay inside a channel. A unit is one channel (NCHW: lanes are pixels)
// or one vector of channels (NHWC: lanes are channels); work is done on a block of its rows in one image at a time, in
// scratch of the compute type that stays in the nearest caches, where both layouts look alike: an array of whole
// vectors. Units of one block follow each other, so that in NHWC they find its lines in cache.
//
// Sums over the batch have a fixed order for any number of threads: the blocks of all images are cut into chunks,
// whose number depends on the problem alone; a chunk is summed by one thread, then the chunks are, in order.
#pragma once

#include <type_traits>

#include "pass.h"

namespace fif::FIF_ISA {

template <class A, bool Planar>
struct Unit {
  static constexpr int kLane = kLanes<A>;

  int64_t channel;  // the (first) primary channel
  int count;        // of its channels
  Mask lanes;       // NHWC: the channels that exist

  Unit(const Problem& p, int64_t index) {
    channel = Planar ? index : index * kLane;
    count = Planar ? 1 : static_cast<int>(min_of<int64_t>(kLane, p.primary - channel));
    lanes = first_lanes(count);
  }
  static int64_t number(const Problem& p) { return Planar ? p.primary : ceil_div(p.primary, kLane); }
  // Scratch for so many pixels, of which the last may be the first of a whole vector.
  static int64_t size(int64_t pixels) { return Planar ? (pixels / kLane + 2) * kLane : pixels * kLane; }

  // One number a channel, of an array over channels (stride 1) or over cheap maps (stride S, from offset s).
  Vec<A> parameter(const A* values, int64_t stride = 1, int64_t offset = 0) const {
    const A* at = values + channel * stride + offset;
    if constexpr (Planar) return splat<A>(*at);
    return stride == 1 ? load(at, lanes) : load_strided(at, stride, lanes);
  }
  // What belongs to one channel: the sum over lanes in every lane, or each lane for itself.
  static Vec<A> total(Vec<A> v) {
    if constexpr (Planar) return splat<A>(sum_lanes<A>(v));
    return v;
  }
};

// f(vector, lanes that exist) over the vectors of so many pixels; vector i lies at i * kLane in scratch.
template <class A, bool Planar, class F>
FIF_INLINE void each_vector(int64_t pixels, F f) {
  if constexpr (Planar) {
    constexpr int L = kLanes<A>;
    const int64_t whole = pixels / L;
    for (int64_t i = 0; i < whole; ++i) f(i, kAll);
    if (whole * L < pixels) f(whole, first_lanes(pixels - whole * L));
  } else {
    for (int64_t i = 0; i < pixels; ++i) f(i, kAll);
  }
}

// A unit's pixels in an activation tensor, from `pixel` of `image` on; channels are `stride` apart. Those at or after
// `limit` do not exist: they load as zero and are not stored.
template <class T, bool Planar>
struct Plane {
  using A = Compute<T>;
  static constexpr int kLane = kLanes<A>;
  T* data = nullptr;
  int64_t step, stride;
  Mask lanes;

  template <class Pointer>
  Plane(const Unit<A, Planar>& unit, const Map<Pointer>& map, int64_t image, int64_t pixel, int64_t channel,
        int64_t stride_, int64_t limit)
      : step(Planar ? kLane : map.step), stride(stride_), lanes(0) {
    if (channel >= limit) return;
    data = (T*)map.data + image * map.batch + (Planar ? channel * map.step + pixel : channel + pixel * map.step);
    if (!Planar) lanes = unit.lanes & first_lanes(ceil_div(limit - channel, stride));
  }
  explicit operator bool() const { return data != nullptr; }

  FIF_INLINE Vec<A> load(int64_t i, Mask m) const {
    const T* at = data + i * step;
    if constexpr (!Planar) {
      if (stride != 1) return load_strided(at, stride, lanes);
      __builtin_prefetch(at + kLane);  // the next unit's, far from this one's next pixel
      m = lanes;
    }
    return !kFreeMasks && is_full<A>(m) ? FIF_ISA::load(at) : FIF_ISA::load(at, m);
  }
  FIF_INLINE void store(int64_t i, Vec<A> v, Mask m) const {
    T* at = data + i * step;
    if constexpr (!Planar) {
      if (stride != 1) return store_strided(at, stride, v, lanes);
      __builtin_prefetch(at + kLane, 1);
      m = lanes;
    }
    if (!kFreeMasks && is_full<A>(m))
      FIF_ISA::store(at, v);
    else
      FIF_ISA::store(at, v, m);
  }
};

// Two sums that run together, in two levels: what a long sum loses to rounding grows with the number of its terms, so
// sixty-four at a time are summed before they meet the rest.
template <class A>
class PairSum {
 public:
  Vec<A> first{}, second{};  // complete after finish()
  FIF_INLINE void add(Vec<A> a, Vec<A> b) {
    low_first_ += a;
    low_second_ += b;
    if (++count_ == 64) finish();
  }
  FIF_INLINE void finish() {
    first += low_first_;
    second += low_second_;
    low_first_ = low_second_ = Vec<A>{};
    count_ = 0;
  }

 private:
  Vec<A> low_first_{}, low_second_{};
  int count_ = 0;
};

// A unit's rows [from, to) in image n, of which its chunk has `seen` so many pixels before.
struct Work {
  int64_t chunk, n, from, to, seen, unit;
  int thread;
};

// Visits every unit in blocks of at most `rows` rows.
class Sweep {
 public:
  Sweep(const Problem& p, const Threads& threads, int64_t rows, int64_t units)
      : p_(p), threads_(threads), units_(units), blocks_(ceil_div(p.height, rows)) {
    constexpr int64_t kTasks = 16;  // enough for as many threads
    chunks = min_of(items(), kTasks);
    groups_ = min_of(units, kTasks / chunks);
  }
  int64_t chunks;

  int64_t rows() const { return ceil_div(p_.height, blocks_); }
  int64_t pixels(int64_t chunk) const {
    int64_t sum = 0;
    for (int64_t item = first(chunk); item < first(chunk + 1); ++item) sum += (row(item + 1, true) - row(item)) * p_.width;
    return sum;
  }
  template <class F>
  void run(F f) const {
    parallel(threads_, chunks * groups_, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t chunk = task / groups_, group = task % groups_;
        int64_t seen = 0;
        for (int64_t item = first(chunk); item < first(chunk + 1); ++item) {
          const int64_t from = row(item), to = row(item + 1, true);
          for (int64_t u = group * units_ / groups_; u < (group + 1) * units_ / groups_; ++u)
            f(Work{chunk, item / blocks_, from, to, seen, u, thread});
          seen += (to - from) * p_.width;
        }
      }
    });
  }

 private:
  int64_t items() const { return p_.batch * blocks_; }
  int64_t first(int64_t chunk) const { return chunk * items() / chunks; }
  // The first row of an item, or the end of the one before it.
  int64_t row(int64_t item, bool end = false) const {
    const int64_t block = end ? (item - 1) % blocks_ + 1 : item % blocks_;
    return block * p_.height / blocks_;
  }

  const Problem& p_;
  const Threads& threads_;
  int64_t units_, blocks_, groups_;
};

// Rows of a unit's block, so that the four planes a pass needs stay in the second-level cache; whole blocks of seven
// rows where there are as many, since the depthwise kernel takes seven at a time.
template <class A, bool Planar>
int64_t unit_rows(const Problem& p) {
  constexpr int64_t kPlaneBytes = 128 * 1024;
  const int64_t rows = kPlaneBytes / (p.width * (Planar ? 1 : kLanes<A>)*int64_t(sizeof(A)));
  return min_of(p.height, max_of<int64_t>(rows - (rows > 7 ? rows % 7 : 0), 1));
}

// Rows of a product's block, so that what it reads (NHWC: and writes) stays in the second-level cache.
template <bool Planar>
int64_t product_rows(const Problem& p, int64_t bytes_per_pixel) {
  return Planar ? tile_rows(p, bytes_per_pixel) : min_of(p.height, ceil_div(16 * kTileRows, p.width));
}

// Rows [from, to) widened by a halo, inside the map.
struct Rows {
  int64_t from, to;
  Rows widened(int64_t halo, const Problem& p) const {
    return {max_of<int64_t>(from - halo, 0), min_of(to + halo, p.height)};
  }
};

// Sums for every chunk, in f64: some kinds, each with a number for every channel. A chunk's first block sets them.
class ChunkSums {
 public:
  ChunkSums(int64_t chunks, int64_t kinds, int64_t channels)
      : channels(channels), kinds_(kinds), memory_(chunks * kinds * channels) {}
  double* at(int64_t chunk, int64_t kind) const { return memory_.get() + (chunk * kinds_ + kind) * channels; }

  template <class A, bool Planar>
  void add(const Work& w, int64_t kind, const Unit<A, Planar>& unit, Vec<A> v, int64_t stride, int64_t offset) const {
    double* to = at(w.chunk, kind) + unit.channel * stride + offset;
    for (int l = 0; l < unit.count; ++l, to += stride) *to = (w.seen == 0 ? 0.0 : *to) + static_cast<double>(v[l]);
  }
  // Over all chunks, into those of the first.
  const double* total(int64_t chunks, int64_t kind) const {
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < channels; ++i) at(0, kind)[i] += at(chunk, kind)[i];
    return at(0, kind);
  }
  const int64_t channels;

 private:
  int64_t kinds_;
  Scratch<double> memory_;
};

// ---- the cheap part on scratch, compiled once for every format (depthwise.cpp)
// taps and sums hold K * K vectors: splats for NCHW, one lane a channel for NHWC.

// Rows of a plane in scratch, of which the first is the map's row `from`; beyond the map's own edges are zeros.
template <class A>
struct Strip {
  A* data;
  Rows rows;
};

// out = in correlated with the taps
template <class A, bool Planar>
void depthwise(const Problem& p, Strip<const A> in, Strip<A> out, const Vec<A>* taps);

// sums[t] += gradient * (in shifted by tap t)
template <class A, bool Planar>
void depthwise_weight_gradient(const Problem& p, Strip<const A> gradient, Strip<const A> in, Vec<A>* sums);

constexpr int kMostTaps = 49;

// The K * K weights [K * K, cheap maps] of a unit's cheap maps number s, turned by 180 degrees for the backward pass.
template <class A, bool Planar>
void load_taps(const Problem& p, const Unit<A, Planar>& unit, const A* weight, int64_t s, bool flip, Vec<A>* taps) {
  const int64_t count = int64_t(p.kernel) * p.kernel;
  for (int64_t t = 0; t < count; ++t)
    taps[t] = unit.parameter(weight + (flip ? count - 1 - t : t) * p.cheap(), p.multiplier, s);
}

}  // namespace fif::FIF_ISA
