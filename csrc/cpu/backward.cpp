// Backward. Unit by unit, as in the forward pass: recompute the primary and cheap maps from the raw primary ones, take the
// gradient through activation, normalisation and depthwise part, and leave the gradient of the raw maps; then two products,
// for the input and for the primary weight.
//
// Memory traffic per pixel: the output's gradient and raw read, the raw maps' gradient (M, compute type) written and read
// twice, C read, C written. Sums have a fixed order whatever the number of threads: a unit, and a block of rows of the
// weight's gradient, is one task.
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
  A* const y;         // activated primary maps
  A* const z;         // cheap maps before normalisation
  A* const grad_z;    // their gradient
  A* const grad_y;    // gradient of the primary maps from the cheap part, then before activation

 public:
  static constexpr int kPlanes = 4;
  UnitBackward(const Problem& problem, const BackwardArgs& args, int64_t index, A* scratch)
      : p(problem), a(args), unit(problem, index), size(unit.plane_size(problem)), y(scratch), z(y + p.batch * size),
        grad_z(z + p.batch * size), grad_y(grad_z + p.batch * size) {}

  void run(const A* cheap_weight, const Output& grad_raw) {
    const Norm<A> norm(unit, a.primary, 1, 0);
    const Clamp<A> clamp(p.activation);
    for (int64_t n = 0; n < p.batch; ++n) {
      const auto raw = raw_plane(n);
      unit.each([&](int64_t at, int64_t i, Mask) {
        store(y + n * size + at, activate<A>(raw.load(i) * norm.scale + norm.shift, p.activation, clamp));
      });
    }
    for (int64_t s = 0; s < p.multiplier; ++s) cheap(cheap_weight, s);
    primary(norm, grad_raw);
  }

 private:
  Plane<const T, Planar> raw_plane(int64_t n) const { return {unit, a.raw, n, unit.channel, 1, p.primary}; }

  // Sums of the gradient before activation and of it times the centred value: the gradients of bias and, times rstd,
  // weight. The gradient of the value normalised is scale * (g - alpha - beta * (value - mean)).
  struct Sums {
    Total<A, Planar> plain, centred;
    Vec<A> alpha{}, beta{};
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

  void cheap(const A* weight, int64_t s) {
    const Norm<A> norm(unit, a.cheap, p.multiplier, s);
    Vec<A> taps[kMostTaps], weight_sums[kMostTaps] = {};
    load_taps(unit, weight, s, false, taps);
    Sums sums;
    for (int64_t n = 0; n < p.batch; ++n) {
      A* value = z + n * size;
      depthwise<A, Planar>(p, y + n * size, value, taps, false);
      const Plane<const T, Planar> grad(unit, a.grad, n, p.kept_primary() + unit.channel * p.multiplier + s, p.multiplier,
                                        p.out_channels);
      through_activation(value, grad_z + n * size, norm, sums, [&](int64_t, int64_t i) { return grad.load(i); });
    }
    sums.finish(*this, norm, a.cheap_batch, a.grad_cheap_affine, p.cheap(), p.multiplier, s);
    load_taps(unit, weight, s, true, taps);
    for (int64_t n = 0; n < p.batch; ++n) {
      A* g = grad_z + n * size;
      const A* value = z + n * size;
      unit.each([&](int64_t at, int64_t, Mask m) { store(g + at, through_norm(load(g + at), load(value + at), norm, sums, m)); });
      depthwise_weight_gradient<A, Planar>(p, g, y + n * size, weight_sums);
      depthwise<A, Planar>(p, g, grad_y + n * size, taps, s > 0);
    }
    const int64_t count = int64_t(p.kernel) * p.kernel;
    for (int64_t t = 0; t < count; ++t)
      unit.put(static_cast<A*>(a.grad_cheap_weight), unit.total(weight_sums[t]), p.multiplier * count, s * count + t);
  }

  void primary(const Norm<A>& norm, const Output& grad_raw) {
    Sums sums;
    for (int64_t n = 0; n < p.batch; ++n) {
      const auto raw = raw_plane(n);
      A* value = z + n * size;  // the cheap maps are done with: raw in the compute type takes their place
      A* g = grad_y + n * size;
      const Plane<const T, Planar> grad(unit, a.grad, n, unit.channel, 1, p.kept_primary());
      unit.each([&](int64_t at, int64_t i, Mask) { store(value + at, raw.load(i)); });
      through_activation(value, g, norm, sums, [&](int64_t at, int64_t i) { return load(g + at) + grad.load(i); });
    }
    sums.finish(*this, norm, a.primary_batch, a.grad_primary_affine, p.primary, 1, 0);
    for (int64_t n = 0; n < p.batch; ++n) {
      const Plane<A, Planar> out(unit, grad_raw, n, unit.channel, 1, p.primary);
      unit.each([&](int64_t at, int64_t i, Mask m) {
        out.store(i, through_norm(load(grad_y + n * size + at), load(z + n * size + at), norm, sums, m));
      });
    }
  }

  template <class Incoming>
  void through_activation(const A* value, A* grad, const Norm<A>& norm, Sums& sums, Incoming incoming) {
    Vec<A> plain{}, centred{};
    unit.each([&](int64_t at, int64_t i, Mask m) {
      const Vec<A> v = load(value + at);
      const Vec<A> g = keep_lanes(activation_gradient<A>(incoming(at, i), v * norm.scale + norm.shift, p.activation), m);
      plain += g;
      centred += keep_lanes(g * (v - norm.mean), m);
      store(grad + at, g);
    });
    sums.plain.add(plain);
    sums.centred.add(centred);
  }

  FIF_INLINE Vec<A> through_norm(Vec<A> g, Vec<A> value, const Norm<A>& norm, const Sums& sums, Mask m) const {
    return keep_lanes(norm.scale * (g - sums.alpha - sums.beta * (value - norm.mean)), m);
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

// Lanes along pixels on both sides: a tile of R x C sums of vectors, its lanes added up once a chunk.
template <class T>
void weight_planar(const Problem& p, const BackwardArgs& a, const Output& grad_raw, Compute<T>* out, int64_t m0, int64_t m1) {
  using A = Compute<T>;
  constexpr int L = kLanes<A>, R = kRegisters == 32 ? 4 : 3, C = kRegisters == 32 ? 5 : 3;
  const int64_t vectors = ceil_div(p.pixels(), L), chunk = max_of<int64_t>(1, 1024 / p.pixels());
  const Mask tail = first_lanes(p.pixels() - (vectors - 1) * L);
  const A* grad = static_cast<const A*>(grad_raw.data);
  const T* x = static_cast<const T*>(a.x.data);
  for (int64_t i = m0 * p.in_channels; i < m1 * p.in_channels; ++i) out[i] = 0;
  for (int64_t n0 = 0; n0 < p.batch; n0 += chunk)
    for (int64_t m = m0; m < m1; m += R)
      for (int64_t c = 0; c < p.in_channels; c += C) {
        Vec<A> sums[R][C] = {};
        for (int64_t n = n0; n < min_of(p.batch, n0 + chunk); ++n) {
          const A* g[R];
          const T* in[C];
          // Past the edge the last row stands in, and its sums are not stored.
          FIF_UNROLL for (int r = 0; r < R; ++r) g[r] = grad + n * grad_raw.batch + min_of(m + r, m1 - 1) * grad_raw.step;
          FIF_UNROLL for (int k = 0; k < C; ++k) in[k] = x + n * a.x.batch + min_of(c + k, p.in_channels - 1) * a.x.step;
          for (int64_t i = 0; i < vectors; ++i) {
            const Mask lanes = i == vectors - 1 ? tail : kAll;
            const bool whole = !kFreeMasks && is_full<A>(lanes);
            Vec<A> gv[R];
            FIF_UNROLL for (int r = 0; r < R; ++r) gv[r] = whole ? load(g[r] + i * L) : load(g[r] + i * L, lanes);
            FIF_UNROLL for (int k = 0; k < C; ++k) {
              const Vec<A> v = whole ? load(in[k] + i * L) : load(in[k] + i * L, lanes);
              FIF_UNROLL for (int r = 0; r < R; ++r) sums[r][k] += gv[r] * v;
            }
          }
        }
        FIF_UNROLL for (int r = 0; r < R; ++r)
          FIF_UNROLL for (int k = 0; k < C; ++k)
            if (m + r < m1 && c + k < p.in_channels) out[(m + r) * p.in_channels + c + k] += sum_lanes<A>(sums[r][k]);
      }
}

template <class T>
void weight_channels_last(const Problem& p, const BackwardArgs& a, const Output& grad_raw, Compute<T>* out, int64_t m0,
                          int64_t m1) {
  using A = Compute<T>;
  constexpr int64_t kPixels = 512;
  for (int64_t i = m0 * p.in_channels; i < m1 * p.in_channels; ++i) out[i] = 0;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t pixel = 0; pixel < p.pixels(); pixel += kPixels)
      gemm(Gemm<A, T, A>{.a = static_cast<const A*>(grad_raw.data) + n * grad_raw.batch + pixel * grad_raw.step + m0,
                         .a_row = 1,
                         .a_k = grad_raw.step,
                         .b = static_cast<const T*>(a.x.data) + n * a.x.batch + pixel * a.x.step,
                         .b_k = a.x.step,
                         .c = out + m0 * p.in_channels,
                         .c_row = p.in_channels,
                         .rows = m1 - m0,
                         .cols = p.in_channels,
                         .depth = min_of(kPixels, p.pixels() - pixel),
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
    const int64_t each = UnitBackward<T, Planar>::kPlanes * p.batch * U::plane_size(p);
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
    const int64_t blocks = ceil_div(p.primary, kTileRows);
    parallel(threads, blocks, [&](int64_t begin, int64_t end, int) {
      const int64_t m0 = begin * kTileRows, m1 = min_of(p.primary, end * kTileRows);
      if constexpr (Planar)
        weight_planar<T>(p, a, grad_raw, grad_primary.get(), m0, m1);
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
