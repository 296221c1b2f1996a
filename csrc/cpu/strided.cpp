// Training of a depthwise convolution with any stride and its batch normalisation, as between the units of a spindle.
//
// A task is one vector of channels of one image, whose pixels pass through scratch in both layouts (see Plane):
//   forward   1. the convolution, which writes raw, and its moments; 2. raw normalised and written
//   backward  1. the sums over the gradient; 2. through the normalisation into scratch, then each pixel of it meets its
//             taps once: for the weight's sums and, scattered, for the input's gradient
// Memory traffic: x read, raw written and read, out written; gradient and raw read twice, x read, its gradient written.
// Limit: memory; a scattered tap costs two loads and a store from the nearest caches.
#include "norm.h"

namespace fif::FIF_ISA {
namespace {

// The same maps before the convolution.
Problem before(const Problem& p) {
  Problem q = p;
  q.height = p.in_height;
  q.width = p.in_width;
  return q;
}

// What meets tap dx of outputs [from, to) lies inside the map.
struct Columns {
  int64_t from = 0, to = 0;
  Columns() = default;
  Columns(const Problem& p, int64_t dx) {
    const int64_t shift = p.kernel / 2 - dx, s = p.stride;
    from = shift > 0 ? ceil_div(shift, s) : 0;
    to = max_of(from, min_of(p.width, ceil_div(max_of<int64_t>(p.in_width + shift, 0), s)));
  }
};

// f(row of the output, row of the input, dy) for all that meet.
template <class F>
FIF_INLINE void each_row(const Problem& p, F f) {
  for (int64_t r = 0; r < p.height; ++r)
    for (int64_t dy = 0; dy < p.kernel; ++dy) {
      const int64_t row = r * p.stride + dy - p.kernel / 2;
      if (row >= 0 && row < p.in_height) f(r, row, dy);
    }
}

// One row of taps over one row of x: f(c, column of x, dx) with all taps at a time where all of them lie inside.
template <int K, class F>
FIF_INLINE void each_tap(const Problem& p, const Columns (&inside)[K], F f) {
  int64_t from = 0, to = p.width;
  for (int dx = 0; dx < K; ++dx) {
    from = max_of(from, inside[dx].from);
    to = min_of(to, inside[dx].to);
  }
  to = max_of(from, to);
  const int64_t width = p.width, stride = p.stride;
  for (int64_t c = 0; c < width; ++c) {
    const bool whole = c >= from && c < to;
    const int64_t column = c * stride - K / 2;
    FIF_UNROLL for (int dx = 0; dx < K; ++dx) {
      if (whole || (c >= inside[dx].from && c < inside[dx].to)) f(c, column + dx, dx);
    }
  }
}

template <class T, int K>
class Strided {
  using A = Compute<T>;
  using U = Unit<A, false>;
  static constexpr int L = kLanes<A>;
  // Pixels between the planes of scratch, for which the same pixel of two planes would otherwise lie whole pages apart,
  // where a load waits for the store before it.
  static constexpr int64_t kApart = 9;
  const Problem& p;
  const Problem in;
  const StridedArgs& a;
  const Transposed<T> weight;  // [K * K, maps]
  const int64_t x_size, z_size, size;
  const Scratch<A> memory;

 public:
  Strided(const Problem& problem, const StridedArgs& args, int threads)
      : p(problem), in(before(problem)), a(args), weight(a.weight, p.primary, K * K),
        x_size(U::size(p.in_pixels() + kApart)), z_size(U::size(p.pixels() + kApart)), size(2 * x_size + 2 * z_size),
        memory(threads * size) {
    for (int dx = 0; dx < K; ++dx) inside_[dx] = Columns(p, dx);
  }

  // raw, and its moments
  void convolve(const Work& w, const ChunkSums& sums) const {
    const U unit(p, w.unit);
    const Scratches at = scratches(w);
    read_x(w, unit, at);
    Vec<A> taps[kMostTaps];
    load_weight(unit, taps);
    for (int64_t i = 0; i < p.pixels(); ++i) store(at.z + i * L, Vec<A>{});
    each_row(p, [&](int64_t r, int64_t row, int64_t dy) {
      const A* x = at.x + row * p.in_width * L;
      A* z = at.z + r * p.width * L;
      const Vec<A>* tap = taps + dy * K;
      each_tap<K>(p, inside_, [&](int64_t c, int64_t column, int dx) __attribute__((always_inline)) {
        store(z + c * L, load(z + c * L) + load(x + column * L) * tap[dx]);
      });
    });
    add_moments(sums, unit, w.chunk, w.seen, p.pixels(),
                moments<A, false>(p.pixels(), [&](int64_t i, Mask) { return load(at.z + i * L); }), 1, 0);
    Plane<T, false>(p, unit, a.raw, w.block, unit.channel, 1, p.primary).write(at.z, [&](int64_t i, Mask) {
      return load(at.z + i * L);
    });
  }

  void normalise(const Work& w, const ScaleShift<A>& norm) const {
    const U unit(p, w.unit);
    const Scratches at = scratches(w);
    const Vec<A> scale = unit.parameter(norm.scale()), shift = unit.parameter(norm.shift());
    const auto raw =
        Plane<const T, false>(p, unit, Input{a.raw.data, a.raw.batch, a.raw.step}, w.block, unit.channel, 1, p.primary)
            .read(at.z);
    Plane<T, false>(p, unit, a.out, w.block, unit.channel, 1, p.primary).write(at.z, [&](int64_t i, Mask m) {
      return raw.load(i, m) * scale + shift;
    });
  }

  // The gradient's sum, and that of it times the centred value.
  void sum(const Work& w, const Norm<A>& norm, const ChunkSums& sums) const {
    const U unit(p, w.unit);
    const Scratches at = scratches(w);
    const Vec<A> mean = unit.parameter(norm.mean());
    const auto grad = read(a.grad, w, unit, at.z), raw = read(a.kept_raw, w, unit, at.g);
    PairSum<A> sum;
    for (int64_t i = 0; i < p.pixels(); ++i) {
      const Vec<A> g = grad.load(i, kAll);
      sum.add(g, g * (raw.load(i, kAll) - mean));
    }
    sum.finish();
    sums.add(w, 0, unit, sum.first, 1, 0);
    sums.add(w, 1, unit, sum.second, 1, 0);
  }

  void gradients(const Work& w, const Norm<A>& norm, const ChunkSums& weight_sums) const {
    const U unit(p, w.unit);
    const Scratches at = scratches(w);
    const UnitNorm<A, false> through(unit, norm, 1, 0);
    const auto grad = read(a.grad, w, unit, at.g), raw = read(a.kept_raw, w, unit, at.z);
    for (int64_t i = 0; i < p.pixels(); ++i)
      store(at.g + i * L, through.through(grad.load(i, kAll), raw.load(i, kAll)));
    read_x(w, unit, at);
    Vec<A> taps[kMostTaps], sums[kMostTaps] = {};
    load_weight(unit, taps);
    for (int64_t i = 0; a.grad_x.data && i < p.in_pixels(); ++i) store(at.grad_x + i * L, Vec<A>{});
    each_row(p, [&](int64_t r, int64_t row, int64_t dy) {
      const A *x = at.x + row * p.in_width * L, *g = at.g + r * p.width * L;
      Vec<A> tap[K], sum[K] = {};
      FIF_UNROLL for (int dx = 0; dx < K; ++dx) tap[dx] = taps[dy * K + dx];
      if (a.grad_x.data) {
        A* to = at.grad_x + row * p.in_width * L;
        each_tap<K>(p, inside_, [&](int64_t c, int64_t column, int dx) __attribute__((always_inline)) {
          const Vec<A> v = load(g + c * L);
          sum[dx] += v * load(x + column * L);
          store(to + column * L, load(to + column * L) + v * tap[dx]);
        });
      } else {
        each_tap<K>(p, inside_, [&](int64_t c, int64_t column, int dx) __attribute__((always_inline)) {
          sum[dx] += load(g + c * L) * load(x + column * L);
        });
      }
      FIF_UNROLL for (int dx = 0; dx < K; ++dx) sums[dy * K + dx] += sum[dx];
    });
    for (int t = 0; t < K * K; ++t) weight_sums.add(w, t, unit, sums[t], 1, 0);
    if (!a.grad_x.data) return;
    Plane<T, false>(in, unit, a.grad_x, in_block(w), unit.channel, 1, p.primary).write(at.grad_x, [&](int64_t i, Mask) {
      return load(at.grad_x + i * L);
    });
  }

 private:
  struct Scratches {
    A *x, *grad_x, *z, *g;
  };
  Scratches scratches(const Work& w) const {
    A* x = memory.get() + w.thread * size;
    return {x, x + x_size, x + 2 * x_size, x + 2 * x_size + z_size};
  }
  Block in_block(const Work& w) const { return {w.block.n, {0, p.in_height}}; }
  Plane<const T, false> read(const Input& map, const Work& w, const U& unit, A* stage) const {
    return Plane<const T, false>(p, unit, map, w.block, unit.channel, 1, p.primary).read(stage);
  }
  void read_x(const Work& w, const U& unit, const Scratches& at) const {
    const auto x = Plane<const T, false>(in, unit, a.x, in_block(w), unit.channel, 1, p.primary).read(at.x);
    if (p.channels_last)  // else it is there
      for (int64_t i = 0; i < p.in_pixels(); ++i) store(at.x + i * L, x.load(i, kAll));
  }
  void load_weight(const U& unit, Vec<A>* taps) const {
    for (int t = 0; t < K * K; ++t) taps[t] = unit.parameter(weight.get() + t * p.primary);
  }
  Columns inside_[K];
};

// f(the passes, the order of their work); images are never cut, so that a task reads x once.
template <class F>
void with_passes(const Problem& p, const StridedArgs& a, const Threads& threads, F f) {
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    const Sweep order(p, threads, p.height, Unit<Compute<T>, false>::number(p));
    with_kernel_size(p.kernel, [&](auto k) {
      const Strided<T, decltype(k)::value> passes(p, a, threads.count);
      f(passes, order, Format<T>{});
    });
  });
}

}  // namespace

void strided_train(const Problem& p, const StridedArgs& a, const Threads& threads) {
  with_passes(p, a, threads, [&](const auto& passes, const Sweep& order, auto format) {
    using A = Compute<typename decltype(format)::type>;
    const ChunkSums sums(order.chunks, 2, p.primary);
    order.run([&](const Work& w) { passes.convolve(w, sums); });
    const ScaleShift<A> norm(statistics<A>(a.norm, true, sums, order, a.eps, a.stats, a.variance, p.primary),
                             p.primary);
    order.run([&](const Work& w) { passes.normalise(w, norm); });
  });
}

void strided_backward(const Problem& p, const StridedArgs& a, const Threads& threads) {
  with_passes(p, a, threads, [&](const auto& passes, const Sweep& order, auto format) {
    using T = typename decltype(format)::type;
    using A = Compute<T>;
    const int64_t taps = int64_t(p.kernel) * p.kernel;
    const ChunkSums sums(order.chunks, 2, p.primary), weight_sums(order.chunks, taps, p.primary);
    Norm<A> norm(a.norm, p.primary);
    order.run([&](const Work& w) { passes.sum(w, norm, sums); });
    norm.finish(sums, order.chunks, true, static_cast<double>(p.batch * p.pixels()), static_cast<A*>(a.grad_affine));
    order.run([&](const Work& w) { passes.gradients(w, norm, weight_sums); });
    store_weight_gradient<T>(weight_sums, order.chunks, taps, static_cast<T*>(a.grad_weight));
  });
}

}  // namespace fif::FIF_ISA
