// The depthwise kernels of depthwise.h on scratch planes of the compute type, and the gradient of their weights.
#include "pass.h"

namespace fif::FIF_ISA {
namespace {

template <class A, bool Planar, int K>
void plane_forward(const Problem& p, const A* in, A* out, const Vec<A>* taps, bool accumulate) {
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  auto emit = [&](int64_t pixel, Vec<A> v, Mask mask) {
    A* at = out + pixel * Unit<A, Planar>::kStep;
    if constexpr (Planar) {
      store(at, accumulate ? v + load(at, mask) : v, mask);
    } else {
      store(at, accumulate ? v + load(at) : v);
    }
  };
  if constexpr (Planar) {
    A weight[K * K];
    for (int t = 0; t < K * K; ++t) weight[t] = taps[t][0];
    depthwise_plane<K, A>(in, height, width, 0, height, weight, A(0), emit);
  } else {
    Vec<A> vectors[K * K];
    for (int t = 0; t < K * K; ++t) vectors[t] = taps[t];
    depthwise_channels<K, true, A>(
        in, kLanes<A>, kAll, height, width, 0, height, vectors, Vec<A>{}, [](int64_t, Vec<A>) {}, emit);
  }
}

// One row of taps at a time, K sums in registers. Sums of parts meet in `sums`: long ones lose more to rounding.
template <class A, int K>
void planar_weight_gradient(const Problem& p, const A* gradient, const A* in, Vec<A>* sums) {
  constexpr int L = kLanes<A>, P = K / 2;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  for (int column = 0; column < width; column += L) {
    const int lanes = min_of(L, width - column);
    Mask inside[K];
    for (int dx = 0; dx < K; ++dx) {
      const int below = P - dx - column, above = min_of(lanes, width - column - dx + P);
      inside[dx] = above <= 0 ? 0 : first_lanes(above) & ~(below > 0 ? first_lanes(below) : 0);
    }
    for (int dy = 0; dy < K; ++dy) {
      Vec<A> acc[K] = {};
      for (int r = max_of(0, P - dy); r < min_of(height, height + P - dy); ++r) {
        const Vec<A> g = load(gradient + (int64_t)r * width + column, inside[P]);
        const A* row = in + (int64_t)(r + dy - P) * width + column;
        FIF_UNROLL for (int dx = 0; dx < K; ++dx) acc[dx] += g * load(row + dx - P, inside[dx]);
      }
      FIF_UNROLL for (int dx = 0; dx < K; ++dx) sums[dy * K + dx] += acc[dx];
    }
  }
}

template <class A, int K>
void channels_weight_gradient(const Problem& p, const A* gradient, const A* in, Vec<A>* sums) {
  constexpr int L = kLanes<A>, P = K / 2;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  for (int dy = 0; dy < K; ++dy) {
    for (int r = max_of(0, P - dy); r < min_of(height, height + P - dy); ++r) {
      Vec<A> acc[K] = {};
      const A* g = gradient + (int64_t)r * width * L;
      const A* row = in + (int64_t)(r + dy - P) * width * L;
      for (int c = 0; c < width; ++c) {
        const Vec<A> gv = load(g + (int64_t)c * L);
        FIF_UNROLL for (int dx = 0; dx < K; ++dx) {
          const int from = c + dx - P;
          if (from >= 0 && from < width) acc[dx] += gv * load(row + (int64_t)from * L);
        }
      }
      FIF_UNROLL for (int dx = 0; dx < K; ++dx) sums[dy * K + dx] += acc[dx];
    }
  }
}

}  // namespace

template <class A, bool Planar>
void depthwise(const Problem& p, const A* in, A* out, const Vec<A>* taps, bool accumulate) {
  with_kernel_size(p.kernel,
                   [&](auto k) { plane_forward<A, Planar, decltype(k)::value>(p, in, out, taps, accumulate); });
}

template <class A, bool Planar>
void depthwise_weight_gradient(const Problem& p, const A* gradient, const A* in, Vec<A>* sums) {
  with_kernel_size(p.kernel, [&](auto k) {
    if constexpr (Planar)
      planar_weight_gradient<A, decltype(k)::value>(p, gradient, in, sums);
    else
      channels_weight_gradient<A, decltype(k)::value>(p, gradient, in, sums);
  });
}

#define FIF_DEPTHWISE(A, Planar)                                                         \
  template void depthwise<A, Planar>(const Problem&, const A*, A*, const Vec<A>*, bool); \
  template void depthwise_weight_gradient<A, Planar>(const Problem&, const A*, const A*, Vec<A>*);
FIF_DEPTHWISE(float, true)
FIF_DEPTHWISE(float, false)
FIF_DEPTHWISE(double, true)
FIF_DEPTHWISE(double, false)

}  // namespace fif::FIF_ISA
