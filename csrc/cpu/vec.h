// Vectors of the compute type (f32 or f64), loaded from and stored to f32, f64, bf16 and f16 memory, whole or masked.
//
// This header is compiled once per instruction set (FIF_ISA names the namespace) and must define nothing that the
// linker could merge between variants: no standard-library templates, everything inside the namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FIF_ISA
#error "compile with -DFIF_ISA=<variant>"
#endif
#define FIF_UNROLL _Pragma("GCC unroll 16")
#define FIF_INLINE inline __attribute__((always_inline))

namespace fif::FIF_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FIF_AVX512 1
constexpr int kVectorBytes = 64, kRegisters = 32;
constexpr bool kFreeMasks = true;  // a masked access costs no more than a whole one
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FIF_AVX2 1
constexpr int kVectorBytes = 32, kRegisters = 16;
constexpr bool kFreeMasks = false;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
constexpr bool kFreeMasks = false;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
constexpr bool kFreeMasks = false;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
#if defined(FIF_AVX512) && defined(__AVX512BF16__)
#define FIF_BF16_DOT 1
// Pairs of bf16 are multiplied and added up in f32 by one instruction, which takes subnormal numbers for zeros.
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif
// Neighbours along the depth of a product.
struct bf16_pair {
  bf16 even, odd;
};

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
struct ComputeOf<const T> : ComputeOf<T> {};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class E, int Bytes>
struct VectorOf {
  typedef E type __attribute__((vector_size(Bytes), may_alias));
  typedef E unaligned __attribute__((vector_size(Bytes), may_alias, aligned(sizeof(E))));
};
template <class A>
using Vec = typename VectorOf<A, kVectorBytes>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// Bit l set: lane l takes part. Masked loads give 0 in the other lanes and never touch their memory.
using Mask = uint32_t;
constexpr Mask kAll = ~Mask(0);
FIF_INLINE Mask first_lanes(int64_t n) { return n >= 32 ? kAll : (Mask(1) << n) - 1; }
template <class A>
FIF_INLINE bool is_full(Mask m) {
  constexpr Mask all = (Mask(1) << kLanes<A>)-1;
  return (m & all) == all;
}

template <int Bytes>
struct IndexOf {
  using type = int32_t;
};
template <>
struct IndexOf<8> {
  using type = int64_t;
};

// A number as a type.
template <int Value>
struct Constant {
  static constexpr int value = Value;
};

template <class N>
FIF_INLINE N min_of(N a, N b) {
  return b < a ? b : a;
}
template <class N>
FIF_INLINE N max_of(N a, N b) {
  return a < b ? b : a;
}
FIF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
FIF_INLINE Vec<A> splat(A v) {
  return v - Vec<A>{};
}

using VecF = Vec<float>;
using VecD = Vec<double>;
using VecI = typename VectorOf<int32_t, kVectorBytes>::type;
using VecU = typename VectorOf<uint32_t, kVectorBytes>::type;
using HalfU = VectorOf<uint16_t, kVectorBytes / 2>;

// ---- 16-bit formats: one vector of bits to one of floats and back, round to nearest even, NaN kept

FIF_INLINE VecF widen_bf16(HalfU::type h) { return (VecF)(__builtin_convertvector(h, VecU) << 16); }

#if defined(FIF_BF16_DOT)
// Which the instruction that rounds to bf16 takes for zeros.
FIF_INLINE __mmask16 subnormal_lanes(VecF v) {
  constexpr int kSubnormal = 0x20;
  return _mm512_fpclass_ps_mask((__m512)v, kSubnormal);
}
#endif

FIF_INLINE HalfU::type narrow_bf16(VecF v) {
#if defined(FIF_BF16_DOT)
  if (__builtin_expect(subnormal_lanes(v) == 0, 1)) return (HalfU::type)_mm512_cvtneps_pbh((__m512)v);
#endif
  VecU u = (VecU)v;
  VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VecU nan = (VecU)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), HalfU::type);
}

FIF_INLINE VecF widen_f16(HalfU::type h) {
#if defined(FIF_AVX512)
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(FIF_AVX2)
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  VecU w = __builtin_convertvector(h, VecU);
  VecU sign = (w & 0x8000u) << 16, magnitude = w & 0x7fffu;
  VecF scaled = (VecF)(magnitude << 13) * 0x1p112f;  // exact, subnormals included
  VecU special = (VecU)(magnitude >= 0x7c00u);       // inf, NaN
  VecU bits = ((VecU)scaled & ~special) | (((magnitude << 13) | 0x7f800000u) & special);
  return (VecF)(bits | sign);
#endif
}

FIF_INLINE HalfU::type narrow_f16(VecF v) {
#if defined(FIF_AVX512)
  return (HalfU::type)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FIF_AVX2)
  return (HalfU::type)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecU u = (VecU)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  VecU nan = (VecU)(magnitude > 0x7f800000u);
  VecU large = (VecU)(magnitude >= 0x47800000u);  // 65536 and more: inf; 65520..65535 round up to it below
  VecU small = (VecU)(magnitude < 0x38800000u);   // below 2^-14: subnormal, rounded by the addition of 1/2
  VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  VecU subnormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000u;
  VecU bits = (normal & ~small & ~large) | (subnormal & small) | (0x7c00u & large);
  bits = (bits & ~nan) | (0x7e00u & nan);
  return __builtin_convertvector(bits | sign, HalfU::type);
#endif
}

FIF_INLINE VecF widen(const bf16*, HalfU::type h) { return widen_bf16(h); }
FIF_INLINE VecF widen(const f16*, HalfU::type h) { return widen_f16(h); }
FIF_INLINE HalfU::type narrow(const bf16*, VecF v) { return narrow_bf16(v); }
FIF_INLINE HalfU::type narrow(const f16*, VecF v) { return narrow_f16(v); }

// ---- whole vectors

FIF_INLINE VecF load(const float* p) { return *(const VectorOf<float, kVectorBytes>::unaligned*)p; }
FIF_INLINE VecD load(const double* p) { return *(const VectorOf<double, kVectorBytes>::unaligned*)p; }
FIF_INLINE void store(float* p, VecF v) { *(VectorOf<float, kVectorBytes>::unaligned*)p = v; }
FIF_INLINE void store(double* p, VecD v) { *(VectorOf<double, kVectorBytes>::unaligned*)p = v; }

template <class T>
FIF_INLINE VecF load(const T* p) {
  return widen(p, *(const HalfU::unaligned*)p);
}
template <class T>
FIF_INLINE void store(T* p, VecF v) {
  *(HalfU::unaligned*)p = narrow(p, v);
}

FIF_INLINE VecF load(const bf16_pair* p) { return *(const VectorOf<float, kVectorBytes>::unaligned*)p; }

// ---- the lower half of a vector of floats: where the upper lanes are not wanted, it costs half as much on processors
// that take a wide operation in two steps, and not more on others

#if defined(FIF_AVX512)
constexpr bool kHalves = true;
using HalfF = VectorOf<float, kVectorBytes / 2>::type;
FIF_INLINE HalfF load_half(const float* p) { return *(const VectorOf<float, kVectorBytes / 2>::unaligned*)p; }
FIF_INLINE void store(float* p, HalfF v) { *(VectorOf<float, kVectorBytes / 2>::unaligned*)p = v; }
FIF_INLINE void store(float* p, HalfF v, Mask m) { _mm256_mask_storeu_ps(p, (__mmask8)m, (__m256)v); }
FIF_INLINE HalfF lower_half(VecF v) { return (HalfF)_mm512_castps512_ps256((__m512)v); }
#else
constexpr bool kHalves = false;
#endif
// A vector, or its lower half.
template <class A, bool Half>
struct PartOf {
  using type = Vec<A>;
  static FIF_INLINE type load(const A* p) { return FIF_ISA::load(p); }
};
#if defined(FIF_AVX512)
template <>
struct PartOf<float, true> {
  using type = HalfF;
  static FIF_INLINE type load(const float* p) { return load_half(p); }
};
#endif
template <class A, bool Half>
using Part = typename PartOf<A, Half>::type;

// ---- masked vectors: raw memory lanes first, then the format

template <class V, class E>
FIF_INLINE V gather_lanes(const E* p, int64_t stride, Mask m) {
  V v{};
  for (int l = 0; l < (int)(sizeof(V) / sizeof(E)); ++l)
    if (m >> l & 1) v[l] = p[l * stride];
  return v;
}
template <class V, class E>
FIF_INLINE void scatter_lanes(E* p, int64_t stride, V v, Mask m) {
  for (int l = 0; l < (int)(sizeof(V) / sizeof(E)); ++l)
    if (m >> l & 1) p[l * stride] = v[l];
}

#if defined(FIF_AVX512)
FIF_INLINE VecF load(const float* p, Mask m) { return (VecF)_mm512_maskz_loadu_ps((__mmask16)m, p); }
FIF_INLINE VecD load(const double* p, Mask m) { return (VecD)_mm512_maskz_loadu_pd((__mmask8)m, p); }
FIF_INLINE void store(float* p, VecF v, Mask m) { _mm512_mask_storeu_ps(p, (__mmask16)m, (__m512)v); }
FIF_INLINE void store(double* p, VecD v, Mask m) { _mm512_mask_storeu_pd(p, (__mmask8)m, (__m512d)v); }
FIF_INLINE HalfU::type load_bits(const uint16_t* p, Mask m) {
  return (HalfU::type)_mm256_maskz_loadu_epi16((__mmask16)m, p);
}
FIF_INLINE void store_bits(uint16_t* p, HalfU::type v, Mask m) {
  _mm256_mask_storeu_epi16(p, (__mmask16)m, (__m256i)v);
}
#else
#if defined(FIF_AVX2)
FIF_INLINE __m256i lane_mask(Mask m) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)m), bit), bit);
}
FIF_INLINE VecF load(const float* p, Mask m) { return (VecF)_mm256_maskload_ps(p, lane_mask(m)); }
FIF_INLINE void store(float* p, VecF v, Mask m) { _mm256_maskstore_ps(p, lane_mask(m), (__m256)v); }
#else
FIF_INLINE VecF load(const float* p, Mask m) { return gather_lanes<VecF>(p, 1, m); }
FIF_INLINE void store(float* p, VecF v, Mask m) { scatter_lanes(p, 1, v, m); }
#endif
FIF_INLINE VecD load(const double* p, Mask m) { return gather_lanes<VecD>(p, 1, m); }
FIF_INLINE void store(double* p, VecD v, Mask m) { scatter_lanes(p, 1, v, m); }
FIF_INLINE HalfU::type load_bits(const uint16_t* p, Mask m) { return gather_lanes<HalfU::type>(p, 1, m); }
FIF_INLINE void store_bits(uint16_t* p, HalfU::type v, Mask m) { scatter_lanes(p, 1, v, m); }
#endif

template <class T>
FIF_INLINE VecF load(const T* p, Mask m) {
  return widen(p, load_bits(&p->bits, m));
}
template <class T>
FIF_INLINE void store(T* p, VecF v, Mask m) {
  store_bits(&p->bits, narrow(p, v), m);
}

// ---- values that are stored many at a time

#if defined(FIF_AVX512)
using LaneMask = __mmask16;
#else
using LaneMask = Mask;
#endif
// Unless `exact`, bf16 may be rounded by the instruction that takes subnormal numbers for zeros; `small` then gathers
// the lanes that held some, and the caller stores all once more.
template <class T>
constexpr bool kRoundsQuickly = false;
template <class T, class V, class Exact>
FIF_INLINE void store_quickly(T* p, V v, Mask m, Exact, LaneMask&) {
  store(p, v, m);
}
#if defined(FIF_BF16_DOT)
template <>
constexpr bool kRoundsQuickly<bf16> = true;
template <class Exact>
FIF_INLINE void store_quickly(bf16* p, VecF v, Mask m, Exact, LaneMask& small) {
  if constexpr (Exact::value) return store(p, v, m);
  small = _kor_mask16(small, subnormal_lanes(v));
  store_bits(&p->bits, (HalfU::type)_mm512_cvtneps_pbh((__m512)v), m);
}
#endif

// ---- lanes a stride apart (the cheap maps of one primary map when there are several)

FIF_INLINE VecF load_strided(const float* p, int64_t stride, Mask m) { return gather_lanes<VecF>(p, stride, m); }
FIF_INLINE VecD load_strided(const double* p, int64_t stride, Mask m) { return gather_lanes<VecD>(p, stride, m); }
FIF_INLINE void store_strided(float* p, int64_t stride, VecF v, Mask m) { scatter_lanes(p, stride, v, m); }
FIF_INLINE void store_strided(double* p, int64_t stride, VecD v, Mask m) { scatter_lanes(p, stride, v, m); }
template <class T>
FIF_INLINE VecF load_strided(const T* p, int64_t stride, Mask m) {
  return widen(p, gather_lanes<HalfU::type>(&p->bits, stride, m));
}
template <class T>
FIF_INLINE void store_strided(T* p, int64_t stride, VecF v, Mask m) {
  scatter_lanes(&p->bits, stride, narrow(p, v), m);
}

// `to`, in the lanes of the mask those of v that `index` names.
FIF_INLINE VecF permute_into(VecF to, Mask m, VecI index, VecF v) {
#if defined(FIF_AVX512)
  return (VecF)_mm512_mask_permutexvar_ps((__m512)to, (__mmask16)m, (__m512i)index, (__m512)v);
#elif defined(FIF_AVX2)
  const __m256 moved = _mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
  return (VecF)_mm256_blendv_ps((__m256)to, moved, (__m256)lane_mask(m));
#else
  for (int l = 0; l < kLanes<float>; ++l)
    if (m >> l & 1) to[l] = v[index[l]];
  return to;
#endif
}
FIF_INLINE VecD permute_into(VecD to, Mask m, VectorOf<int64_t, kVectorBytes>::type index, VecD v) {
  for (int l = 0; l < kLanes<double>; ++l)
    if (m >> l & 1) to[l] = v[index[l]];
  return to;
}

// Vectors that take turns by lanes: lane l of vector s becomes number l * count + s of as many vectors.
template <class A>
class Interleaved {
  static constexpr int L = kLanes<A>;
  using Index = typename VectorOf<typename IndexOf<sizeof(A)>::type, kVectorBytes>::type;

 public:
  static constexpr int kMost = 7;  // beyond that lanes one by one are as fast
  explicit Interleaved(int count) : count_(count) {
    for (int i = 0; i < count * L; ++i) {
      mask_[i / L][i % count] |= Mask(1) << (i % L);
      index_[i / L][i % L] = i / count;
    }
  }
  // f(number of its first lane, vector) for all of them, from vectors `step` apart
  template <class F>
  FIF_INLINE void each(const A* from, int64_t step, F f) const {
    for (int j = 0; j < count_; ++j) {
      Vec<A> v{};
      for (int s = 0; s < count_; ++s) v = permute_into(v, mask_[j][s], index_[j], load(from + s * step));
      f(j * L, v);
    }
  }

 private:
  int count_;
  Mask mask_[kMost][kMost] = {};
  Index index_[kMost] = {};
};

// ---- products of one broadcast factor (a pair of neighbours, where b holds pairs) and a vector

template <class A>
FIF_INLINE Vec<A> spread(const A* p) {
  return splat<A>(*p);
}
template <class A>
FIF_INLINE Vec<A> multiply_add(const A*, Vec<A> sum, Vec<A> a, Vec<A> b) {
  return sum + a * b;
}
#if defined(FIF_BF16_DOT)
FIF_INLINE VecF spread(const bf16* p) {
  int32_t both;
  memcpy(&both, p, sizeof both);
  return (VecF)_mm512_set1_epi32(both);
}
FIF_INLINE VecF spread_last(const bf16* p) { return (VecF)_mm512_set1_epi32(p->bits); }
FIF_INLINE VecF multiply_add(const bf16*, VecF sum, VecF a, VecF b) {
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// ---- arithmetic that the operators of vector types do not express

// The larger of two, NaN if v is NaN (as torch's relu keeps NaN).
FIF_INLINE VecF max_keep_nan(VecF bound, VecF v) {
#if defined(FIF_AVX512)
  return (VecF)_mm512_max_ps((__m512)bound, (__m512)v);
#elif defined(FIF_AVX2)
  return (VecF)_mm256_max_ps((__m256)bound, (__m256)v);
#else
  return v < bound ? bound : v;
#endif
}
FIF_INLINE VecF min_keep_nan(VecF bound, VecF v) {
#if defined(FIF_AVX512)
  return (VecF)_mm512_min_ps((__m512)bound, (__m512)v);
#elif defined(FIF_AVX2)
  return (VecF)_mm256_min_ps((__m256)bound, (__m256)v);
#else
  return v > bound ? bound : v;
#endif
}
FIF_INLINE VecD max_keep_nan(VecD bound, VecD v) { return v < bound ? bound : v; }
FIF_INLINE VecD min_keep_nan(VecD bound, VecD v) { return v > bound ? bound : v; }

// v with zeros in the lanes that the mask leaves out.
template <class V>
FIF_INLINE V keep_lanes(V v, Mask m) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
#if defined(FIF_AVX512)
  if constexpr (lanes == 16)
    return (V)_mm512_maskz_mov_epi32((__mmask16)m, (__m512i)v);
  else
    return (V)_mm512_maskz_mov_epi64((__mmask8)m, (__m512i)v);
#else
  for (int l = 0; l < lanes; ++l)
    if (!(m >> l & 1)) v[l] = 0;
  return v;
#endif
}

// Lanes summed in a fixed tree, so that the result does not depend on the compiler's choice.
template <class A>
FIF_INLINE A sum_lanes(Vec<A> v) {
#if defined(FIF_AVX512)
  if constexpr (kLanes<A> == 16) return _mm512_reduce_add_ps((__m512)v);
#endif
  A lane[kLanes<A>];
  memcpy(lane, &v, sizeof v);
  FIF_UNROLL for (int half = kLanes<A> / 2; half > 0; half /= 2) for (int l = 0; l < half; ++l) lane[l] +=
      lane[l + half];
  return lane[0];
}

// One stage of a transposition by recursive halving: a and b exchange every other block of `Half` lanes.
template <int Half, class V>
FIF_INLINE void exchange(V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  using Index = typename VectorOf<typename IndexOf<sizeof(a[0])>::type, sizeof(V)>::type;
  Index low{}, high{};
  for (int l = 0; l < lanes; ++l) {
    const bool second = l / Half % 2;
    low[l] = second ? lanes + l - Half : l;
    high[l] = second ? lanes + l : l + Half;
  }
  const V first = a;
#if defined(__clang__)
  const V other = b;
  for (int l = 0; l < lanes; ++l) {
    a[l] = low[l] < lanes ? first[low[l]] : other[low[l] - lanes];
    b[l] = high[l] < lanes ? first[high[l]] : other[high[l] - lanes];
  }
#else
  a = __builtin_shuffle(first, b, low);
  b = __builtin_shuffle(first, b, high);
#endif
}

// rows[i][j] becomes rows[j][i], for as many rows as lanes.
template <class A, int Half = kLanes<A> / 2>
FIF_INLINE void transpose_square(Vec<A>* rows) {
  FIF_UNROLL for (int i = 0; i < kLanes<A>; ++i) if (i / Half % 2 == 0) exchange<Half>(rows[i], rows[i + Half]);
  if constexpr (Half > 1) transpose_square<A, Half / 2>(rows);
}

template <class T>
FIF_INLINE Compute<T> to_compute(T v) {
  return v;
}
template <>
FIF_INLINE float to_compute(bf16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
template <>
FIF_INLINE float to_compute(f16 v) {
  return load(&v, Mask(1))[0];
}

}  // namespace fif::FIF_ISA
