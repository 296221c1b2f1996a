// Training forward: batch statistics need two rounds over the primary maps and two over the cheap ones, but both stay
// inside a channel. So: one product writes the raw primary maps, then every unit (a channel of the whole batch) is brought
// to scratch once and normalised, activated, convolved, normalised and activated there, before it leaves for the output.
//
// Memory traffic per pixel: C read, M written and read (raw), M + N written. Saved for backward: raw and the statistics.
// Results do not depend on the number of threads: a unit is one task, and a product's sums have a fixed order.
#include "pass.h"

namespace fif::FIF_ISA {
namespace {

template <class T>
void raw_planar(const Problem& p, const TrainArgs& a, const Threads& threads) {
  using A = Compute<T>;
  const Computed<T> weight(a.primary_weight, p.primary * p.in_channels);
  const int64_t blocks = ceil_div(p.primary, kTileRows), block = ceil_div(p.primary, blocks);
  const int64_t rows = tile_rows(p, p.in_channels * sizeof(T)), cuts = ceil_div(p.height, rows);
  parallel(threads, p.batch * cuts, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / cuts, row = task % cuts * rows, pixel = row * p.width;
      for (int64_t m = 0; m < p.primary; m += block)
        gemm(Gemm<A, T, T>{.a = weight.get() + m * p.in_channels,
                           .a_row = p.in_channels,
                           .a_k = 1,
                           .b = static_cast<const T*>(a.x.data) + n * a.x.batch + pixel,
                           .b_k = a.x.step,
                           .c = static_cast<T*>(a.raw.data) + n * a.raw.batch + m * a.raw.step + pixel,
                           .c_row = a.raw.step,
                           .rows = min_of(block, p.primary - m),
                           .cols = min_of(rows, p.height - row) * p.width,
                           .depth = p.in_channels});
    }
  });
}

template <class T>
void raw_channels_last(const Problem& p, const TrainArgs& a, const Threads& threads) {
  using A = Compute<T>;
  constexpr int64_t kPixels = 16 * kTileRows;
  const Transposed<T> weight(a.primary_weight, p.primary, p.in_channels);
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
      if constexpr (sizeof(T) == sizeof(A)) {
        g.a = x;
      } else {
        A* buffer = wide.get() + thread * kPixels * p.in_channels;
        widen_pixels(x, a.x.step, count, p.in_channels, buffer);
        g.a = buffer;
        g.a_row = p.in_channels;
      }
      gemm(g);
    }
  });
}

// Mean and rstd of one channel (of each lane's channel), written to stats and, unbiased, to variance.
template <class A, bool Planar>
struct Statistics {
  Vec<A> mean, rstd;

  // Two rounds over the unit's planes in scratch: the mean, then the squares around it, which loses nothing to cancellation.
  Statistics(const Unit<A, Planar>& unit, const A* planes, double eps, A* variance, int64_t stride, int64_t offset) {
    const Problem& p = unit.p;
    const int64_t size = unit.plane_size(p);
    const double count = static_cast<double>(p.batch * p.pixels());
    Total<A, Planar> total, squares;
    for (int64_t n = 0; n < p.batch; ++n) {
      Vec<A> sum{};
      unit.each([&](int64_t at, int64_t, Mask m) { sum += keep_lanes(load(planes + n * size + at), m); });
      total.add(sum);
    }
    mean = total.over(count);
    for (int64_t n = 0; n < p.batch; ++n) {
      Vec<A> sum{};
      unit.each([&](int64_t at, int64_t, Mask m) {
        const Vec<A> d = keep_lanes(load(planes + n * size + at) - mean, m);
        sum += d * d;
      });
      squares.add(sum);
    }
    const Vec<A> biased = squares.over(count);
    for (int l = 0; l < kLanes<A>; ++l) rstd[l] = A(1) / sqrt(biased[l] + A(eps));
    unit.put(variance, squares.over(count - 1), stride, offset);
  }
  // Frozen ones.
  Statistics(const Unit<A, Planar>& unit, const Affine& affine, int64_t stride, int64_t offset)
      : mean(affine.mean ? unit.parameter(static_cast<const A*>(affine.mean), stride, offset) : Vec<A>{}),
        rstd(affine.rstd ? unit.parameter(static_cast<const A*>(affine.rstd), stride, offset) : splat<A>(1)) {}
};

template <class T, bool Planar>
class UnitForward {
  using A = Compute<T>;
  const Problem& p;
  const TrainArgs& a;
  const Unit<A, Planar> unit;
  const int64_t size;
  A* const y;  // [B] planes: raw, then activated primary maps
  A* const z;  // [B] planes: one cheap map each
  const Clamp<A> clamp;

 public:
  UnitForward(const Problem& problem, const TrainArgs& args, int64_t index, A* scratch)
      : p(problem), a(args), unit(problem, index), size(unit.plane_size(problem)), y(scratch), z(scratch + p.batch * size),
        clamp(p.activation) {}

  void run(const A* cheap_weight) {
    for (int64_t n = 0; n < p.batch; ++n) {
      const Plane<const T, Planar> raw(unit, a.raw, n, unit.channel, 1, p.primary);
      unit.each([&](int64_t at, int64_t i, Mask) { store(y + n * size + at, raw.load(i)); });
    }
    normalise(y, a.primary, a.primary_batch, a.primary_eps, a.primary_stats, a.primary_variance, p.primary, 1, 0, 0,
              p.splice);
    Vec<A> taps[kMostTaps];
    for (int64_t s = 0; s < p.multiplier; ++s) {
      load_taps(unit, cheap_weight, s, false, taps);
      for (int64_t n = 0; n < p.batch; ++n) depthwise<A, Planar>(p, y + n * size, z + n * size, taps, false);
      normalise(z, a.cheap, a.cheap_batch, a.cheap_eps, a.cheap_stats, a.cheap_variance, p.cheap(), p.multiplier, s,
                p.kept_primary(), true);
    }
  }

 private:
  // Normalises and activates the planes in place and sends them to their channels of the output, if they have any. The
  // unit's channels are `stride` apart in the parameters, from `offset`, and `first` further on in the output.
  void normalise(A* planes, const Affine& affine, bool batch, double eps, void* stats, void* variance, int64_t channels,
                 int64_t stride, int64_t offset, int64_t first, bool kept) {
    const Statistics<A, Planar> s =
        batch ? Statistics<A, Planar>(unit, planes, eps, static_cast<A*>(variance), stride, offset)
              : Statistics<A, Planar>(unit, affine, stride, offset);
    unit.put(static_cast<A*>(stats), s.mean, stride, offset);
    unit.put(static_cast<A*>(stats) + channels, s.rstd, stride, offset);
    const Vec<A> weight =
        affine.weight ? unit.parameter(static_cast<const A*>(affine.weight), stride, offset) : splat<A>(1);
    const Vec<A> bias = affine.bias ? unit.parameter(static_cast<const A*>(affine.bias), stride, offset) : Vec<A>{};
    const Vec<A> scale = s.rstd * weight, shift = bias - s.mean * scale;
    for (int64_t n = 0; n < p.batch; ++n) {
      const Plane<T, Planar> out(unit, a.out, n, first + unit.channel * stride + offset, stride, p.out_channels);
      A* plane = planes + n * size;
      unit.each([&](int64_t at, int64_t i, Mask) {
        const Vec<A> v = activate<A>(load(plane + at) * scale + shift, p.activation, clamp);
        store(plane + at, v);
        if (kept && out) out.store(i, v);
      });
    }
  }
};

template <class T, bool Planar>
void normalise_units(const Problem& p, const TrainArgs& a, const Threads& threads) {
  using A = Compute<T>;
  using U = Unit<A, Planar>;
  const Computed<T> cheap_weight(a.cheap_weight, p.cheap() * p.kernel * p.kernel);
  const int64_t each = 2 * p.batch * U::plane_size(p);
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
