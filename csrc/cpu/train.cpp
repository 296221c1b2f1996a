// Training forward: batch statistics need a round over the primary maps and one over the cheap ones before either can
// be normalised. So there are three rounds, each over blocks of one image that stay in cache:
//   1. the product, which writes the raw primary maps, and their sums
//   2. primary maps normalised and written, cheap maps in scratch, and their sums
//   3. primary maps and cheap maps again, in scratch; cheap maps normalised and written
// To compute the cheap maps twice costs less than the way to memory and back.
//
// Memory traffic per pixel: C read, M written and read twice (raw), M + N written. Saved for backward: raw and the
// statistics. Results do not depend on the number of threads, see unit.h.
#include "unit.h"

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

// Mean, and sum of squares around it, of one channel (of each lane's channel).
template <class A>
struct Moments {
  Vec<A> mean, squares;
};

// Of so many pixels with value(vector, lanes). Sums are taken around the mean of the first eighth. That is part of the
// population, so its distance from the mean of all is at most sqrt(8) standard deviations, and the squares lose next to
// nothing to cancellation, wherever the mean lies.
template <class A, bool Planar, class Value>
Moments<A> moments(int64_t pixels, Value value) {
  const int64_t some = min_of(pixels, Planar ? ceil_div(pixels, 8 * kLanes<A>) * kLanes<A> : ceil_div(pixels, 8));
  PairSum<A> begin, all;
  each_vector<A, Planar>(some, [&](int64_t i, Mask m) { begin.add(keep_lanes(value(i, m), m), Vec<A>{}); });
  begin.finish();
  const Vec<A> centre = Unit<A, Planar>::total(begin.first) / static_cast<A>(some);
  each_vector<A, Planar>(pixels, [&](int64_t i, Mask m) {
    const Vec<A> d = keep_lanes(value(i, m) - centre, m);
    all.add(d, d * d);
  });
  all.finish();
  const Vec<A> shift = Unit<A, Planar>::total(all.first) / static_cast<A>(pixels);
  return {centre + shift, Unit<A, Planar>::total(all.second) - shift * shift * static_cast<A>(pixels)};
}

// Moments of a chunk's blocks so far: adds those of `count` more pixels.
template <class A, bool Planar>
void add_moments(const ChunkSums& sums, const Unit<A, Planar>& unit, int64_t chunk, int64_t seen, int64_t count,
                 const Moments<A>& block, int64_t stride, int64_t offset) {
  double* mean = sums.at(chunk, 0) + unit.channel * stride + offset;
  double* squares = sums.at(chunk, 1) + unit.channel * stride + offset;
  const double share = static_cast<double>(count) / static_cast<double>(seen + count);
  const double weight = static_cast<double>(seen) * share;
  for (int l = 0; l < unit.count; ++l, mean += stride, squares += stride) {
    const double m = block.mean[l], s = block.squares[l];
    if (seen == 0) {
      *mean = m;
      *squares = s;
    } else {
      const double d = m - *mean;
      *mean += d * share;
      *squares += s + d * d * weight;
    }
  }
}

// Mean, rstd and unbiased variance of every channel from the moments of the chunks.
template <class A>
void finish_moments(const ChunkSums& sums, const Sweep& sweep, double eps, A* mean, A* rstd, A* variance) {
  const Scratch<double> memory(2 * sums.channels);
  double *middle = memory.get(), *total = middle + sums.channels, count = 0;
  for (int64_t i = 0; i < 2 * sums.channels; ++i) middle[i] = 0;
  for (int64_t chunk = 0; chunk < sweep.chunks; ++chunk) {
    const double pixels = static_cast<double>(sweep.pixels(chunk));
    count += pixels;
    for (int64_t i = 0; i < sums.channels; ++i) middle[i] += pixels * sums.at(chunk, 0)[i];
  }
  for (int64_t i = 0; i < sums.channels; ++i) middle[i] /= count;
  for (int64_t chunk = 0; chunk < sweep.chunks; ++chunk) {
    const double pixels = static_cast<double>(sweep.pixels(chunk));
    for (int64_t i = 0; i < sums.channels; ++i) {
      const double d = sums.at(chunk, 0)[i] - middle[i];
      total[i] += sums.at(chunk, 1)[i] + pixels * d * d;
    }
  }
  for (int64_t i = 0; i < sums.channels; ++i) {
    mean[i] = static_cast<A>(middle[i]);
    rstd[i] = A(1) / sqrt(static_cast<A>(total[i] / count) + static_cast<A>(eps));
    variance[i] = static_cast<A>(total[i] / (count - 1));
  }
}

// ---- the raw primary maps

// Brings pixels of every channel of an NCHW map near: the product reads a little of many planes in turn, which the
// processor does not foresee.
template <class T>
void prefetch_planes(const T* data, int64_t step, int64_t channels, int64_t pixels) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < pixels; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(data + c * step + i, 0, 2);
}

template <class T>
class RawPlanar {
  using A = Compute<T>;
  const Problem& p;
  const TrainArgs& a;
  const Computed<T> weight;
  const Bias<A> bias;
  const int64_t block;

 public:
  RawPlanar(const Problem& problem, const TrainArgs& args, int64_t, int)
      : p(problem), a(args), weight(a.primary_weight, p.primary * p.in_channels), bias(a.primary_bias, p.primary),
        block(ceil_div(p.primary, ceil_div(p.primary, kTileRows))) {}

  void operator()(const Work& w) const {
    const int64_t pixel = w.from * p.width, count = (w.to - w.from) * p.width;
    const T* x = static_cast<const T*>(a.x.data) + w.n * a.x.batch + pixel;
    prefetch_planes(x, a.x.step, p.in_channels, count);
    for (int64_t m = 0; m < p.primary; m += block) {
      Gemm<A, T, T> g{.a = weight.get() + m * p.in_channels,
                      .a_row = p.in_channels,
                      .a_k = 1,
                      .b = x,
                      .b_k = a.x.step,
                      .c = static_cast<T*>(a.raw.data) + w.n * a.raw.batch + m * a.raw.step + pixel,
                      .c_row = a.raw.step,
                      .rows = min_of(block, p.primary - m),
                      .cols = count,
                      .depth = p.in_channels};
      bias.add_to(g, m, Finish::by_row);
      gemm(g);
    }
  }
};

template <class T>
class RawChannelsLast {
  using A = Compute<T>;
  static constexpr bool kWiden = sizeof(T) != sizeof(A);
  const Problem& p;
  const TrainArgs& a;
  const Transposed<T> weight;
  const Bias<A> bias;
  const int64_t size;
  const Scratch<A> wide;

 public:
  RawChannelsLast(const Problem& problem, const TrainArgs& args, int64_t rows, int threads)
      : p(problem), a(args), weight(a.primary_weight, p.primary, p.in_channels), bias(a.primary_bias, p.primary),
        size(rows * p.width * p.in_channels), wide(kWiden ? threads * size : 0) {}

  void operator()(const Work& w) const {
    const int64_t pixel = w.from * p.width, count = (w.to - w.from) * p.width;
    const T* x = static_cast<const T*>(a.x.data) + w.n * a.x.batch + pixel * a.x.step;
    Gemm<A, A, T> g{.a = nullptr,
                    .a_row = a.x.step,
                    .a_k = 1,
                    .b = weight.get(),
                    .b_k = p.primary,
                    .c = static_cast<T*>(a.raw.data) + w.n * a.raw.batch + pixel * a.raw.step,
                    .c_row = a.raw.step,
                    .rows = count,
                    .cols = p.primary,
                    .depth = p.in_channels};
    bias.add_to(g, 0, Finish::by_column);
    if constexpr (kWiden) {
      A* buffer = wide.get() + w.thread * size;
      widen_pixels(x, a.x.step, count, p.in_channels, buffer);
      g.a = buffer;
      g.a_row = p.in_channels;
    } else {
      g.a = x;
    }
    gemm(g);
  }
};

// ---- units

template <class T, bool Planar, class Act>
class UnitForward {
  using A = Compute<T>;
  using U = Unit<A, Planar>;
  const Problem& p;
  const TrainArgs& a;
  const A* const cheap_weight;  // [K * K, cheap maps]
  const ScaleShift<A>& primary;
  const int64_t y_size, z_size;
  const Scratch<A> memory;
  const Act act;

 public:
  UnitForward(const Problem& problem, const TrainArgs& args, const Sweep& sweep, int threads, const A* weight,
              const ScaleShift<A>& primary_norm, const Act& activation)
      : p(problem), a(args), cheap_weight(weight), primary(primary_norm),
        y_size(U::size((sweep.rows() + 2 * (p.kernel / 2)) * p.width)), z_size(U::size(sweep.rows() * p.width)),
        memory(threads * (y_size + z_size)), act(activation) {}

  // Statistics of the cheap maps; writes the primary ones.
  void sum(const Work& w, const ChunkSums& sums) const {
    const U unit(p, w.unit);
    const Strip<A> y = primary_maps(w, unit, p.splice);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const A* z = cheap_maps(w, unit, y, s);
      const int64_t pixels = (w.to - w.from) * p.width;
      add_moments(sums, unit, w.chunk, w.seen, pixels,
                  moments<A, Planar>(pixels, [&](int64_t i, Mask) { return load(z + i * U::kLane); }), p.multiplier, s);
    }
  }

  // Writes the cheap maps, and the primary ones where nobody did.
  void finish(const Work& w, const ScaleShift<A>& cheap, bool emit_primary) const {
    const U unit(p, w.unit);
    const Strip<A> y = primary_maps(w, unit, emit_primary);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const int64_t first = p.kept_primary() + unit.channel * p.multiplier + s;
      const Plane<T, Planar> out(unit, a.out, w.n, w.from * p.width, first, p.multiplier, p.out_channels);
      if (!out) return;
      const A* z = cheap_maps(w, unit, y, s);
      const Vec<A> scale = unit.parameter(cheap.scale(), p.multiplier, s);
      const Vec<A> shift = unit.parameter(cheap.shift(), p.multiplier, s);
      each_vector<A, Planar>((w.to - w.from) * p.width, [&](int64_t i, Mask m) {
        out.store(i, act.value(load(z + i * U::kLane) * scale + shift), m);
      });
    }
  }

 private:
  A* scratch(const Work& w) const { return memory.get() + w.thread * (y_size + z_size); }

  // Activated, with as many rows around as the cheap part reads.
  Strip<A> primary_maps(const Work& w, const U& unit, bool emit) const {
    const Strip<A> y{scratch(w), Rows{w.from, w.to}.widened(p.kernel / 2, p)};
    const Vec<A> scale = unit.parameter(primary.scale()), shift = unit.parameter(primary.shift());
    auto rows = [&](int64_t from, int64_t to, bool write) {
      const int64_t pixel = from * p.width;
      const Plane<const T, Planar> raw(unit, a.raw, w.n, pixel, unit.channel, 1, p.primary);
      const Plane<T, Planar> out(unit, a.out, w.n, pixel, unit.channel, 1, write ? p.primary : 0);
      A* to_scratch = y.data + (from - y.rows.from) * p.width * (Planar ? 1 : U::kLane);
      each_vector<A, Planar>((to - from) * p.width, [&](int64_t i, Mask m) {
        const Vec<A> v = act.value(raw.load(i, m) * scale + shift);
        store(to_scratch + i * U::kLane, v);
        if (write) out.store(i, v, m);
      });
    };
    // In order, since a row's last vector may reach into the next.
    if (y.rows.from < w.from) rows(y.rows.from, w.from, false);
    rows(w.from, w.to, emit);
    if (w.to < y.rows.to) rows(w.to, y.rows.to, false);
    return y;
  }

  const A* cheap_maps(const Work& w, const U& unit, const Strip<A>& y, int64_t s) const {
    Vec<A> taps[kMostTaps];
    load_taps(p, unit, cheap_weight, s, false, taps);
    const Strip<A> z{scratch(w) + y_size, {w.from, w.to}};
    depthwise<A, Planar>(p, {y.data, y.rows}, z, taps);
    return z.data;
  }
};

// Mean and rstd to normalise with: the batch's, or the given ones; kept for backward in `stats` [2, channels].
template <class A>
Affine statistics(const Affine& given, bool batch, const ChunkSums& sums, const Sweep& sweep, double eps, void* stats,
                  void* variance, int64_t channels) {
  A *mean = static_cast<A*>(stats), *rstd = mean + channels;
  if (batch) {
    finish_moments(sums, sweep, eps, mean, rstd, static_cast<A*>(variance));
  } else {
    for (int64_t i = 0; i < channels; ++i) {
      mean[i] = value_or<A>(given.mean, i, 0);
      rstd[i] = value_or<A>(given.rstd, i, 1);
    }
  }
  return {mean, rstd, given.weight, given.bias};
}

template <class T, bool Planar>
void train_in(const Problem& p, const TrainArgs& a, const Threads& threads) {
  using A = Compute<T>;
  using U = Unit<A, Planar>;
  const Sweep blocks(p, threads, product_rows<Planar>(p, p.in_channels * sizeof(T)), 1);
  const ChunkSums primary_sums(a.primary_batch ? blocks.chunks : 0, 2, p.primary);
  {
    const std::conditional_t<Planar, RawPlanar<T>, RawChannelsLast<T>> product(p, a, blocks.rows(), threads.count);
    blocks.run([&](const Work& w) {
      product(w);
      if (!a.primary_batch) return;
      const int64_t pixels = (w.to - w.from) * p.width;
      for (int64_t u = 0; u < U::number(p); ++u) {
        const U unit(p, u);
        const Plane<const T, Planar> raw(unit, a.raw, w.n, w.from * p.width, unit.channel, 1, p.primary);
        add_moments(primary_sums, unit, w.chunk, w.seen, pixels,
                    moments<A, Planar>(pixels, [&](int64_t i, Mask m) { return raw.load(i, m); }), 1, 0);
      }
    });
  }
  const ScaleShift<A> primary(statistics<A>(a.primary, a.primary_batch, primary_sums, blocks, a.primary_eps,
                                            a.primary_stats, a.primary_variance, p.primary),
                              p.primary);

  const Transposed<T> cheap_weight(a.cheap_weight, p.cheap(), int64_t(p.kernel) * p.kernel);
  const Sweep units(p, threads, unit_rows<A, Planar>(p), U::number(p));
  const ChunkSums cheap_sums(a.cheap_batch ? units.chunks : 0, 2, p.cheap());
  with_activation<A>(p.activation, [&](const auto& act) {
    const UnitForward<T, Planar, std::decay_t<decltype(act)>> unit(p, a, units, threads.count, cheap_weight.get(),
                                                                   primary, act);
    if (a.cheap_batch) units.run([&](const Work& w) { unit.sum(w, cheap_sums); });
    const ScaleShift<A> cheap(statistics<A>(a.cheap, a.cheap_batch, cheap_sums, units, a.cheap_eps, a.cheap_stats,
                                            a.cheap_variance, p.cheap()),
                              p.cheap());
    units.run([&](const Work& w) { unit.finish(w, cheap, p.splice && !a.cheap_batch); });
  });
}

}  // namespace

void train(const Problem& p, const TrainArgs& a, const Threads& threads) {
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    if (p.channels_last)
      train_in<T, false>(p, a, threads);
    else
      train_in<T, true>(p, a, threads);
  });
}

}  // namespace fif::FIF_ISA
