// Training forward: batch statistics need a round over the primary maps and one over the cheap ones before either can
// be normalised. So there are three rounds, each over blocks of one image that stay in cache:
//   1. the product, which writes the raw primary maps, and their sums
//   2. primary maps normalised and written, cheap maps in scratch, and their sums
//   3. primary maps and cheap maps again, in scratch; cheap maps normalised and written
// To compute the cheap maps twice costs less than the way to memory and back.
//
// Memory traffic per pixel: C read, M written and read twice (raw), M + N written. Saved for backward: raw and the
// statistics. Results do not depend on the number of threads, see unit.h.
#include "norm.h"

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

// ---- the raw primary maps

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
      : p(problem), a(args), weight(a.primary_weight, p.has_primary ? p.primary * p.in_channels : 0),
        bias(a.primary_bias, p.primary), block(ceil_div(p.primary, ceil_div(p.primary, kTileRows))) {}

  void operator()(const Work& w) const {
    const int64_t pixel = w.block.rows.from * p.width, count = w.block.rows.count() * p.width;
    const T* x = static_cast<const T*>(a.x.data) + w.block.n * a.x.batch + pixel;
    fetch_rows(x, a.x.step, p.in_channels, count);
    for (int64_t m = 0; m < p.primary; m += block) {
      Gemm<A, T, T> g{.a = weight.get() + m * p.in_channels,
                      .a_row = p.in_channels,
                      .a_k = 1,
                      .b = x,
                      .b_k = a.x.step,
                      .c = static_cast<T*>(a.raw.data) + w.block.n * a.raw.batch + m * a.raw.step + pixel,
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
      : p(problem), a(args), weight(a.primary_weight, p.has_primary ? p.primary : 0, p.in_channels),
        bias(a.primary_bias, p.primary), size(rows * p.width * p.in_channels), wide(kWiden ? threads * size : 0) {}

  void operator()(const Work& w) const {
    const int64_t pixel = w.block.rows.from * p.width, count = w.block.rows.count() * p.width;
    const T* x = static_cast<const T*>(a.x.data) + w.block.n * a.x.batch + pixel * a.x.step;
    Gemm<A, A, T> g{.a = nullptr,
                    .a_row = a.x.step,
                    .a_k = 1,
                    .b = weight.get(),
                    .b_k = p.primary,
                    .c = static_cast<T*>(a.raw.data) + w.block.n * a.raw.batch + pixel * a.raw.step,
                    .c_row = a.raw.step,
                    .rows = count,
                    .cols = p.primary,
                    .depth = p.in_channels};
    bias.add_to(g, 0, Finish::by_column);
    fetch_rows(x, a.x.step, count, p.in_channels);
    if constexpr (kWiden) {
      A* buffer = wide.get() + w.thread * size;
      widen_lines(x, a.x.step, count, p.in_channels, buffer, p.in_channels);
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
  const int64_t y_size, z_size, size;
  const Scratch<A> memory;
  const Act act;

 public:
  UnitForward(const Problem& problem, const TrainArgs& args, const Sweep& sweep, int threads, const A* weight,
              const ScaleShift<A>& primary_norm, const Act& activation)
      : p(problem), a(args), cheap_weight(weight), primary(primary_norm),
        y_size(U::size((sweep.rows() + 2 * (p.kernel / 2)) * p.width)), z_size(U::size(sweep.rows() * p.width)),
        size(y_size + z_size), memory(threads * size), act(activation) {}

  // Statistics of the cheap maps; writes the primary ones.
  void sum(const Work& w, const ChunkSums& sums) const {
    const U unit(p, w.unit);
    const Strip<A> y = primary_maps(w, unit, p.splice);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const A* z = cheap_maps(w, unit, y, s);
      const int64_t pixels = w.block.rows.count() * p.width;
      add_moments(sums, unit, w.chunk, w.seen, pixels,
                  moments<A, Planar>(pixels, [&](int64_t i, Mask) { return load(z + i * U::kLane); }), p.multiplier, s);
    }
  }

  // Writes the cheap maps, and the primary ones where nobody did.
  void finish(const Work& w, const ScaleShift<A>& cheap, bool emit_primary) const {
    const U unit(p, w.unit);
    const Strip<A> y = primary_maps(w, unit, emit_primary);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const Plane<T, Planar> out(p, unit, a.out, w.block, p.kept_primary() + unit.channel * p.multiplier + s,
                                 p.multiplier, p.out_channels);
      if (!out) return;
      A* z = cheap_maps(w, unit, y, s);
      const Vec<A> scale = unit.parameter(cheap.scale(), p.multiplier, s);
      const Vec<A> shift = unit.parameter(cheap.shift(), p.multiplier, s);
      out.write(z, [&](int64_t i, Mask) { return act.value(load(z + i * U::kLane) * scale + shift); });
    }
  }

 private:
  A* scratch(const Work& w) const { return memory.get() + w.thread * size; }

  // Activated, with as many rows around as the cheap part reads.
  Strip<A> primary_maps(const Work& w, const U& unit, bool emit) const {
    const Strip<A> y{scratch(w), w.block.rows.widened(p.kernel / 2, p)};
    const Vec<A> scale = unit.parameter(primary.scale()), shift = unit.parameter(primary.shift());
    const auto raw =
        Plane<const T, Planar>(p, unit, a.raw, {w.block.n, y.rows}, unit.channel, 1, p.primary).read(y.data);
    each_vector<A, Planar>(y.rows.count() * p.width, [&](int64_t i, Mask m) {
      store(y.data + i * U::kLane, act.value(raw.load(i, m) * scale + shift));
    });
    if (!emit) return y;
    A* own = y.data + (w.block.rows.from - y.rows.from) * p.width * U::kPixel;
    Plane<T, Planar>(p, unit, a.out, w.block, unit.channel, 1, p.primary).write(own, [&](int64_t i, Mask) {
      return load(own + i * U::kLane);
    });
    return y;
  }

  // Before normalisation.
  A* cheap_maps(const Work& w, const U& unit, const Strip<A>& y, int64_t s) const {
    Vec<A> taps[kMostTaps];
    load_taps(p, unit, cheap_weight, s, false, taps);
    const Strip<A> z{scratch(w) + y_size, w.block.rows};
    depthwise<A, Planar>(p, {y.data, y.rows}, z, taps);
    return z.data;
  }
};

template <class T, bool Planar>
void sum_raw(const Problem& p, const TrainArgs& a, const Work& w, const ChunkSums& sums, Compute<T>* stage) {
  using A = Compute<T>;
  using U = Unit<A, Planar>;
  const int64_t pixels = w.block.rows.count() * p.width;
  for (int64_t u = 0; u < U::number(p); ++u) {
    const U unit(p, u);
    const auto raw = Plane<const T, Planar>(p, unit, a.raw, w.block, unit.channel, 1, p.primary).read(stage);
    add_moments(sums, unit, w.chunk, w.seen, pixels,
                moments<A, Planar>(pixels, [&](int64_t i, Mask m) { return raw.load(i, m); }), 1, 0);
  }
}

// Round 1, by the layout of the maps.
template <class T, bool Planar>
void raw_maps(const Problem& p, const TrainArgs& a, const Sweep& sweep, int threads, const ChunkSums& sums) {
  using A = Compute<T>;
  const bool planar = planar_units<A>(p);
  const int64_t size = Planar && !planar ? Unit<A, false>::size(sweep.rows() * p.width) : 0;
  const Scratch<A> stages(threads * size);
  const std::conditional_t<Planar, RawPlanar<T>, RawChannelsLast<T>> product(p, a, sweep.rows(), threads);
  if (!p.has_primary && !a.primary_batch) return;  // raw is there, and nobody asks for its sums
  sweep.run([&](const Work& w) {
    if (p.has_primary) product(w);
    if (!a.primary_batch) return;
    if (Planar && planar)
      sum_raw<T, Planar>(p, a, w, sums, nullptr);
    else
      sum_raw<T, false>(p, a, w, sums, stages.get() + w.thread * size);
  });
}

// Rounds 2 and 3, by what the lanes of a unit are.
template <class T, bool Planar>
void normalise_units(const Problem& p, const TrainArgs& a, const Threads& threads,
                     const ScaleShift<Compute<T>>& primary) {
  using A = Compute<T>;
  const Transposed<T> cheap_weight(a.cheap_weight, p.cheap(), int64_t(p.kernel) * p.kernel);
  const Sweep sweep(p, threads, unit_rows<A, Planar>(p), Unit<A, Planar>::number(p));
  const ChunkSums sums(a.cheap_batch ? sweep.chunks : 0, 2, p.cheap());
  with_activation<A>(p.activation, [&](const auto& act) {
    const UnitForward<T, Planar, std::decay_t<decltype(act)>> unit(p, a, sweep, threads.count, cheap_weight.get(),
                                                                   primary, act);
    if (a.cheap_batch) sweep.run([&](const Work& w) { unit.sum(w, sums); });
    const ScaleShift<A> cheap(
        statistics<A>(a.cheap, a.cheap_batch, sums, sweep, a.cheap_eps, a.cheap_stats, a.cheap_variance, p.cheap()),
        p.cheap());
    sweep.run([&](const Work& w) { unit.finish(w, cheap, p.splice && !a.cheap_batch); });
  });
}

template <class T>
void train_in(const Problem& p, const TrainArgs& a, const Threads& threads) {
  using A = Compute<T>;
  const int64_t bytes = p.in_channels * sizeof(T);
  const Sweep sweep(p, threads, p.channels_last ? product_rows<false>(p, bytes) : product_rows<true>(p, bytes), 1);
  const ChunkSums sums(a.primary_batch ? sweep.chunks : 0, 2, p.primary);
  if (p.channels_last)
    raw_maps<T, false>(p, a, sweep, threads.count, sums);
  else
    raw_maps<T, true>(p, a, sweep, threads.count, sums);
  const ScaleShift<A> primary(statistics<A>(a.primary, a.primary_batch, sums, sweep, a.primary_eps, a.primary_stats,
                                            a.primary_variance, p.primary),
                              p.primary);
  if (planar_units<A>(p))
    normalise_units<T, true>(p, a, threads, primary);
  else
    normalise_units<T, false>(p, a, threads, primary);
}

}  // namespace

void train(const Problem& p, const TrainArgs& a, const Threads& threads) {
  with_format(p.dtype, [&](auto format) { train_in<typename decltype(format)::type>(p, a, threads); });
}

}  // namespace fif::FIF_ISA
