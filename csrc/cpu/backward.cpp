// Backward. Unit by unit, as in the forward pass: recompute the primary and cheap maps from the raw primary ones, take
// the gradient through activation, normalisation and depthwise part, and leave the gradient of the raw maps; then two
// products, for the input and for the primary weight.
//
// Memory traffic per pixel: the output's gradient (M + N) and raw read, and read again where a unit is too large for
// the cache; the raw maps' gradient (M, compute type) written twice and read three times; C read, C written. Sums have
// a fixed order whatever the number of threads: a unit, and a row of the weight's gradient, belongs to one task.
#include "pass.h"

namespace fif::FIF_ISA {
namespace {

template <class A>
struct Norm {
  Vec<A> mean, rstd, scale, shift;

  template <bool Planar>
  Norm(const Unit<A, Planar>& unit, const Affine& affine, int64_t stride, int64_t offset) {
    auto get = [&](const void* values, A otherwise) {
      return values ? unit.parameter(static_cast<const A*>(values), stride, offset) : splat<A>(otherwise);
    };
    mean = get(affine.mean, 0);
    rstd = get(affine.rstd, 1);
    scale = rstd * get(affine.weight, 1);
    shift = get(affine.bias, 0) - mean * scale;
  }
};

template <class T, bool Planar>
class UnitBackward {
  using A = Compute<T>;
  const Problem& p;
  const BackwardArgs& a;
  const Unit<A, Planar> unit;
  const int64_t size;
  const bool keep;  // planes of the whole batch, or of one image at a time
  A* const y;       // activated primary maps
  A* const z;       // cheap maps before normalisation
  A* const grad_z;  // gradient of the cheap maps, before activation, then before normalisation
  A* const grad_y;  // gradient of one image's primary maps from the cheap part
  const Norm<A> primary_norm;
  const Clamp<A> clamp;

 public:
  static constexpr int kKept = 3;
  static int64_t scratch(const Problem& p) { return (kKept * slots(p) + 1) * Unit<A, Planar>::plane_size(p); }
  UnitBackward(const Problem& problem, const BackwardArgs& args, int64_t index, A* memory)
      : p(problem), a(args), unit(problem, index), size(unit.plane_size(problem)), keep(slots(p) == p.batch), y(memory),
        z(y + slots(p) * size), grad_z(z + slots(p) * size), grad_y(grad_z + slots(p) * size),
        primary_norm(unit, a.primary, 1, 0), clamp(p.activation) {}

  // Rounds over the batch: two for each of a primary map's cheap maps (sums, then gradients), of which the last one
  // yields the primary maps' sums too, and one for the primary normalisation, over what the others left in grad_raw.
  void run(const A* cheap_weight, const Output& grad_raw) {
    Sums sums;
    for (int64_t s = 0; s < p.multiplier; ++s) cheap(cheap_weight, s, grad_raw, sums);
    sums.finish(*this, primary_norm, a.primary_batch, a.grad_primary_affine, p.primary, 1, 0);
    for (int64_t n = 0; n < p.batch; ++n) {
      const auto raw = raw_plane(n);
      const Plane<A, Planar> out(unit, grad_raw, n, unit.channel, 1, p.primary);
      unit.each([&](int64_t, int64_t i, Mask m) {
        out.store(i, through_norm(out.load(i), raw.load(i), primary_norm, sums, m));
      });
    }
  }

 private:
  static int64_t slots(const Problem& p) { return keeps_planes<A, Planar>(p, kKept) ? p.batch : 1; }
  A* slot(A* planes, int64_t n) const { return planes + (keep ? n : 0) * size; }
  Plane<const T, Planar> raw_plane(int64_t n) const { return {unit, a.raw, n, unit.channel, 1, p.primary}; }

  // Sums of the gradient before activation and of it times the centred value: the gradients of bias and, times rstd,
  // weight. The gradient of the value normalised is scale * (g - alpha - beta * (value - mean)).
  struct Sums {
    Total<A, Planar> plain, centred;
    Vec<A> alpha{}, beta{};
    void add(PairSum<A>& image) {
      image.finish();
      plain.add(image.first);
      centred.add(image.second);
    }
    void finish(const UnitBackward& u, const Norm<A>& norm, bool batch, void* grad_affine, int64_t channels,
                int64_t stride, int64_t offset) {
      A* grad_weight = static_cast<A*>(grad_affine);
      u.unit.put(grad_weight, centred.over(1) * norm.rstd, stride, offset);
      u.unit.put(grad_weight + channels, plain.over(1), stride, offset);
      if (!batch) return;
      const double count = static_cast<double>(u.p.batch * u.p.pixels());
      alpha = plain.over(count);
      beta = centred.over(count) * norm.rstd * norm.rstd;
    }
  };

  // Gradient before the activation, given it after, at value; lanes that do not exist are zero.
  FIF_INLINE Vec<A> through_activation(Vec<A> g, Vec<A> value, const Norm<A>& norm, Mask m) const {
    return keep_lanes(activation_gradient<A>(g, value * norm.scale + norm.shift, p.activation), m);
  }
  FIF_INLINE Vec<A> through_norm(Vec<A> g, Vec<A> value, const Norm<A>& norm, const Sums& sums, Mask m) const {
    return keep_lanes(norm.scale * (g - sums.alpha - sums.beta * (value - norm.mean)), m);
  }

  void cheap(const A* weight, int64_t s, const Output& grad_raw, Sums& primary_sums) {
    const Norm<A> norm(unit, a.cheap, p.multiplier, s);
    Vec<A> taps[kMostTaps], turned[kMostTaps], weight_sums[kMostTaps] = {};
    load_taps(unit, weight, s, false, taps);
    load_taps(unit, weight, s, true, turned);
    Sums sums;
    for (int64_t n = 0; n < p.batch; ++n) {
      recompute(n, taps, norm, s);
      const A *value = slot(z, n), *g = slot(grad_z, n);
      PairSum<A> sum;
      unit.each([&](int64_t at, int64_t, Mask m) {
        const Vec<A> v = load(g + at);
        sum.add(v, keep_lanes(v * (load(value + at) - norm.mean), m));
      });
      sums.add(sum);
    }
    sums.finish(*this, norm, a.cheap_batch, a.grad_cheap_affine, p.cheap(), p.multiplier, s);
    for (int64_t n = 0; n < p.batch; ++n) {
      if (!keep) recompute(n, taps, norm, s);
      const A* value = slot(z, n);
      A* g = slot(grad_z, n);
      unit.each([&](int64_t at, int64_t, Mask m) {
        store(g + at, through_norm(load(g + at), load(value + at), norm, sums, m));
      });
      depthwise_weight_gradient<A, Planar>(p, g, slot(y, n), weight_sums);
      depthwise<A, Planar>(p, g, grad_y, turned, false);
      leave(n, s, grad_raw, primary_sums);
    }
    const int64_t count = int64_t(p.kernel) * p.kernel;
    for (int64_t t = 0; t < count; ++t)
      unit.put(static_cast<A*>(a.grad_cheap_weight), unit.total(weight_sums[t]), p.multiplier * count, s * count + t);
  }

  // One image's primary maps, cheap maps number s before normalisation, and their gradient before activation.
  void recompute(int64_t n, const Vec<A>* taps, const Norm<A>& norm, int64_t s) const {
    A *primary = slot(y, n), *value = slot(z, n), *g = slot(grad_z, n);
    const auto raw = raw_plane(n);
    if (!keep || s == 0)
      unit.each([&](int64_t at, int64_t i, Mask) {
        store(primary + at, activate<A>(raw.load(i) * primary_norm.scale + primary_norm.shift, p.activation, clamp));
      });
    depthwise<A, Planar>(p, primary, value, taps, false);
    const Plane<const T, Planar> grad(unit, a.grad, n, p.kept_primary() + unit.channel * p.multiplier + s, p.multiplier,
                                      p.out_channels);
    unit.each([&](int64_t at, int64_t i, Mask m) {
      store(g + at, through_activation(grad.load(i), load(value + at), norm, m));
    });
  }

  // Adds grad_y to what earlier cheap maps left in grad_raw; after the last one, goes on through the primary
  // activation.
  void leave(int64_t n, int64_t s, const Output& grad_raw, Sums& sums) const {
    const bool last = s == p.multiplier - 1;
    const auto raw = raw_plane(n);
    const Plane<A, Planar> out(unit, grad_raw, n, unit.channel, 1, p.primary);
    const Plane<const T, Planar> grad(unit, a.grad, n, unit.channel, 1, p.kept_primary());
    PairSum<A> sum;
    unit.each([&](int64_t at, int64_t i, Mask m) {
      Vec<A> g = load(grad_y + at);
      if (s > 0) g += out.load(i);
      if (last) {
        const Vec<A> value = raw.load(i);
        g = through_activation(g + grad.load(i), value, primary_norm, m);
        sum.add(g, keep_lanes(g * (value - primary_norm.mean), m));
      }
      out.store(i, g);
    });
    if (last) sums.add(sum);
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

// ---- the input's gradient: W1 transposed times the raw maps' gradient

template <class T>
void input_planar(const Problem& p, const BackwardArgs& a, const Output& grad_raw, const Threads& threads) {
  using A = Compute<T>;
  const Computed<T> weight(a.primary_weight, p.primary * p.in_channels);
  const int64_t blocks = ceil_div(p.in_channels, kTileRows), block = ceil_div(p.in_channels, blocks);
  const int64_t rows = tile_rows(p, p.primary * sizeof(A)), cuts = ceil_div(p.height, rows);
  parallel(threads, p.batch * cuts, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / cuts, row = task % cuts * rows, pixel = row * p.width;
      for (int64_t c = 0; c < p.in_channels; c += block)
        gemm(Gemm<A, A, T>{.a = weight.get() + c,
                           .a_row = 1,
                           .a_k = p.in_channels,
                           .b = static_cast<const A*>(grad_raw.data) + n * grad_raw.batch + pixel,
                           .b_k = grad_raw.step,
                           .c = static_cast<T*>(a.grad_x.data) + n * a.grad_x.batch + c * a.grad_x.step + pixel,
                           .c_row = a.grad_x.step,
                           .rows = min_of(block, p.in_channels - c),
                           .cols = min_of(rows, p.height - row) * p.width,
                           .depth = p.primary});
    }
  });
}

template <class T>
void input_channels_last(const Problem& p, const BackwardArgs& a, const Output& grad_raw, const Threads& threads) {
  using A = Compute<T>;
  constexpr int64_t kPixels = 16 * kTileRows;
  const Computed<T> weight(a.primary_weight, p.primary * p.in_channels);
  const int64_t cuts = ceil_div(p.pixels(), kPixels);
  parallel(threads, p.batch * cuts, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / cuts, pixel = task % cuts * kPixels;
      gemm(Gemm<A, A, T>{.a = static_cast<const A*>(grad_raw.data) + n * grad_raw.batch + pixel * grad_raw.step,
                         .a_row = grad_raw.step,
                         .a_k = 1,
                         .b = weight.get(),
                         .b_k = p.in_channels,
                         .c = static_cast<T*>(a.grad_x.data) + n * a.grad_x.batch + pixel * a.grad_x.step,
                         .c_row = a.grad_x.step,
                         .rows = min_of(kPixels, p.pixels() - pixel),
                         .cols = p.in_channels,
                         .depth = p.primary});
    }
  });
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
      transpose(static_cast<const T*>(a.x.data) + n * a.x.batch + pixel, a.x.step, p.in_channels, count, buffer,
                p.in_channels);
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

template <class T>
void weight_channels_last(const Problem& p, const BackwardArgs& a, const Output& grad_raw, Compute<T>* out, int64_t m0,
                          int64_t m1) {
  using A = Compute<T>;
  const int64_t chunk = weight_pixels<A>(p);
  for (int64_t i = m0 * p.in_channels; i < m1 * p.in_channels; ++i) out[i] = 0;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t pixel = 0; pixel < p.pixels(); pixel += chunk)
      gemm(Gemm<A, T, A>{.a = static_cast<const A*>(grad_raw.data) + n * grad_raw.batch + pixel * grad_raw.step + m0,
                         .a_row = 1,
                         .a_k = grad_raw.step,
                         .b = static_cast<const T*>(a.x.data) + n * a.x.batch + pixel * a.x.step,
                         .b_k = a.x.step,
                         .c = out + m0 * p.in_channels,
                         .c_row = p.in_channels,
                         .rows = m1 - m0,
                         .cols = p.in_channels,
                         .depth = min_of(chunk, p.pixels() - pixel),
                         .finish = Finish::accumulate});
}

template <class T, bool Planar>
void backward_in(const Problem& p, const BackwardArgs& a, const Threads& threads) {
  using A = Compute<T>;
  using U = Unit<A, Planar>;
  const int64_t taps = p.cheap() * p.kernel * p.kernel, weights = p.primary * p.in_channels;
  const Computed<T> cheap_weight(a.cheap_weight, taps);
  const Scratch<A> raw_memory(p.batch * p.primary * p.pixels());
  const Output grad_raw{raw_memory.get(), p.primary * p.pixels(), Planar ? p.pixels() : p.primary};
  {
    // Gradients of weights are summed in the compute type and narrowed once.
    const Scratch<A> grad_cheap(taps);
    BackwardArgs wide = a;
    wide.grad_cheap_weight = grad_cheap.get();
    const int64_t each = UnitBackward<T, Planar>::scratch(p);
    const Scratch<A> scratch(min_of<int64_t>(threads.count, U::count(p)) * each);
    parallel(threads, U::count(p), [&](int64_t begin, int64_t end, int thread) {
      for (int64_t u = begin; u < end; ++u)
        UnitBackward<T, Planar>(p, wide, u, scratch.get() + thread * each).run(cheap_weight.get(), grad_raw);
    });
    narrow_to<T>(grad_cheap.get(), static_cast<T*>(a.grad_cheap_weight), taps);
  }
  if (a.grad_x.data) {
    if constexpr (Planar)
      input_planar<T>(p, a, grad_raw, threads);
    else
      input_channels_last<T>(p, a, grad_raw, threads);
  }
  if (a.grad_primary_weight) {
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
