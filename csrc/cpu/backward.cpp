// Backward, in three rounds over blocks of one image that stay in cache, with the maps recomputed from the raw primary
// ones:
//   1. the sums that the gradient through the cheap normalisation needs
//   2. that gradient, on through the depthwise part and the primary activation; its sums
//   3. through the primary normalisation, and the product that is the input's gradient
// then the product that is the primary weight's gradient.
//
// Memory traffic per pixel: the cheap maps' gradient and raw read twice, the primary maps' gradient once; the raw maps'
// gradient (M, compute type) written twice and read twice; C read, C written. Sums have a fixed order whatever the
// number of threads, see unit.h; a row of the weight's gradient belongs to one task.
#include "../pages.h"
#include "norm.h"

namespace fif::FIF_ISA {
namespace {

template <class T, bool Planar, class Act>
class UnitBackward {
  using A = Compute<T>;
  using U = Unit<A, Planar>;
  const Problem& p;
  const BackwardArgs& a;
  const A* const cheap_weight;  // [K * K, cheap maps]
  const Norm<A>&primary, &cheap;
  const int64_t halo, y_size, z_size, own_size, size;
  const Scratch<A> memory;
  const Act act;

 public:
  UnitBackward(const Problem& problem, const BackwardArgs& args, const Sweep& sweep, int threads, const A* weight,
               const Norm<A>& primary_norm, const Norm<A>& cheap_norm, const Act& activation)
      : p(problem), a(args), cheap_weight(weight), primary(primary_norm), cheap(cheap_norm), halo(p.kernel / 2),
        y_size(U::size((sweep.rows() + 4 * halo) * p.width)), z_size(U::size((sweep.rows() + 2 * halo) * p.width)),
        own_size(U::size(sweep.rows() * p.width)), size(y_size + 2 * z_size + 2 * own_size), memory(threads * size),
        act(activation) {}

  // Round 1. The gradient before the cheap activation: its sum, and that of it times the centred value.
  void sum(const Work& w, const ChunkSums& sums) const {
    const U unit(p, w.unit);
    const Scratches at = scratches(w);
    const Rows rows = w.block.rows;
    const Strip<A> y = primary_maps(w, unit, rows.widened(halo, p), at);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const UnitNorm<A, Planar> norm(unit, cheap, p.multiplier, s);
      const Strip<A> z = cheap_maps(unit, y, rows, s, at);
      const auto grad = cheap_gradient(w, unit, rows, s).read(at.stage);
      PairSum<A> sum;
      if (grad) {
        each_vector<A, Planar>(rows.count() * p.width, [&](int64_t i, Mask m) {
          const Vec<A> value = load(z.data + i * U::kLane);
          const Vec<A> g = keep_lanes(act.gradient(grad.load(i, m), norm.normalised(value)), m);
          sum.add(g, keep_lanes(g * (value - norm.mean), m));
        });
      }
      add(sums, w, unit, sum, p.multiplier, s);
    }
  }

  // Round 2. Leaves the gradient before the primary activation in grad_raw.
  void run(const Work& w, const Output& grad_raw, const ChunkSums& weight_sums, const ChunkSums& sums) const {
    const U unit(p, w.unit);
    const Scratches at = scratches(w);
    const Rows rows = w.block.rows, around = rows.widened(halo, p);
    const Strip<A> y = primary_maps(w, unit, around.widened(halo, p), at);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const Strip<A> g = cheap_normalisation(w, unit, y, around, s, at);
      const Strip<const A> own{g.data + (rows.from - around.from) * p.width * U::kPixel, rows};
      Vec<A> taps[kMostTaps], tap_sums[kMostTaps] = {};
      depthwise_weight_gradient<A, Planar>(p, own, {y.data, y.rows}, tap_sums);
      for (int64_t t = 0; t < int64_t(p.kernel) * p.kernel; ++t)
        weight_sums.add(w, t, unit, U::total(tap_sums[t]), p.multiplier, s);
      load_taps(p, unit, cheap_weight, s, true, taps);
      depthwise<A, Planar>(p, {g.data, g.rows}, {s == 0 ? at.total : at.part, rows}, taps);
      if (s > 0)
        each_vector<A, Planar>(rows.count() * p.width, [&](int64_t i, Mask) {
          store(at.total + i * U::kLane, load(at.total + i * U::kLane) + load(at.part + i * U::kLane));
        });
    }
    const UnitNorm<A, Planar> norm(unit, primary, 1, 0);
    const auto raw = Plane<const T, Planar>(p, unit, a.raw, w.block, unit.channel, 1, p.primary).read(at.stage);
    const auto grad = Plane<const T, Planar>(p, unit, a.grad, w.block, unit.channel, 1, p.kept_primary()).read(at.part);
    PairSum<A> sum;
    Plane<A, Planar>(p, unit, grad_raw, w.block, unit.channel, 1, p.primary).write(at.total, [&](int64_t i, Mask m) {
      Vec<A> g = load(at.total + i * U::kLane);
      if (grad) g += grad.load(i, m);
      const Vec<A> value = raw.load(i, m);
      g = keep_lanes(act.gradient(g, norm.normalised(value)), m);
      sum.add(g, keep_lanes(g * (value - norm.mean), m));
      return g;
    });
    add(sums, w, unit, sum, 1, 0);
  }

 private:
  // Primary and cheap maps, what comes from memory for the rows around, and two for the block's own rows.
  struct Scratches {
    A *y, *z, *stage, *total, *part;
  };
  Scratches scratches(const Work& w) const {
    A* y = memory.get() + w.thread * size;
    A *z = y + y_size, *stage = z + z_size, *total = stage + z_size;
    return {y, z, stage, total, total + own_size};
  }

  static void add(const ChunkSums& sums, const Work& w, const U& unit, PairSum<A>& sum, int64_t stride,
                  int64_t offset) {
    sum.finish();
    sums.add(w, 0, unit, U::total(sum.first), stride, offset);
    sums.add(w, 1, unit, U::total(sum.second), stride, offset);
  }
  Plane<const T, Planar> cheap_gradient(const Work& w, const U& unit, Rows rows, int64_t s) const {
    const int64_t channel = p.kept_primary() + unit.channel * p.multiplier + s;
    return {p, unit, a.grad, {w.block.n, rows}, channel, p.multiplier, p.out_channels};
  }

  // Activated.
  Strip<A> primary_maps(const Work& w, const U& unit, Rows rows, const Scratches& at) const {
    const Vec<A> scale = unit.parameter(primary.scale()), shift = unit.parameter(primary.shift());
    const auto raw = Plane<const T, Planar>(p, unit, a.raw, {w.block.n, rows}, unit.channel, 1, p.primary).read(at.y);
    each_vector<A, Planar>(rows.count() * p.width, [&](int64_t i, Mask m) {
      store(at.y + i * U::kLane, act.value(raw.load(i, m) * scale + shift));
    });
    return {at.y, rows};
  }
  // Before normalisation.
  Strip<A> cheap_maps(const U& unit, const Strip<A>& y, Rows rows, int64_t s, const Scratches& at) const {
    Vec<A> taps[kMostTaps];
    load_taps(p, unit, cheap_weight, s, false, taps);
    depthwise<A, Planar>(p, {y.data, y.rows}, {at.z, rows}, taps);
    return {at.z, rows};
  }
  // The gradient of the cheap maps before normalisation.
  Strip<A> cheap_normalisation(const Work& w, const U& unit, const Strip<A>& y, Rows rows, int64_t s,
                               const Scratches& at) const {
    const UnitNorm<A, Planar> norm(unit, cheap, p.multiplier, s);
    const Strip<A> z = cheap_maps(unit, y, rows, s, at);
    const auto grad = cheap_gradient(w, unit, rows, s).read(at.stage);
    each_vector<A, Planar>(rows.count() * p.width, [&](int64_t i, Mask m) {
      const Vec<A> value = load(z.data + i * U::kLane);
      const Vec<A> g = grad ? act.gradient(grad.load(i, m), norm.normalised(value)) : Vec<A>{};
      store(z.data + i * U::kLane, norm.through(g, value));
    });
    return z;
  }
};

// [rows, columns] of the compute type to T, in place of a cast.
template <class T>
void narrow_to(const Compute<T>* from, T* to, int64_t count) {
  constexpr int L = kLanes<Compute<T>>;
  for (int64_t i = 0; i < count; i += L) {
    const Mask m = first_lanes(min_of<int64_t>(L, count - i));
    store(to + i, load(from + i, m), m);
  }
}

// ---- through the primary normalisation, and the input's gradient: W1 transposed times the raw maps' gradient

template <class T, bool Planar>
void normalisation(const Problem& p, const BackwardArgs& a, const Norm<Compute<T>>& norm, const Output& grad_raw,
                   const Work& w) {
  using A = Compute<T>;
  constexpr int L = kLanes<A>;
  const int64_t pixel = w.block.rows.from * p.width, pixels = w.block.rows.count() * p.width;
  A* g = static_cast<A*>(grad_raw.data) + w.block.n * grad_raw.batch + pixel * (Planar ? 1 : grad_raw.step);
  const T* raw = static_cast<const T*>(a.raw.data) + w.block.n * a.raw.batch + pixel * (Planar ? 1 : a.raw.step);
  if constexpr (Planar) {
    fetch_rows(g, grad_raw.step, p.primary, pixels);
    fetch_rows(raw, a.raw.step, p.primary, pixels);
  }
  const int64_t outer = Planar ? p.primary : pixels, inner = Planar ? pixels : p.primary;
  for (int64_t j = 0; j < outer; ++j, g += grad_raw.step, raw += a.raw.step) {
    auto at = [&](const A* values, int64_t i, Mask m) { return Planar ? splat<A>(values[j]) : load(values + i, m); };
    for (int64_t i = 0; i < inner; i += L) {
      const Mask m = first_lanes(min_of<int64_t>(L, inner - i));
      const Vec<A> centred = load(raw + i, m) - at(norm.mean(), i, m);
      const Vec<A> rest = load(g + i, m) - at(norm.alpha(), i, m) - at(norm.beta(), i, m) * centred;
      store(g + i, at(norm.scale(), i, m) * rest, m);
    }
  }
}

template <class T>
void input_planar(const Problem& p, const BackwardArgs& a, const Compute<T>* weight, const Output& grad_raw,
                  const Work& w) {
  using A = Compute<T>;
  const int64_t pixel = w.block.rows.from * p.width,
                block = ceil_div(p.in_channels, ceil_div(p.in_channels, kTileRows));
  for (int64_t c = 0; c < p.in_channels; c += block)
    gemm(Gemm<A, A, T>{.a = weight + c,
                       .a_row = 1,
                       .a_k = p.in_channels,
                       .b = static_cast<const A*>(grad_raw.data) + w.block.n * grad_raw.batch + pixel,
                       .b_k = grad_raw.step,
                       .c = static_cast<T*>(a.grad_x.data) + w.block.n * a.grad_x.batch + c * a.grad_x.step + pixel,
                       .c_row = a.grad_x.step,
                       .rows = min_of(block, p.in_channels - c),
                       .cols = w.block.rows.count() * p.width,
                       .depth = p.primary});
}

template <class T>
void input_channels_last(const Problem& p, const BackwardArgs& a, const Compute<T>* weight, const Output& grad_raw,
                         const Work& w) {
  using A = Compute<T>;
  const int64_t pixel = w.block.rows.from * p.width;
  gemm(Gemm<A, A, T>{.a = static_cast<const A*>(grad_raw.data) + w.block.n * grad_raw.batch + pixel * grad_raw.step,
                     .a_row = grad_raw.step,
                     .a_k = 1,
                     .b = weight,
                     .b_k = p.in_channels,
                     .c = static_cast<T*>(a.grad_x.data) + w.block.n * a.grad_x.batch + pixel * a.grad_x.step,
                     .c_row = a.grad_x.step,
                     .rows = w.block.rows.count() * p.width,
                     .cols = p.in_channels,
                     .depth = p.primary});
}

// Without a product the raw maps are the input.
template <class T, bool Planar>
void copy_out(const Problem& p, const BackwardArgs& a, const Output& grad_raw, const Work& w) {
  const int64_t pixel = w.block.rows.from * p.width, pixels = w.block.rows.count() * p.width;
  const Compute<T>* from =
      static_cast<const Compute<T>*>(grad_raw.data) + w.block.n * grad_raw.batch + pixel * (Planar ? 1 : grad_raw.step);
  T* to = static_cast<T*>(a.grad_x.data) + w.block.n * a.grad_x.batch + pixel * (Planar ? 1 : a.grad_x.step);
  for (int64_t i = 0; i < (Planar ? p.primary : pixels); ++i, from += grad_raw.step, to += a.grad_x.step)
    narrow_to<T>(from, to, Planar ? pixels : p.primary);
}

// ---- the primary weight's gradient: the raw maps' gradient times the input transposed

// Pixels whose input channels fill an eighth of a mebibyte, so that they are read from cache for every block of maps.
template <class A>
int64_t weight_pixels(const Problem& p) {
  constexpr int64_t kBytes = 128 * 1024, kLeast = 64;
  return min_of(p.pixels(), max_of<int64_t>(kLeast, kBytes / (p.in_channels * int64_t(sizeof(A)))));
}

// The product wants the input's channels in lanes: some pixels at a time are transposed into a buffer.
template <class T>
void weight_planar(const Problem& p, const BackwardArgs& a, const Output& grad_raw, Compute<T>* buffer, Compute<T>* out,
                   int64_t m0, int64_t m1) {
  using A = Compute<T>;
  const int64_t chunk = weight_pixels<A>(p);
  for (int64_t i = m0 * p.in_channels; i < m1 * p.in_channels; ++i) out[i] = 0;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t pixel = 0; pixel < p.pixels(); pixel += chunk) {
      const int64_t count = min_of(chunk, p.pixels() - pixel);
      const T* x = static_cast<const T*>(a.x.data) + n * a.x.batch + pixel;
      fetch_rows(x, a.x.step, p.in_channels, count);
      transpose(x, a.x.step, p.in_channels, count, buffer, p.in_channels);
      gemm(Gemm<A, A, A>{.a = static_cast<const A*>(grad_raw.data) + n * grad_raw.batch + m0 * grad_raw.step + pixel,
                         .a_row = grad_raw.step,
                         .a_k = 1,
                         .b = buffer,
                         .b_k = p.in_channels,
                         .c = out + m0 * p.in_channels,
                         .c_row = p.in_channels,
                         .rows = m1 - m0,
                         .cols = p.in_channels,
                         .depth = count,
                         .finish = Finish::accumulate});
    }
}

// Blocks of the input's channels and of pixels: a block of the sums stays in cache over all pixels, and is read and
// written once for as many pixels as are summed in registers.
template <class T>
void weight_channels_last(const Problem& p, const BackwardArgs& a, const Output& grad_raw, Compute<T>* out, int64_t m0,
                          int64_t m1) {
  using A = Compute<T>;
  constexpr int64_t kPixels = 256, kChannels = 12 * kLanes<A>;
  for (int64_t i = m0 * p.in_channels; i < m1 * p.in_channels; ++i) out[i] = 0;
  // Images that follow each other without a gap are one.
  const bool dense = a.x.batch == p.pixels() * a.x.step;
  const int64_t images = dense ? 1 : p.batch, pixels = dense ? p.batch * p.pixels() : p.pixels();
  for (int64_t c = 0; c < p.in_channels; c += kChannels)
    for (int64_t n = 0; n < images; ++n)
      for (int64_t pixel = 0; pixel < pixels; pixel += kPixels) {
        const int64_t count = min_of(kPixels, pixels - pixel), channels = min_of(kChannels, p.in_channels - c);
        const T* x = static_cast<const T*>(a.x.data) + n * a.x.batch + pixel * a.x.step + c;
        fetch_rows(x, a.x.step, count, channels);
        gemm(Gemm<A, T, A>{.a = static_cast<const A*>(grad_raw.data) + n * grad_raw.batch + pixel * grad_raw.step + m0,
                           .a_row = 1,
                           .a_k = grad_raw.step,
                           .b = x,
                           .b_k = a.x.step,
                           .c = out + m0 * p.in_channels + c,
                           .c_row = p.in_channels,
                           .rows = m1 - m0,
                           .cols = channels,
                           .depth = count,
                           .finish = Finish::accumulate});
      }
}

// Rounds 1 and 2: all that lies between the output's gradient and the primary normalisation.
template <class T, bool Planar>
void backward_units(const Problem& p, const BackwardArgs& a, const Threads& threads, Norm<Compute<T>>& primary,
                    const Output& grad_raw) {
  using A = Compute<T>;
  using U = Unit<A, Planar>;
  const int64_t taps = int64_t(p.kernel) * p.kernel;
  const double count = static_cast<double>(p.batch * p.pixels());
  const Transposed<T> cheap_weight(a.cheap_weight, p.cheap(), taps);
  Norm<A> cheap(a.cheap, p.cheap());
  const Sweep sweep(p, threads, unit_rows<A, Planar>(p), U::number(p));
  const ChunkSums cheap_sums(sweep.chunks, 2, p.cheap()), primary_sums(sweep.chunks, 2, p.primary);
  const ChunkSums weight_sums(sweep.chunks, taps, p.cheap());
  with_activation<A>(p.activation, [&](const auto& act) {
    const UnitBackward<T, Planar, std::decay_t<decltype(act)>> unit(p, a, sweep, threads.count, cheap_weight.get(),
                                                                    primary, cheap, act);
    sweep.run([&](const Work& w) { unit.sum(w, cheap_sums); });
    cheap.finish(cheap_sums, sweep.chunks, a.cheap_batch, count, static_cast<A*>(a.grad_cheap_affine));
    sweep.run([&](const Work& w) { unit.run(w, grad_raw, weight_sums, primary_sums); });
  });
  primary.finish(primary_sums, sweep.chunks, a.primary_batch, count, static_cast<A*>(a.grad_primary_affine));
  store_weight_gradient<T>(weight_sums, sweep.chunks, taps, static_cast<T*>(a.grad_cheap_weight));
}

template <class T, bool Planar>
void backward_in(const Problem& p, const BackwardArgs& a, const Threads& threads) {
  using A = Compute<T>;
  const int64_t weights = p.primary * p.in_channels;
  const Scratch<A> raw_memory(p.batch * p.primary * p.pixels());
  prefer_large_pages(raw_memory.get(), p.batch * p.primary * p.pixels() * int64_t(sizeof(A)));
  const Output grad_raw{raw_memory.get(), p.primary * p.pixels(), Planar ? p.pixels() : p.primary};
  Norm<A> norm(a.primary, p.primary);
  if (planar_units<A>(p))
    backward_units<T, true>(p, a, threads, norm, grad_raw);
  else
    backward_units<T, false>(p, a, threads, norm, grad_raw);
  {
    const Computed<T> weight(a.primary_weight, p.has_primary ? weights : 0);
    Sweep(p, threads, product_rows<Planar>(p, p.primary * sizeof(A)), 1).run([&](const Work& w) {
      normalisation<T, Planar>(p, a, norm, grad_raw, w);
      if (!a.grad_x.data) return;
      if (!p.has_primary)
        copy_out<T, Planar>(p, a, grad_raw, w);
      else if constexpr (Planar)
        input_planar<T>(p, a, weight.get(), grad_raw, w);
      else
        input_channels_last<T>(p, a, weight.get(), grad_raw, w);
    });
  }
  if (!a.grad_primary_weight) return;
  const Scratch<A> grad_primary(weights);
  // Even parts, one a thread: a sum over the whole batch stays with one thread.
  const int64_t parts = min_of<int64_t>(threads.count, p.primary), chunk = weight_pixels<A>(p) * p.in_channels;
  const Scratch<A> buffers(Planar ? parts * chunk : 0);
  parallel(threads, parts, [&](int64_t begin, int64_t end, int thread) {
    const int64_t m0 = begin * p.primary / parts, m1 = end * p.primary / parts;
    if constexpr (Planar)
      weight_planar<T>(p, a, grad_raw, buffers.get() + thread * chunk, grad_primary.get(), m0, m1);
    else
      weight_channels_last<T>(p, a, grad_raw, grad_primary.get(), m0, m1);
  });
  narrow_to<T>(grad_primary.get(), static_cast<T*>(a.grad_primary_weight), weights);
}

}  // namespace

void backward(const Problem& p, const BackwardArgs& a, const Threads& threads) {
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    if (p.channels_last)
      backward_in<T, false>(p, a, threads);
    else
      backward_in<T, true>(p, a, threads);
  });
}

}  // namespace fif::FIF_ISA
