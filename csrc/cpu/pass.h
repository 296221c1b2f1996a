// What the three passes share: scratch memory, the thread pool, normalisation constants, and units.
//
// Training works unit by unit, since batch normalisation and the depthwise part both stay inside a channel: a unit is
// one channel of the whole batch (NCHW: lanes are pixels) or one vector of channels (NHWC: lanes are channels). A
// unit's planes are copied to scratch in the compute type, where both layouts look alike: an array of whole vectors.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>

#include "activation.h"
#include "depthwise.h"
#include "gemm.h"

namespace fif::FIF_ISA {

template <class E>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    if (posix_memalign(&memory_, 64, static_cast<size_t>(count) * sizeof(E)) != 0) throw std::bad_alloc();
  }
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  E* get() const { return static_cast<E*>(memory_); }

 private:
  void* memory_ = nullptr;
};

// f(begin, end, thread) over [0, tasks)
template <class F>
void parallel(const Threads& threads, int64_t tasks, F f) {
  threads.run(
      tasks, [](void* state, int64_t begin, int64_t end, int thread) { (*static_cast<F*>(state))(begin, end, thread); },
      &f);
}

// Numbers of T as numbers of the compute type: the memory itself where they are the same.
template <class T>
class Computed {
 public:
  using A = Compute<T>;
  Computed(const void* values, int64_t count) : copy_(sizeof(T) == sizeof(A) ? 0 : count) {
    const T* from = static_cast<const T*>(values);
    if constexpr (sizeof(T) == sizeof(A)) {
      values_ = from;
    } else {
      for (int64_t i = 0; i < count; ++i) copy_.get()[i] = to_compute(from[i]);
      values_ = copy_.get();
    }
  }
  const A* get() const { return values_; }

 private:
  Scratch<A> copy_;
  const A* values_;
};

// out[j * rows + i] = in[i * step + j] for `rows` x `columns` numbers: whole squares of lanes in registers, the rest
// singly.
template <class T>
void transpose(const T* in, int64_t step, int64_t rows, int64_t columns, Compute<T>* out, int64_t out_step) {
  using A = Compute<T>;
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < rows; i += L)
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t height = min_of<int64_t>(L, rows - i), width = min_of<int64_t>(L, columns - j);
      const Mask across = first_lanes(width), down = first_lanes(height);
      Vec<A> square[L];
      FIF_UNROLL for (int k = 0; k < L; ++k) square[k] = k < height ? load(in + (i + k) * step + j, across) : Vec<A>{};
      transpose_square<A>(square);
      FIF_UNROLL for (int k = 0; k < L; ++k) if (k < width) store(out + (j + k) * out_step + i, square[k], down);
    }
}

// out[j * out_step + i] = in[i * step + j], from the compute type; rows of `in` may be read to the end of a vector.
template <class T>
void transpose_out(const Compute<T>* in, int64_t step, int64_t rows, int64_t columns, T* out, int64_t out_step) {
  using A = Compute<T>;
  constexpr int L = kLanes<A>;
  for (int64_t j = 0; j < columns; j += L)
    for (int64_t i = 0; i < rows; i += L) {
      const int64_t height = min_of<int64_t>(L, rows - i), width = min_of<int64_t>(L, columns - j);
      const Mask down = first_lanes(height);
      Vec<A> square[L];
      FIF_UNROLL for (int k = 0; k < L; ++k) square[k] = k < height ? load(in + (i + k) * step + j) : Vec<A>{};
      transpose_square<A>(square);
      FIF_UNROLL for (int k = 0; k < L; ++k) if (k < width) store(out + (j + k) * out_step + i, square[k], down);
    }
}

// [columns, rows] in the compute type from [rows, columns].
template <class T>
class Transposed {
 public:
  using A = Compute<T>;
  Transposed(const void* values, int64_t rows, int64_t columns) : copy_(rows * columns) {
    transpose(static_cast<const T*>(values), columns, rows, columns, copy_.get(), rows);
  }
  const A* get() const { return copy_.get(); }

 private:
  Scratch<A> copy_;
};

// Lines of `count` numbers, `step` apart, in the compute type, `to_step` apart.
template <class T>
void widen_lines(const T* from, int64_t step, int64_t lines, int64_t count, Compute<T>* to, int64_t to_step) {
  constexpr int L = kLanes<Compute<T>>;
  for (int64_t i = 0; i < lines; ++i, from += step, to += to_step)
    for (int64_t c = 0; c < count; c += L) {
      const Mask m = first_lanes(min_of<int64_t>(L, count - c));
      store(to + c, load(from + c, m), m);
    }
}

template <class A>
FIF_INLINE A value_or(const void* values, int64_t i, A otherwise) {
  return values ? static_cast<const A*>(values)[i] : otherwise;
}

// Affine as one multiplication and one addition: y = x * scale + shift.
template <class A>
class ScaleShift {
 public:
  ScaleShift(const Affine& affine, int64_t channels) : memory_(2 * channels), channels_(channels) {
    for (int64_t i = 0; i < channels; ++i) set(affine, i);
  }
  void set(const Affine& affine, int64_t i) {
    const A scale = value_or<A>(affine.rstd, i, 1) * value_or<A>(affine.weight, i, 1);
    memory_.get()[i] = scale;
    memory_.get()[channels_ + i] = value_or<A>(affine.bias, i, 0) - value_or<A>(affine.mean, i, 0) * scale;
  }
  const A* scale() const { return memory_.get(); }
  const A* shift() const { return memory_.get() + channels_; }

 private:
  Scratch<A> memory_;
  int64_t channels_;
};

// Rows of a map that one tile takes, so that the input of a tile stays in the second-level cache; whole blocks of seven
// rows where there are as many, since the depthwise kernel takes seven at a time.
inline int64_t tile_rows(const Problem& p, int64_t bytes_per_pixel) {
  constexpr int64_t kTileBytes = 192 * 1024;
  int64_t rows = kTileBytes / max_of<int64_t>(1, bytes_per_pixel * p.width);
  if (rows >= p.height) return p.height;
  if (rows > 7) rows -= rows % 7;
  return max_of<int64_t>(rows, 1);
}

// ---- units

template <class A, bool Planar>
struct Unit {
  static constexpr int kLane = kLanes<A>;
  static constexpr int kStep = Planar ? 1 : kLane;  // scratch elements from one pixel to the next

  const Problem& p;
  int64_t channel;  // the (first) primary channel
  Mask lanes;       // NHWC: the channels that exist
  int64_t vectors;  // of one plane
  Mask tail;        // lanes of a plane's last vector

  Unit(const Problem& problem, int64_t index) : p(problem) {
    if constexpr (Planar) {
      channel = index;
      lanes = Mask(1);
      vectors = ceil_div(p.pixels(), kLane);
      tail = first_lanes(p.pixels() - (vectors - 1) * kLane);
    } else {
      channel = index * kLane;
      lanes = tail = first_lanes(min_of<int64_t>(kLane, p.primary - channel));
      vectors = p.pixels();
    }
  }
  static int64_t count(const Problem& p) { return Planar ? p.primary : ceil_div(p.primary, kLane); }
  static int64_t plane_size(const Problem& p) {
    return Planar ? ceil_div(p.pixels(), kLane) * kLane : p.pixels() * kLane;
  }

  // One number a channel, of an array over channels (stride 1) or over cheap maps (stride S, from offset s).
  Vec<A> parameter(const A* values, int64_t stride = 1, int64_t offset = 0) const {
    const A* at = values + channel * stride + offset;
    if constexpr (Planar) return splat<A>(*at);
    return load_strided(at, stride, lanes);
  }
  void put(A* values, Vec<A> v, int64_t stride = 1, int64_t offset = 0) const {
    A* at = values + channel * stride + offset;
    if constexpr (Planar)
      *at = v[0];
    else
      store_strided(at, stride, v, lanes);
  }
  // f(scratch offset, vector index, lanes that exist) over the vectors of one plane.
  template <class F>
  FIF_INLINE void each(F f) const {
    for (int64_t i = 0; i < vectors - 1; ++i) f(i * kLane, i, kAll);
    f((vectors - 1) * kLane, vectors - 1, Planar ? tail : kAll);
  }
  // What belongs to one channel: the sum over lanes in every lane, or each lane for itself.
  static Vec<A> total(Vec<A> v) {
    if constexpr (Planar) return splat<A>(sum_lanes<A>(v));
    return v;
  }
};

// One image's plane of a unit in an activation tensor; channels are `stride` apart. Lanes at or after `limit` do not
// exist: they load as zero and are not stored.
template <class T, bool Planar>
struct Plane {
  using A = Compute<T>;
  T* data;
  int64_t step, stride;
  Mask body, tail;
  int64_t vectors;

  template <class Pointer>
  Plane(const Unit<A, Planar>& unit, const Map<Pointer>& map, int64_t image, int64_t channel, int64_t stride_,
        int64_t limit)
      : data(nullptr), step(Planar ? unit.kLane : map.step), stride(stride_), body(0), tail(0), vectors(unit.vectors) {
    if (channel >= limit) return;
    data = (T*)map.data + image * map.batch + channel * (Planar ? map.step : 1);
    body = Planar ? kAll : unit.lanes & first_lanes(ceil_div(limit - channel, stride));
    tail = Planar ? unit.tail : body;
  }
  explicit operator bool() const { return data != nullptr; }
  Vec<A> load(int64_t i) const {
    if (!data) return Vec<A>{};
    const Mask m = i == vectors - 1 ? tail : body;
    if (Planar || stride == 1) return FIF_ISA::load(data + i * step, m);
    return load_strided(data + i * step, stride, m);
  }
  void store(int64_t i, Vec<A> v) const {
    const Mask m = i == vectors - 1 ? tail : body;
    if (Planar || stride == 1)
      FIF_ISA::store(data + i * step, v, m);
    else
      store_strided(data + i * step, stride, v, m);
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

// Sums of vectors: within an image in the compute type, over images in f64, lane by lane.
template <class A, bool Planar>
class Total {
 public:
  void add(Vec<A> v) {
    for (int l = 0; l < kLanes<A>; ++l) lane_[l] += v[l];
  }
  // The sum over what belongs to lane l's channel.
  double of(int l) const {
    if (!Planar) return lane_[l];
    double sum = 0;
    for (int k = 0; k < kLanes<A>; ++k) sum += lane_[k];
    return sum;
  }
  Vec<A> over(double divisor) const {
    Vec<A> v{};
    const double first = of(0);
    for (int l = 0; l < kLanes<A>; ++l) v[l] = static_cast<A>((Planar ? first : lane_[l]) / divisor);
    return v;
  }

 private:
  double lane_[kLanes<A>] = {};
};

// Whether a unit's planes for the whole batch, `kinds` of them, may stay in cache between two rounds; else each image's
// are computed anew in the second round, which costs less than the way to memory and back.
template <class A, bool Planar>
bool keeps_planes(const Problem& p, int kinds) {
  constexpr int64_t kKeptBytes = 512 * 1024;
  return p.batch == 1 || kinds * p.batch * Unit<A, Planar>::plane_size(p) * int64_t(sizeof(A)) <= kKeptBytes;
}

// ---- depthwise on scratch planes, compiled once for every format (depthwise.cpp)
// taps and sums hold K * K vectors: splats for NCHW, one lane a channel for NHWC.

template <class A, bool Planar>
void depthwise(const Problem& p, const A* in, A* out, const Vec<A>* taps, bool accumulate);

// sums[t] += gradient * (in shifted by tap t), over one plane
template <class A, bool Planar>
void depthwise_weight_gradient(const Problem& p, const A* gradient, const A* in, Vec<A>* sums);

constexpr int kMostTaps = 49;

// The K * K weights of a unit's cheap maps number s, turned by 180 degrees for the backward pass.
template <class A, bool Planar>
void load_taps(const Unit<A, Planar>& unit, const A* weight, int64_t s, bool flip, Vec<A>* taps) {
  const int64_t count = int64_t(unit.p.kernel) * unit.p.kernel;
  for (int64_t t = 0; t < count; ++t)
    taps[t] = unit.parameter(weight, unit.p.multiplier * count, s * count + (flip ? count - 1 - t : t));
}

// ---- the entry points that csrc/dispatch.cpp collects

void infer(const Problem&, const InferArgs&, const Threads&);
void train(const Problem&, const TrainArgs&, const Threads&);
void backward(const Problem&, const BackwardArgs&, const Threads&);

// Calls f(tag) with tag.format a pointer of the element type.
template <class T>
struct Format {
  using type = T;
};
template <class F>
FIF_INLINE void with_format(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(Format<float>{});
    case Dtype::f64: return f(Format<double>{});
    case Dtype::bf16: return f(Format<bf16>{});
    case Dtype::f16: return f(Format<f16>{});
  }
}

}  // namespace fif::FIF_ISA
