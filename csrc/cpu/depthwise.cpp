// The depthwise kernels of depthwise.h on scratch planes of the compute type, and the gradient of their weights.
#include "unit.h"

namespace fif::FIF_ISA {
namespace {

template <class A, bool Planar, int K>
void forward(int width, Strip<const A> in, Strip<A> out, const Vec<A>* taps) {
  const int height = static_cast<int>(in.rows.to - in.rows.from);
  const int first = static_cast<int>(out.rows.from - in.rows.from), stop = static_cast<int>(out.rows.to - in.rows.from);
  A* base = out.data - int64_t(first) * width * (Planar ? 1 : kLanes<A>);
  if constexpr (Planar) {
    A weight[K * K];
    for (int t = 0; t < K * K; ++t) weight[t] = taps[t][0];
    depthwise_plane<K, A>(in.data, height, width, first, stop, weight, A(0),
                          [&](int64_t pixel, Vec<A> v, Mask mask) { store(base + pixel, v, mask); });
  } else {
    Vec<A> vectors[K * K];
    for (int t = 0; t < K * K; ++t) vectors[t] = taps[t];
    depthwise_channels<K, A, false, false>(
        in.data, kLanes<A>, height, width, first, stop, vectors, Vec<A>{}, [](int64_t) { return Nowhere{}; },
        [=](int64_t pixel) {
          return Along(base + pixel * kLanes<A>, kLanes<A>, [](A* to, Vec<A> v, auto, LaneMask&) { store(to, v); });
        });
  }
}

// As many rows of taps at a time as the registers hold sums of, beside the gradients that meet one row of `in`.
template <class A, int K>
constexpr int kTapRows = (kRegisters - 1) / (K + 1) > K ? K : (kRegisters - 1) / (K + 1);

// The sums of one column of vectors for rows dy0, dy0 + 1, ... of the taps. Row q of `in`, which is read once, meets
// the gradient's rows q + lead - dy.
template <class A, int K, class In, class Gradient>
FIF_INLINE void column_sums(int gradient_rows, int in_rows, int lead, int dy0, Vec<A>* sums, In load_in,
                            Gradient load_gradient) {
  constexpr int D = kTapRows<A, K>;
  Vec<A> acc[D][K] = {}, g[D] = {};
  // g[d] is the gradient's row q + lead - (dy0 + d); rows outside are zero.
  auto gradient_at = [&](int row) { return row >= 0 && row < gradient_rows ? load_gradient(row) : Vec<A>{}; };
  const int first = max_of(0, dy0 - lead), stop = min_of(in_rows, gradient_rows + dy0 + D - 1 - lead);
  for (int d = 1; d < D; ++d) g[d - 1] = gradient_at(first - 1 + lead - dy0 - (d - 1));
  for (int q = first; q < stop; ++q) {
    FIF_UNROLL for (int d = D - 1; d > 0; --d) g[d] = g[d - 1];
    g[0] = gradient_at(q + lead - dy0);
    FIF_UNROLL for (int dx = 0; dx < K; ++dx) {
      const Vec<A> v = load_in(q, dx);
      FIF_UNROLL for (int d = 0; d < D; ++d) acc[d][dx] += g[d] * v;
    }
  }
  FIF_UNROLL for (int d = 0; d < D; ++d) if (dy0 + d < K) FIF_UNROLL for (int dx = 0; dx < K; ++dx)
      sums[(dy0 + d) * K + dx] += acc[d][dx];
}

template <class A, bool Planar, int K>
void weight_gradient(int width, Strip<const A> gradient, Strip<const A> in, Vec<A>* sums) {
  constexpr int L = kLanes<A>, P = K / 2;
  const int gradient_rows = static_cast<int>(gradient.rows.to - gradient.rows.from);
  const int in_rows = static_cast<int>(in.rows.to - in.rows.from);
  const int lead = static_cast<int>(in.rows.from - gradient.rows.from) + P;
  for (int dy0 = 0; dy0 < K; dy0 += kTapRows<A, K>)
    if constexpr (Planar) {
      for (int column = 0; column < width; column += L) {
        const int lanes = min_of(L, width - column);
        Mask inside[K];
        for (int dx = 0; dx < K; ++dx) {
          const int below = P - dx - column, above = min_of(lanes, width - column - dx + P);
          inside[dx] = above <= 0 ? 0 : first_lanes(above) & ~(below > 0 ? first_lanes(below) : 0);
        }
        column_sums<A, K>(
            gradient_rows, in_rows, lead, dy0, sums,
            [&](int q, int dx) { return load(in.data + int64_t(q) * width + column + dx - P, inside[dx]); },
            [&](int row) { return load(gradient.data + int64_t(row) * width + column, inside[P]); });
      }
    } else {
      for (int column = 0; column < width; ++column)
        column_sums<A, K>(
            gradient_rows, in_rows, lead, dy0, sums,
            [&](int q, int dx) {
              const int from = column + dx - P;
              return from >= 0 && from < width ? load(in.data + (int64_t(q) * width + from) * L) : Vec<A>{};
            },
            [&](int row) { return load(gradient.data + (int64_t(row) * width + column) * L); });
    }
}

}  // namespace

template <class A, bool Planar>
void depthwise(const Problem& p, Strip<const A> in, Strip<A> out, const Vec<A>* taps) {
  with_kernel_size(p.kernel,
                   [&](auto k) { forward<A, Planar, decltype(k)::value>(static_cast<int>(p.width), in, out, taps); });
}

template <class A, bool Planar>
void depthwise_weight_gradient(const Problem& p, Strip<const A> gradient, Strip<const A> in, Vec<A>* sums) {
  with_kernel_size(p.kernel, [&](auto k) {
    weight_gradient<A, Planar, decltype(k)::value>(static_cast<int>(p.width), gradient, in, sums);
  });
}

#define FIF_DEPTHWISE(A, Planar)                                                               \
  template void depthwise<A, Planar>(const Problem&, Strip<const A>, Strip<A>, const Vec<A>*); \
  template void depthwise_weight_gradient<A, Planar>(const Problem&, Strip<const A>, Strip<const A>, Vec<A>*);
FIF_DEPTHWISE(float, true)
FIF_DEPTHWISE(float, false)
FIF_DEPTHWISE(double, true)
FIF_DEPTHWISE(double, false)

}  // namespace fif::FIF_ISA
