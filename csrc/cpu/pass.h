// What the three passes share: scratch memory, the thread pool and normalisation constants.
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
  if (threads.count == 1) {
    if (tasks > 0) f(0, tasks, 0);
    return;
  }
  threads.run(
      tasks, ceil_div(tasks, threads.count),
      [](void* state, int64_t begin, int64_t end, int thread) { (*static_cast<F*>(state))(begin, end, thread); }, &f);
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

// out[0, count) = in[0, count), in the compute type.
template <class T>
FIF_INLINE void copy_run(const T* in, Compute<T>* out, int64_t count) {
  constexpr int L = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(out + i, load(in + i));
  if (i == count) return;
  const Mask lanes = first_lanes(count - i);
  store(out + i, load(in + i, lanes), lanes);
}

// Lines of `count` numbers, `step` apart, in the compute type, `to_step` apart.
template <class T>
void widen_lines(const T* from, int64_t step, int64_t lines, int64_t count, Compute<T>* to, int64_t to_step) {
  for (int64_t i = 0; i < lines; ++i) copy_run(from + i * step, to + i * to_step, count);
}

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

// ---- the entry points that csrc/dispatch.cpp collects

void infer(const Problem&, const InferArgs&, const Threads&);
void train(const Problem&, const TrainArgs&, const Threads&);
void backward(const Problem&, const BackwardArgs&, const Threads&);
// What infer works from where lanes lie along channels; a.packed of the same problem may be given instead of weights.
int64_t packed_bytes(const Problem&);
void pack(const Problem&, const InferArgs&, void* to);
void infer_channels(const Problem&, const InferArgs&, const Threads&);
// Of the content of memory in parts; it differs between instruction sets.
uint64_t fingerprint(const void* const* parts, const int64_t* bytes, int64_t count);
void pool(const Problem&, const InferArgs&, const Threads&);
void strided_train(const Problem&, const StridedArgs&, const Threads&);
void strided_backward(const Problem&, const StridedArgs&, const Threads&);

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
