// Training forward: batch statistics need a round over the primary maps and one over the cheap ones before either can
// be normalised, but all of it stays inside a channel. So: one product writes the raw primary maps, then every unit (a
// channel of the whole batch) goes through its rounds at once, in scratch that stays in cache.
//
// Memory traffic per pixel: C read, M written and read twice (raw), M + N written; where a unit is too large for the
// cache, raw is read once more, and the depthwise part computed twice. Saved for backward: raw and the statistics.
// Results do not depend on the number of threads: a unit is one task, and a product's sums have a fixed order.
#include "pass.h"

namespace fif::FIF_ISA {
namespace {

// The convolution's bias as the epilogue of a product wants it, if there is one.
template <class A>
class Bias {
 public:
  Bias(const void* values, int64_t channels) : shift_(static_cast<const A*>(values)), scale_(values ? channels : 0) {
    for (int64_t i = 0; shift_ && i < channels; ++i) scale_.get()[i] = 1;
  }
  template <class G>
  void add_to(G& g, int64_t channel, Finish finish) const {
    if (!shift_) return;
    g.finish = finish;
    g.scale = scale_.get() + channel;
    g.shift = shift_ + channel;
  }

 private:
  const A* shift_;
  Scratch<A> scale_;
};

template <class T>
void raw_planar(const Problem& p, const TrainArgs& a, const Threads& threads) {
  using A = Compute<T>;
  const Computed<T> weight(a.primary_weight, p.primary * p.in_channels);
  const Bias<A> bias(a.primary_bias, p.primary);
  const int64_t blocks = ceil_div(p.primary, kTileRows), block = ceil_div(p.primary, blocks);
  const int64_t rows = tile_rows(p, p.in_channels * sizeof(T)), cuts = ceil_div(p.height, rows);
  parallel(threads, p.batch * cuts, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / cuts, row = task % cuts * rows, pixel = row * p.width;
      for (int64_t m = 0; m < p.primary; m += block) {
        Gemm<A, T, T> g{.a = weight.get() + m * p.in_channels,
                        .a_row = p.in_channels,
                        .a_k = 1,
                        .b = static_cast<const T*>(a.x.data) + n * a.x.batch + pixel,
                        .b_k = a.x.step,
                        .c = static_cast<T*>(a.raw.data) + n * a.raw.batch + m * a.raw.step + pixel,
                        .c_row = a.raw.step,
                        .rows = min_of(block, p.primary - m),
                        .cols = min_of(rows, p.height - row) * p.width,
                        .depth = p.in_channels};
        bias.add_to(g, m, Finish::by_row);
        gemm(g);
      }
    }
  });
}

template <class T>
void raw_channels_last(const Problem& p, const TrainArgs& a, const Threads& threads) {
  using A = Compute<T>;
  constexpr int64_t kPixels = 16 * kTileRows;
  const Transposed<T> weight(a.primary_weight, p.primary, p.in_channels);
  const Bias<A> bias(a.primary_bias, p.primary);
  const Scratch<A> wide(sizeof(T) == sizeof(A) ? 0 : threads.count * kPixels * p.in_channels);
  const int64_t cuts = ceil_div(p.pixels(), kPixels);
  parallel(threads, p.batch * cuts, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / cuts, pixel = task % cuts * kPixels, count = min_of(kPixels, p.pixels() - pixel);
      const T* x = static_cast<const T*>(a.x.data) + n * a.x.batch + pixel * a.x.step;
      Gemm<A, A, T> g{.a = nullptr,
                      .a_row = a.x.step,
                      .a_k = 1,
                      .b = weight.get(),
                      .b_k = p.primary,
                      .c = static_cast<T*>(a.raw.data) + n * a.raw.batch + pixel * a.raw.step,
                      .c_row = a.raw.step,
                      .rows = count,
                      .cols = p.primary,
                      .depth = p.in_channels};
      bias.add_to(g, 0, Finish::by_column);
      if constexpr (sizeof(T) == sizeof(A)) {
        g.a = x;
      } else {
        A* buffer = wide.get() + thread * kPixels * p.in_channels;
        widen_lines(x, a.x.step, count, p.in_channels, buffer, p.in_channels);
        g.a = buffer;
        g.a_row = p.in_channels;
      }
      gemm(g);
    }
  });
}

// Mean and rstd of one channel (of each lane's channel).
template <class A, bool Planar>
class Statistics {
 public:
  Vec<A> mean{}, rstd = splat<A>(1);

  // Frozen ones.
  Statistics(const Unit<A, Planar>& unit, const Affine& affine, int64_t stride, int64_t offset) : unit_(unit) {
    if (affine.mean) mean = unit.parameter(static_cast<const A*>(affine.mean), stride, offset);
    if (affine.rstd) rstd = unit.parameter(static_cast<const A*>(affine.rstd), stride, offset);
  }

  // Of the batch: call add for every image with value(i), the vector i of its plane, then finish. Sums are taken around
  // the mean of the first image. That is part of the population, so its distance from the mean of all is at most
  // sqrt(batch) standard deviations, and the squares lose next to nothing to cancellation, wherever the mean lies.
  template <class Value>
  void add(Value value) {
    if (images_++ == 0) {
      PairSum<A> sum;
      unit_.each([&](int64_t, int64_t i, Mask m) { sum.add(keep_lanes(value(i), m), Vec<A>{}); });
      sum.finish();
      Total<A, Planar> first;
      first.add(sum.first);
      centre_ = first.over(static_cast<double>(unit_.p.pixels()));
    }
    PairSum<A> sum;
    unit_.each([&](int64_t, int64_t i, Mask m) {
      const Vec<A> d = keep_lanes(value(i) - centre_, m);
      sum.add(d, d * d);
    });
    sum.finish();
    sums_.add(sum.first);
    squares_.add(sum.second);
  }

  void finish(double eps, A* variance, int64_t stride, int64_t offset) {
    const double count = static_cast<double>(unit_.p.batch * unit_.p.pixels());
    Vec<A> unbiased{};
    for (int l = 0; l < kLanes<A>; ++l) {
      const double shift = sums_.of(l) / count, total = squares_.of(l) - count * shift * shift;
      mean[l] = static_cast<A>(centre_[l] + shift);
      rstd[l] = A(1) / sqrt(static_cast<A>(total / count) + static_cast<A>(eps));
      unbiased[l] = static_cast<A>(total / (count - 1));
    }
    unit_.put(variance, unbiased, stride, offset);
  }

 private:
  const Unit<A, Planar>& unit_;
  int64_t images_ = 0;
  Vec<A> centre_{};
  Total<A, Planar> sums_, squares_;
};

template <class T, bool Planar>
class UnitForward {
  using A = Compute<T>;
  struct ScaleAndShift {
    Vec<A> scale, shift;
  };
  const Problem& p;
  const TrainArgs& a;
  const Unit<A, Planar> unit;
  const int64_t size;
  const bool keep;  // planes of the whole batch, or of one image at a time
  A* const y;       // activated primary maps
  A* const z;       // cheap maps, one of each primary map's
  const Clamp<A> clamp;

 public:
  static int64_t scratch(const Problem& p) {
    return 2 * (keeps_planes<A, Planar>(p, 2) ? p.batch : 1) * Unit<A, Planar>::plane_size(p);
  }
  UnitForward(const Problem& problem, const TrainArgs& args, int64_t index, A* memory)
      : p(problem), a(args), unit(problem, index), size(unit.plane_size(problem)), keep(keeps_planes<A, Planar>(p, 2)),
        y(memory), z(memory + scratch(p) / 2), clamp(p.activation) {}

  void run(const A* cheap_weight) {
    Statistics<A, Planar> stats(unit, a.primary, 1, 0);
    if (a.primary_batch) {
      for (int64_t n = 0; n < p.batch; ++n) {
        const auto raw = raw_plane(n);
        stats.add([&](int64_t i) { return raw.load(i); });
      }
      stats.finish(a.primary_eps, static_cast<A*>(a.primary_variance), 1, 0);
    }
    const ScaleAndShift primary = normalisation(stats, a.primary, a.primary_stats, p.primary, 1, 0);
    for (int64_t s = 0; s < p.multiplier; ++s) cheap(primary, cheap_weight, s);
  }

 private:
  A* slot(A* planes, int64_t n) const { return planes + (keep ? n : 0) * size; }
  Plane<const T, Planar> raw_plane(int64_t n) const { return {unit, a.raw, n, unit.channel, 1, p.primary}; }

  ScaleAndShift normalisation(const Statistics<A, Planar>& s, const Affine& affine, void* stats, int64_t channels,
                              int64_t stride, int64_t offset) const {
    unit.put(static_cast<A*>(stats), s.mean, stride, offset);
    unit.put(static_cast<A*>(stats) + channels, s.rstd, stride, offset);
    Vec<A> scale = s.rstd, shift{};
    if (affine.weight) scale *= unit.parameter(static_cast<const A*>(affine.weight), stride, offset);
    if (affine.bias) shift = unit.parameter(static_cast<const A*>(affine.bias), stride, offset);
    return {scale, shift - s.mean * scale};
  }

  // Primary maps of one image, and its cheap maps number s before normalisation.
  void compute(int64_t n, const ScaleAndShift& primary, const Vec<A>* taps, bool fresh, bool emit) const {
    A* plane = slot(y, n);
    if (fresh) {
      const auto raw = raw_plane(n);
      const Plane<T, Planar> out(unit, a.out, n, unit.channel, 1, emit ? p.primary : 0);
      unit.each([&](int64_t at, int64_t i, Mask) {
        const Vec<A> v = activate<A>(raw.load(i) * primary.scale + primary.shift, p.activation, clamp);
        store(plane + at, v);
        if (out) out.store(i, v);
      });
    }
    depthwise<A, Planar>(p, plane, slot(z, n), taps, false);
  }

  void cheap(const ScaleAndShift& primary, const A* weight, int64_t s) {
    const bool emit = p.splice && s == 0;
    Vec<A> taps[kMostTaps];
    load_taps(unit, weight, s, false, taps);
    Statistics<A, Planar> stats(unit, a.cheap, p.multiplier, s);
    bool computed = false;
    if (a.cheap_batch) {
      for (int64_t n = 0; n < p.batch; ++n) {
        compute(n, primary, taps, !keep || s == 0, emit);
        const A* plane = slot(z, n);
        stats.add([&](int64_t i) { return load(plane + i * unit.kLane); });
      }
      stats.finish(a.cheap_eps, static_cast<A*>(a.cheap_variance), p.multiplier, s);
      computed = keep;
    }
    const ScaleAndShift norm = normalisation(stats, a.cheap, a.cheap_stats, p.cheap(), p.multiplier, s);
    const int64_t first = p.kept_primary() + unit.channel * p.multiplier + s;
    for (int64_t n = 0; n < p.batch; ++n) {
      const Plane<T, Planar> out(unit, a.out, n, first, p.multiplier, p.out_channels);
      if (!out && computed) continue;
      if (!computed) compute(n, primary, taps, !keep || s == 0, emit && !a.cheap_batch);
      if (!out) continue;
      const A* plane = slot(z, n);
      unit.each([&](int64_t at, int64_t i, Mask) {
        out.store(i, activate<A>(load(plane + at) * norm.scale + norm.shift, p.activation, clamp));
      });
    }
  }
};

template <class T, bool Planar>
void normalise_units(const Problem& p, const TrainArgs& a, const Threads& threads) {
  using A = Compute<T>;
  using U = Unit<A, Planar>;
  const Computed<T> cheap_weight(a.cheap_weight, p.cheap() * p.kernel * p.kernel);
  const int64_t each = UnitForward<T, Planar>::scratch(p);
  const Scratch<A> scratch(min_of<int64_t>(threads.count, U::count(p)) * each);
  parallel(threads, U::count(p), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t u = begin; u < end; ++u)
      UnitForward<T, Planar>(p, a, u, scratch.get() + thread * each).run(cheap_weight.get());
  });
}

}  // namespace

void train(const Problem& p, const TrainArgs& a, const Threads& threads) {
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    if (p.channels_last) {
      raw_channels_last<T>(p, a, threads);
      normalise_units<T, false>(p, a, threads);
    } else {
      raw_planar<T>(p, a, threads);
      normalise_units<T, true>(p, a, threads);
    }
  });
}

}  // namespace fif::FIF_ISA
