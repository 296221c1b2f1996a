// Activations and their derivatives on vectors. Everything up to relu6 is a clamp and costs two instructions; the
// smooth ones are applied to whole arrays, out of line, so that they take no registers from the kernels that do not use
// them.
#pragma once

#include <cmath>

#include "../problem.h"
#include "vec.h"

namespace fif::FIF_ISA {

constexpr bool is_clamp(Activation a) { return a <= Activation::relu6; }

template <class A>
struct Clamp {
  Vec<A> low, high;
  explicit FIF_INLINE Clamp(Activation a)
      : low(splat<A>(a == Activation::relu || a == Activation::relu6 ? A(0) : -A(INFINITY))),
        high(splat<A>(a == Activation::relu6 ? A(6) : A(INFINITY))) {}
  FIF_INLINE Vec<A> operator()(Vec<A> v) const { return min_keep_nan(high, max_keep_nan(low, v)); }
#if defined(FIF_AVX512)
  FIF_INLINE HalfF operator()(HalfF v) const {
    return (HalfF)_mm256_min_ps((__m256)lower_half(high), _mm256_max_ps((__m256)lower_half(low), (__m256)v));
  }
#endif
};

template <class A>
struct ClampBelow {
  Vec<A> low;
  FIF_INLINE Vec<A> operator()(Vec<A> v) const { return max_keep_nan(low, v); }
#if defined(FIF_AVX512)
  FIF_INLINE HalfF operator()(HalfF v) const { return (HalfF)_mm256_max_ps((__m256)lower_half(low), (__m256)v); }
#endif
};
// Calls f with what clamps values; where it is `Worth` more code, without an upper bound for those that have none.
// Smooth activations leave them as they are.
template <class A, bool Worth, class F>
FIF_INLINE void with_clamp(Activation a, F f) {
  const Clamp<A> clamp(a);
  if constexpr (Worth)
    if (a != Activation::relu6) return f(ClampBelow<A>{clamp.low});
  f(clamp);
}

// e^x to 2 units in the last place: x = k ln2 + r, |r| <= ln2 / 2, polynomial of degree 6 (coefficients 1/n!, the last
// two adjusted for the interval), then 2^k through the exponent bits. Below -87 the result is 0, above 88 it is inf.
FIF_INLINE VecF exp_of(VecF x) {
  VecF bounded = min_keep_nan(splat<float>(88.3762627f), max_keep_nan(splat<float>(-87.3365478f), x));
  VecF shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln2)
  VecF k = shifted - 12582912.0f;
  VecF r = bounded - k * 0.693359375f + k * 2.12194440e-4f;
  VecF p = splat<float>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  VecI exponent = ((VecI)shifted - 0x4b400000) << 23;
  VecF result = (VecF)((VecI)p + exponent);
  result = x < -87.3365478f ? VecF{} : result;
  return x > 88.3762627f ? splat<float>(INFINITY) : result;
}
FIF_INLINE VecD exp_of(VecD x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = ::exp(x[l]);
  return x;
}

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
FIF_INLINE VecF erf_of(VecF x) {
  VecF a = x < 0.0f ? -x : x;
  VecF t = 1.0f / (1.0f + 0.3275911f * a);
  VecF p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  VecF e = 1.0f - p * exp_of(-a * a);
  return x < 0.0f ? -e : e;
}
FIF_INLINE VecD erf_of(VecD x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = ::erf(x[l]);
  return x;
}

template <class A>
FIF_INLINE Vec<A> sigmoid_of(Vec<A> v) {
  return A(1) / (A(1) + exp_of(-v));
}
template <class A>
FIF_INLINE Vec<A> normal_cdf(Vec<A> v) {
  return A(0.5) * (A(1) + erf_of(v * A(0.70710678118654752440)));
}

template <class A>
FIF_INLINE Vec<A> smooth_value(Vec<A> v, Activation a) {
  if (a == Activation::hardswish)
    return v * min_keep_nan(splat<A>(6), max_keep_nan(splat<A>(0), v + A(3))) * A(1.0 / 6.0);
  if (a == Activation::silu) return v * sigmoid_of<A>(v);
  return v * normal_cdf<A>(v);
}

template <class A>
__attribute__((noinline)) static void activate_smooth(Vec<A>* v, int count, Activation a) {
  for (int i = 0; i < count; ++i) v[i] = smooth_value<A>(v[i], a);
}

// The value of any activation, where speed is not decided by it.
template <class A>
FIF_INLINE Vec<A> activate(Vec<A> v, Activation a, const Clamp<A>& clamp) {
  if (is_clamp(a)) return clamp(v);
  activate_smooth<A>(&v, 1, a);
  return v;
}

template <class A>
__attribute__((noinline)) static Vec<A> smooth_slope(Vec<A> u, Activation a) {
  if (a == Activation::hardswish) {
    Vec<A> middle = u * A(1.0 / 3.0) + A(0.5);
    return u <= A(-3) ? Vec<A>{} : (u < A(3) ? middle : splat<A>(1));
  }
  if (a == Activation::silu) {
    Vec<A> s = sigmoid_of<A>(u);
    return s * (A(1) + u * (A(1) - s));
  }
  return normal_cdf<A>(u) + u * A(0.39894228040143267794) * exp_of(u * u * A(-0.5));
}

// d activation / d u times g, at the pre-activation u; on a kink the slope that torch takes.
template <class A>
FIF_INLINE Vec<A> activation_gradient(Vec<A> g, Vec<A> u, Activation a) {
  switch (a) {
    case Activation::none: return g;
    case Activation::relu: return u <= A(0) ? Vec<A>{} : g;
    case Activation::relu6: return u <= A(0) ? Vec<A>{} : (u >= A(6) ? Vec<A>{} : g);
    default: return g * smooth_slope<A>(u, a);
  }
}

// An activation and its gradient as loops over whole maps want them: no branch inside.
template <class A>
struct ClampActivation {
  Clamp<A> clamp;
  Vec<A> low, high;  // kinks, NaN where there is none
  explicit ClampActivation(Activation a)
      : clamp(a), low(splat<A>(a == Activation::none ? A(NAN) : A(0))),
        high(splat<A>(a == Activation::relu6 ? A(6) : A(NAN))) {}
  FIF_INLINE Vec<A> value(Vec<A> v) const { return clamp(v); }
  FIF_INLINE Vec<A> gradient(Vec<A> g, Vec<A> u) const { return u <= low ? Vec<A>{} : (u >= high ? Vec<A>{} : g); }
};
template <class A>
struct SmoothActivation {
  Activation a;
  FIF_INLINE Vec<A> value(Vec<A> v) const {
    activate_smooth<A>(&v, 1, a);
    return v;
  }
  FIF_INLINE Vec<A> gradient(Vec<A> g, Vec<A> u) const { return g * smooth_slope<A>(u, a); }
};
template <class A, class F>
FIF_INLINE void with_activation(Activation a, F f) {
  if (is_clamp(a))
    f(ClampActivation<A>(a));
  else
    f(SmoothActivation<A>{a});
}

}  // namespace fif::FIF_ISA
