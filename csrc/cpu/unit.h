// What the two training passes share: units, the order in which they are visited, and sums over the batch.
//
// Batch normalisation and the depthwise part both stay inside a channel. A unit is one channel (planar: lanes are
// pixels), for NCHW, or one vector of channels, for NHWC and for small maps in NCHW, which are transposed on the way.
// Work is done on a block of its rows in one image at a time, in scratch of the compute type that stays in the nearest
// caches, where both look alike: an array of whole vectors. Units of one block follow each other, so that in NHWC they
// find its lines in cache.
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
  static constexpr int kPixel = Planar ? 1 : kLane;  // scratch elements from one pixel to the next

  int64_t channel;  // the (first) primary channel
  int count;        // of its channels
  Mask lanes;       // where they are lanes: those that exist

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

// Rows [from, to) of the map.
struct Rows {
  int64_t from, to;
  int64_t count() const { return to - from; }
  Rows widened(int64_t halo, const Problem& p) const {
    return {max_of<int64_t>(from - halo, 0), min_of(to + halo, p.height)};
  }
};
// Those of image n.
struct Block {
  int64_t n;
  Rows rows;
};

// Vectors of channels from NCHW: out[i] holds pixel i of `channels` planes `step` apart, zeros in the other lanes.
template <class T>
void gather_pixels(const T* in, int64_t step, int channels, int64_t pixels, Compute<T>* out) {
  using A = Compute<T>;
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < pixels; i += L) {
    const int64_t width = min_of<int64_t>(L, pixels - i);
    const Mask across = first_lanes(width);
    Vec<A> square[L];
    FIF_UNROLL for (int k = 0; k < L; ++k) square[k] = k < channels ? load(in + k * step + i, across) : Vec<A>{};
    transpose_square<A>(square);
    FIF_UNROLL for (int k = 0; k < L; ++k) if (k < width) store(out + (i + k) * L, square[k]);
  }
}

// A unit's pixels in an activation tensor; channels are `stride` apart, and those at or after `limit` do not exist:
// they load as zero and are not stored. Where a unit is a vector of channels and the tensor NCHW, the pixels pass
// through scratch: read() brings all of them there.
template <class T, bool Planar>
class Plane {
  using A = Compute<T>;
  static constexpr int kLane = kLanes<A>;

 public:
  template <class Pointer>
  Plane(const Problem& p, const Unit<A, Planar>& unit, const Map<Pointer>& map, const Block& b, int64_t channel,
        int64_t stride, int64_t limit)
      : step_(Planar ? kLane : map.step), stride_(stride), pixels_(b.rows.count() * p.width),
        staged_(!Planar && !p.channels_last) {
    if (channel >= limit) return;
    const int64_t pixel = b.rows.from * p.width;
    data_ =
        (T*)map.data + b.n * map.batch + (p.channels_last ? channel + pixel * map.step : channel * map.step + pixel);
    channels_ = static_cast<int>(min_of<int64_t>(unit.count, ceil_div(limit - channel, stride)));
    lanes_ = first_lanes(channels_);
    if (staged_) step_ *= stride;
  }
  // Ready to load, through `stage` where need be.
  Plane read(A* stage) const {
    Plane ready = *this;
    ready.stage_ = stage;
    if (staged_ && data_) gather_pixels(data_, step_, channels_, pixels_, stage);
    return ready;
  }
  explicit operator bool() const { return data_ != nullptr; }

  FIF_INLINE Vec<A> load(int64_t i, Mask m) const {
    if constexpr (!Planar) {
      if (staged_) return FIF_ISA::load(stage_ + i * kLane);
      if (stride_ != 1) return load_strided(data_ + i * step_, stride_, lanes_);
      __builtin_prefetch(data_ + i * step_ + kLane);  // the next unit's, far from this one's next pixel
      m = lanes_;
    }
    const T* at = data_ + i * step_;
    return !kFreeMasks && is_full<A>(m) ? FIF_ISA::load(at) : FIF_ISA::load(at, m);
  }
  // Writes value(vector, lanes) to every pixel; where they must pass through scratch, through `stage`, from which value
  // may read the same vector.
  template <class Value>
  FIF_INLINE void write(A* stage, Value value) const {
    each_vector<A, Planar>(pixels_, [&](int64_t i, Mask m) {
      const Vec<A> v = value(i, m);
      if (staged_)
        FIF_ISA::store(stage + i * kLane, v);
      else
        store(data_ + i * step_, v, m);
    });
    if (staged_) transpose_out(stage, kLane, pixels_, channels_, data_, step_);
  }

 private:
  FIF_INLINE void store(T* at, Vec<A> v, Mask m) const {
    if constexpr (!Planar) {
      if (stride_ != 1) return store_strided(at, stride_, v, lanes_);
      __builtin_prefetch(at + kLane, 1);
      m = lanes_;
    }
    if (!kFreeMasks && is_full<A>(m))
      FIF_ISA::store(at, v);
    else
      FIF_ISA::store(at, v, m);
  }

  T* data_ = nullptr;
  int64_t step_, stride_, pixels_;
  const A* stage_ = nullptr;
  bool staged_ = false;
  Mask lanes_ = 0;
  int channels_ = 0;
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

// A unit's block, of which its chunk has `seen` so many pixels before.
struct Work {
  Block block;
  int64_t chunk, seen, unit;
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
    for (int64_t item = first(chunk); item < first(chunk + 1); ++item)
      sum += (row(item + 1, true) - row(item)) * p_.width;
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
            f(Work{{item / blocks_, {from, to}}, chunk, seen, u, thread});
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

// Whether units are channels, and lanes pixels. A small map would fill few lanes, and have few vectors for what every
// unit costs.
template <class A>
bool planar_units(const Problem& p) {
  return !p.channels_last && (p.pixels() > 16 * kLanes<A> || p.primary < kLanes<A> / 2);
}

// Rows of a product's block, so that what it reads (NHWC: and writes) stays in the second-level cache.
template <bool Planar>
int64_t product_rows(const Problem& p, int64_t bytes_per_pixel) {
  return Planar ? tile_rows(p, bytes_per_pixel) : min_of(p.height, ceil_div(16 * kTileRows, p.width));
}

// Brings rows of numbers that lie `step` apart into cache, for a product that reads a little of each in turn, which the
// processor does not foresee. Prefetching a row ahead while one reads hides the way to memory better than either alone.
template <class T>
void fetch_rows(const T* data, int64_t step, int64_t rows, int64_t length) {
  for (int64_t r = 0; r < rows; ++r, data += step)
    for (int64_t i = 0; i < length; i += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(data + step + i);
      (void)*reinterpret_cast<const volatile char*>(data + i);
    }
}

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
// taps and sums hold K * K vectors: splats for planar units, else one lane a channel.

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
