// The register-tiled product of gemm.h.
//
// Tile: R rows x V vectors of accumulators, plus V vectors of b and one broadcast of a; 32 registers hold 12x2, 8x3 or
// 6x4, 16 hold 6x2 or 4x3. Per step of k: V loads, R broadcasts, R*V fused multiply-adds; with 12x2 that is 14 loads
// for 24 multiply-adds, so the loads hide behind the arithmetic. Limit: the multiply-add units.
#include "gemm.h"

namespace fif::FIF_ISA {
namespace {

constexpr int kTileVectors = 4;
constexpr int kMaxRows[kTileVectors + 1] = {0, kTileRows, kTileRows, kRegisters == 32 ? 9 : 4,
                                            kRegisters == 32 ? 6 : 2};

// Every finish, activation and format, for sums laid out as rows x vectors.
template <class T, class B, class C, class A = Compute<T>>
__attribute__((noinline)) void finish_sums(const Gemm<T, B, C>& g, Vec<A>* sums, int rows, int vectors, int64_t i,
                                           int64_t j, Mask last) {
  constexpr int L = kLanes<A>;
  const Clamp<A> clamp(g.activation);
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      const Mask m = v == vectors - 1 ? last : kAll;
      C* c = g.c + (i + r) * g.c_row + j + v * L;
      Vec<A> sum = sums[r * vectors + v];
      if (g.finish == Finish::accumulate) sum += load(c, m);
      if (g.finish == Finish::by_row) sum = activate<A>(sum * g.scale[i + r] + g.shift[i + r], g.activation, clamp);
      if (g.finish == Finish::by_column)
        sum = activate<A>(sum * load(g.scale + j + v * L, m) + load(g.shift + j + v * L, m), g.activation, clamp);
      store(c, sum, m);
    }
}

#if defined(FIF_AVX512)
// By column, the only finish that has halves.
template <int R, int W, class T, class B, class C, int N>
FIF_INLINE void finish_half(const Gemm<T, B, C>& g, const VecF (&acc)[R][N], const HalfF (&tail)[R], int64_t i,
                            int64_t j) {
  constexpr int L = kLanes<float>;
  const Clamp<float> clamp(g.activation);
  C* c = g.c + i * g.c_row + j;
  const float *scale = g.scale + j, *shift = g.shift + j;
  FIF_UNROLL for (int r = 0; r < R; ++r, c += g.c_row) {
    FIF_UNROLL for (int v = 0; v < W; ++v)
        store(c + v * L, clamp(acc[r][v] * load(scale + v * L) + load(shift + v * L)));
    store(c + W * L, clamp(tail[r] * load_half(scale + W * L) + load_half(shift + W * L)));
  }
}
#endif

// `Half`: the last of the vectors is half a one.
template <class T, class B, class C, int R, int V, bool Half>
void tile(const Gemm<T, B, C>& g, int64_t i, int64_t j, Mask last) {
  using A = Compute<T>;
  constexpr int L = kLanes<A>, kStep = sizeof(T) == sizeof(A) ? 1 : 2;  // along the depth
  constexpr int W = Half ? V - 1 : V;                                   // whole vectors
  Vec<A> acc[R][W > 0 ? W : 1] = {};
  [[maybe_unused]] Part<A, Half> tail[R] = {};
  // Row addresses as base + {0, 1, 2, 3} * a_row for every four rows: few pointers, no spills.
  constexpr int kGroups = (R + 3) / 4;
  const T* group[kGroups];
  FIF_UNROLL for (int q = 0; q < kGroups; ++q) group[q] = g.a + (i + 4 * q) * g.a_row;
  const int64_t step = g.a_row, step3 = 3 * g.a_row;
  const B* b = g.b + j;
  const bool whole = is_full<A>(last);
  const int64_t ahead = g.b_ahead;
  auto add = [&](auto spread_one) __attribute__((always_inline)) {
    Vec<A> bv[V];
    [[maybe_unused]] Part<A, Half> bt;
    FIF_UNROLL for (int v = 0; v < V - 1; ++v) bv[v] = load(b + v * L);
    if constexpr (Half)
      bt = load_half(b + W * L);
    else if constexpr (kStep == 2)
      bv[V - 1] = load(b + (V - 1) * L);  // packed, in whole vectors
    else
      bv[V - 1] = whole && !kFreeMasks ? load(b + (V - 1) * L) : load(b + (V - 1) * L, last);
    // Rows of b lie far apart in NCHW, too many of them for the processor to foresee.
    if constexpr (kStep == 1 && R >= kTileRows / 2) {
      FIF_UNROLL for (int v = 0; v < V; ++v) __builtin_prefetch(b + ahead + v * L);
    }
    FIF_UNROLL for (int r = 0; r < R; ++r) {
      const T* p = group[r / 4] + (r % 4 == 3 ? step3 : (r % 4) * step);
      const Vec<A> av = spread_one(p);
      FIF_UNROLL for (int v = 0; v < W; ++v) acc[r][v] = multiply_add(p, acc[r][v], av, bv[v]);
      if constexpr (Half) tail[r] += lower_half(av) * bt;
    }
    FIF_UNROLL for (int q = 0; q < kGroups; ++q) {
      group[q] += kStep * g.a_k;
      asm("" : "+r"(group[q]));  // keeps the compiler from rewriting the pointers as one per row
    }
    b += g.b_k;
  };
  for (int64_t segment = 0;;) {
    for (int64_t k = 0; k < g.depth / kStep; ++k)
      add([](const T* p) __attribute__((always_inline)) { return spread(p); });
    if (++segment == g.segments) break;
    FIF_UNROLL for (int q = 0; q < kGroups; ++q) group[q] += g.a_segment - g.depth * g.a_k;
  }
#if defined(FIF_BF16_DOT)
  if constexpr (kStep == 2)
    if (g.depth % 2) add([](const T* p) __attribute__((always_inline)) { return spread_last(p); });
#endif

  if constexpr (Half) {
    finish_half<R, W>(g, acc, tail, i, j);
    return;
  }
  // Plain stores and clamps of full precision leave straight from the registers; the rest takes the detour over the
  // stack.
  const bool affine = g.finish == Finish::by_row || g.finish == Finish::by_column;
  if (sizeof(C) != sizeof(A) || g.finish == Finish::accumulate || (affine && !is_clamp(g.activation))) {
    Vec<A> sums[R][V];
    FIF_UNROLL for (int r = 0; r < R; ++r) FIF_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = acc[r][v];
    finish_sums(g, &sums[0][0], R, V, i, j, last);
    return;
  }
  if (g.finish == Finish::by_row) {
    FIF_UNROLL for (int r = 0; r < R; ++r) {
      const Vec<A> scale = splat<A>(g.scale[i + r]), shift = splat<A>(g.shift[i + r]);
      FIF_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] * scale + shift;
    }
  } else if (affine) {
    FIF_UNROLL for (int v = 0; v < V; ++v) {
      const Mask m = v == V - 1 ? last : kAll;
      const Vec<A> scale = load(g.scale + j + v * L, m), shift = load(g.shift + j + v * L, m);
      FIF_UNROLL for (int r = 0; r < R; ++r) acc[r][v] = acc[r][v] * scale + shift;
    }
  }
  const Clamp<A> clamp(affine ? g.activation : Activation::none);
  C* c = g.c + i * g.c_row + j;
  FIF_UNROLL for (int r = 0; r < R; ++r, c += g.c_row) {
    FIF_UNROLL for (int v = 0; v < V - 1; ++v) store(c + v * L, clamp(acc[r][v]));
    if (whole)
      store(c + (V - 1) * L, clamp(acc[r][V - 1]));
    else
      store(c + (V - 1) * L, clamp(acc[r][V - 1]), last);
  }
}

template <class A, class B, class C>
using TileFunction = void (*)(const Gemm<A, B, C>&, int64_t, int64_t, Mask);

// tiles[vectors - 1][rows - 1]; null where the registers would not hold it
template <class A, class B, class C, bool Half = false>
struct Tiles {
  TileFunction<A, B, C> at[kTileVectors][kTileRows] = {};
  template <int V, int R>
  constexpr void fill() {
    at[V - 1][R - 1] = tile<A, B, C, R, V, Half>;
    if constexpr (R < kMaxRows[V])
      fill<V, R + 1>();
    else if constexpr (V < kTileVectors)
      fill<V + 1, 1>();
  }
  constexpr Tiles() { fill<1, 1>(); }
};

}  // namespace

template <class A, class B, class C>
void gemm(const Gemm<A, B, C>& g) {
  static constexpr Tiles<A, B, C> tiles;
  constexpr int L = kLanes<Compute<A>>;
  const int64_t vectors = ceil_div(g.cols, L);
  // Few rows (a block of channels over many pixels): as many vectors as fit beside them. Else: cut the columns evenly.
  int64_t width = kTileVectors;
  if (g.rows <= kTileRows)
    while (width > 1 && kMaxRows[width] < g.rows) --width;
  else
    width = vectors < (kRegisters == 32 ? 5 : 4) ? vectors : even_block(vectors, kRegisters == 32 ? 3 : 2);
  if (width > vectors) width = vectors;
  for (int64_t v = 0; v < vectors; v += width) {
    const int64_t w = min_of(width, vectors - v);
    const Mask last = first_lanes(min_of<int64_t>(L, g.cols - (v + w - 1) * L));
    const int64_t height = even_block(g.rows, kMaxRows[w]);
    const auto* tile = tiles.at[w - 1];
#if defined(FIF_AVX512)
    if constexpr (sizeof(A) == 4 && sizeof(B) == 4 && sizeof(C) == 4 && sizeof(Compute<A>) == sizeof(A)) {
      static constexpr Tiles<A, B, C, true> halved;
      if (g.half && v + w == vectors) tile = halved.at[w - 1];
    }
#endif
    for (int64_t i = 0; i < g.rows; i += height) tile[min_of(height, g.rows - i) - 1](g, i, v * L, last);
  }
}

#define FIF_GEMM(A, B, C) template void gemm<A, B, C>(const Gemm<A, B, C>&);
FIF_GEMM(float, float, float)
FIF_GEMM(double, double, double)
FIF_GEMM(float, bf16, bf16)   // NCHW primary
FIF_GEMM(float, float, bf16)  // NHWC primary, gradient of the input
FIF_GEMM(float, bf16, float)  // NHWC gradient of the primary weight
FIF_GEMM(float, f16, f16)
FIF_GEMM(float, float, f16)
FIF_GEMM(float, f16, float)
#if defined(FIF_BF16_DOT)
FIF_GEMM(bf16, bf16_pair, float)  // NHWC primary
#endif

}  // namespace fif::FIF_ISA
