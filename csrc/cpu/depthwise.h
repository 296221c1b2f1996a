// The cheap part: K x K depthwise correlation, stride 1, zero padding, over one plane or over one vector of channels.
//
// Both forms emit start + the sum by flat pixel; scales belong into the taps. A block of outputs
// shares its loads: R rows of one column vector read R + K - 1 rows for R * K rows of multiply-adds. The halo is never
// read: masked lanes stand for the zeros around the (already activated) map. A block that would be cut off begins
// earlier instead, so some values are emitted twice. Limit: the multiply-add units, 9 of about 11 operations for K = 3.
#pragma once

#include "vec.h"

namespace fif::FIF_ISA {

// Outputs of one block: as many sums as the registers hold beside the taps. f64 serves proofs, not speed: one.
template <class A, int K>
constexpr int kBlock = sizeof(A) == 8 ? 1
    : K == 7                          ? 2
    : kRegisters == 32                ? (K == 3 ? 7 : 4)
                                      : (K == 3 ? 4 : 2);

// f(begin, tag) for blocks of tag.value that cover [begin, end): whole ones, the last one moved back, and smaller ones
// where there is no room for one.
template <int Size, class F>
FIF_INLINE void in_blocks(int begin, int end, F f) {
  if (end - begin >= Size) {
    for (; begin < end; begin += Size) f(min_of(begin, end - Size), Constant<Size>{});
  } else if constexpr (Size > 1) {
    in_blocks<Size / 2>(begin, end, f);
  }
}

// ---- lanes along the pixels of one plane

// Rows r, r + 1, ... r + R - 1 of one column vector. Masks say which lanes lie inside the plane after a shift by dx.
template <int K, int R, class A, class In, class Emit>
FIF_INLINE void plane_column(const In* in, int height, int width, int r, int column, const Vec<A> (&taps)[K * K],
                             Vec<A> start, const Mask (&inside)[K], bool edge, Emit& emit) {
  constexpr int P = K / 2;
  Vec<A> acc[R];
  FIF_UNROLL for (int i = 0; i < R; ++i) acc[i] = start;
  FIF_UNROLL for (int k = 0; k < R + K - 1; ++k) {
    const int row = r - P + k;
    if ((k < P && row < 0) || (k >= R + P && row >= height)) continue;
    const In* p = in + (int64_t)row * width + column;
    FIF_UNROLL for (int dx = 0; dx < K; ++dx) {
      const Vec<A> v = kFreeMasks || edge ? load(p + dx - P, inside[dx]) : load(p + dx - P);
      FIF_UNROLL for (int dy = 0; dy < K; ++dy) {
        const int out = k - dy;
        if (out >= 0 && out < R) acc[out] += v * taps[dy * K + dx];
      }
    }
  }
  FIF_UNROLL for (int i = 0; i < R; ++i) emit((int64_t)(r + i) * width + column, acc[i], inside[P]);
}

// Maps narrower than half a vector: a vector holds several whole rows, and every tap has a mask of its own.
template <int K, class A, class In, class Emit>
FIF_INLINE void plane_narrow(const In* in, int height, int width, int r0, int r1, const Vec<A> (&taps)[K * K],
                             Vec<A> start, Emit& emit) {
  constexpr int L = kLanes<A>, P = K / 2;
  const int rows = L / width;
  Mask columns[K];
  FIF_UNROLL for (int dx = 0; dx < K; ++dx) {
    const Mask row = first_lanes(max_of(0, min_of(width, width + P - dx))) & ~first_lanes(max_of(0, P - dx));
    columns[dx] = 0;
    for (int r = 0; r < rows; ++r) columns[dx] |= row << (r * width);
  }
  for (int r = r0; r < r1; r += rows) {
    const Mask valid = first_lanes((int64_t)min_of(rows, r1 - r) * width);
    Vec<A> acc[K] = {start};
    FIF_UNROLL for (int dy = 0; dy < K; ++dy) {
      // Lanes whose row r + l / width + dy - P lies inside the plane: a run of whole rows.
      const int first = r + dy - P;
      const int below = first < 0 ? -first : 0, above = min_of(rows, height - first);
      if (above <= below) continue;
      const Mask inside = valid & first_lanes((int64_t)above * width) & ~first_lanes((int64_t)below * width);
      const In* p = in + (int64_t)first * width;
      FIF_UNROLL for (int dx = 0; dx < K; ++dx) acc[dx] += load(p + dx - P, inside & columns[dx]) * taps[dy * K + dx];
    }
    FIF_UNROLL for (int dx = 1; dx < K; ++dx) acc[0] += acc[dx];
    emit((int64_t)r * width, acc[0], valid);
  }
}

// Rows [r0, r1) of a plane of dense pixels; weight holds K * K numbers of the compute type.
template <int K, class A, class In, class Emit>
FIF_INLINE void depthwise_plane(const In* in, int height, int width, int r0, int r1, const A* weight, A start,
                                Emit emit) {
  constexpr int L = kLanes<A>, P = K / 2;
  Vec<A> taps[K * K];
  FIF_UNROLL for (int t = 0; t < K * K; ++t) taps[t] = splat<A>(weight[t]);
  if (2 * width <= L) return plane_narrow<K, A>(in, height, width, r0, r1, taps, splat<A>(start), emit);
  for (int column = 0; column < width; column += L) {
    const int lanes = min_of(L, width - column);
    const bool edge = column < P || column + L + P > width;
    Mask inside[K];
    FIF_UNROLL for (int dx = 0; dx < K; ++dx) {
      const int below = P - dx - column, above = min_of(lanes, width - column - dx + P);
      inside[dx] = above <= 0 ? 0 : first_lanes(above) & ~(below > 0 ? first_lanes(below) : 0);
    }
    in_blocks<kBlock<A, K>>(r0, r1, [&](int r, auto rows) {
      plane_column<K, decltype(rows)::value, A>(in, height, width, r, column, taps, splat<A>(start), inside, edge,
                                                emit);
    });
  }
}

// ---- lanes along channels: pixel p of the map at in + p * step

// tee(pixel) and emit(pixel) return what takes the values of that pixel and of those after it, one by one: addresses
// that only move on need no registers. `Exact` and `small` are store_quickly's.
template <int K, int Q, class A, bool Half, class Exact, class Tee, class Emit>
FIF_INLINE LaneMask channel_row(const A* in, int64_t step, int height, int width, int r, int c,
                                const Part<A, Half> (&taps)[K * K], Part<A, Half> start, Exact exact, Tee& tee,
                                Emit& emit) {
  constexpr int P = K / 2;
  const int64_t pixel = (int64_t)r * width + c, step3 = 3 * step;
  LaneMask small = 0;
  Part<A, Half> acc[Q];
  FIF_UNROLL for (int i = 0; i < Q; ++i) acc[i] = start;
  FIF_UNROLL for (int dy = 0; dy < K; ++dy) {
    const int row = r + dy - P;
    if (dy != P && (row < 0 || row >= height)) continue;
    auto take = tee(pixel);
    // As base + {0, 1, 2, 3} * step for every four columns, which are addresses that an instruction can hold.
    const A* group[(Q + K + 2) / 4];
    FIF_UNROLL for (int q = 0; q < (Q + K + 2) / 4; ++q) {
      group[q] = in + ((int64_t)row * width + c - P + 4 * q) * step;
      asm("" : "+r"(group[q]));
    }
    FIF_UNROLL for (int k = 0; k < Q + K - 1; ++k) {
      const int column = c - P + k;
      if ((k < P && column < 0) || (k >= Q + P && column >= width)) continue;
      const Part<A, Half> v = PartOf<A, Half>::load(group[k / 4] + (k % 4 == 3 ? step3 : (k % 4) * step));
      if (dy == P && k >= P && k < Q + P) take(v, exact, small);
      FIF_UNROLL for (int dx = 0; dx < K; ++dx) {
        const int out = k - dx;
        if (out >= 0 && out < Q) acc[out] += v * taps[dy * K + dx];
      }
    }
  }
  auto take = emit(pixel);
  FIF_UNROLL for (int i = 0; i < Q; ++i) take(acc[i], exact, small);
  return small;
}

// Rows [r0, r1) of whole vectors, or of their lower halves, in the compute type; taps are K * K vectors, one lane a
// channel; tee gets the input itself. Rows below 0 and from `height` on count as zeros, so a window of a larger map may
// be given by a pointer to where its row 0 would be. `Quick`: values may be stored inexactly first.
template <int K, class A, bool Half, bool Quick, class Tee, class Emit>
FIF_INLINE void depthwise_channels(const A* in, int64_t step, int height, int width, int r0, int r1,
                                   const Part<A, Half> (&taps)[K * K], Part<A, Half> start, Tee tee, Emit emit) {
  for (int r = r0; r < r1; ++r)
    in_blocks<kBlock<A, K>>(0, width, [&](int c, auto columns) {
      constexpr int Q = decltype(columns)::value;
      auto row = [&](auto exact) {
        return channel_row<K, Q, A, Half>(in, step, height, width, r, c, taps, start, exact, tee, emit);
      };
      if constexpr (!Quick)
        row(Constant<1>{});
      else if (row(Constant<0>{})) [[unlikely]]
        [&] __attribute__((noinline, cold)) () { row(Constant<1>{}); }();
    });
}

// What tee and emit return where nothing is wanted.
struct Nowhere {
  template <class V, class Exact>
  FIF_INLINE void operator()(V, Exact, LaneMask&) const {}
};
// Values to places `step` apart.
template <class T, class Map>
class Along {
 public:
  FIF_INLINE Along(T* to, int64_t step, Map map) : to_(to), step_(step), map_(map) {}
  template <class V, class Exact>
  FIF_INLINE void operator()(V v, Exact exact, LaneMask& small) {
    map_(to_, v, exact, small);
    to_ += step_;
    asm("" : "+r"(to_));
  }

 private:
  T* to_;
  const int64_t step_;
  Map map_;
};

// Outputs c, c + 1, ... c + Q - 1 of one row of a correlation with a stride. `Edge`: some of its columns lie outside.
template <int K, int Q, class A, bool Edge, class Emit>
FIF_INLINE void strided_row(const A* in, int64_t step, int height, int width, int stride, int r, int c, int out_width,
                            const A* taps, Emit& emit) {
  constexpr int L = kLanes<A>, P = K / 2;
  const int column = c * stride - P;
  Vec<A> acc[Q];
  FIF_UNROLL for (int i = 0; i < Q; ++i) acc[i] = load(taps + K * K * L);
  for (int dy = 0; dy < K; ++dy) {
    const int row = r * stride - P + dy;
    if (row < 0 || row >= height) continue;
    const A* window[Q];
    FIF_UNROLL for (int i = 0; i < Q; ++i) {
      window[i] = in + ((int64_t)row * width + column + i * stride) * step;
      asm("" : "+r"(window[i]));  // else the compiler works out every address for itself
    }
    const A* tap_row = taps + dy * K * L;
    FIF_UNROLL for (int dx = 0; dx < K; ++dx) {
      const Vec<A> tap = load(tap_row + dx * L);
      FIF_UNROLL for (int i = 0; i < Q; ++i) {
        const int at = column + dx + i * stride;
        if (!Edge || (at >= 0 && at < width)) acc[i] += load(window[i]) * tap;
        window[i] += step;
      }
    }
  }
  auto take = emit((int64_t)r * out_width + c);
  LaneMask none = 0;
  FIF_UNROLL for (int i = 0; i < Q; ++i) take(acc[i], Constant<1>{}, none);
}

// Rows [r0, r1) of a correlation with a stride, `out_width` pixels wide; taps: K * K + 1 vectors, the last is added.
template <int K, class A, class Emit>
FIF_INLINE void depthwise_strided(const A* in, int64_t step, int height, int width, int stride, int r0, int r1,
                                  int out_width, const A* taps, Emit emit) {
  for (int r = r0; r < r1; ++r)
    in_blocks<4>(0, out_width, [&](int c, auto columns) {
      constexpr int Q = decltype(columns)::value;
      const int first = c * stride - K / 2;
      if (first < 0 || first + (Q - 1) * stride + K > width)
        strided_row<K, Q, A, true>(in, step, height, width, stride, r, c, out_width, taps, emit);
      else
        strided_row<K, Q, A, false>(in, step, height, width, stride, r, c, out_width, taps, emit);
    });
}

// Calls f(tag) with the kernel size as tag.value.
template <class F>
FIF_INLINE void with_kernel_size(int kernel, F f) {
  switch (kernel) {
    case 1: return f(Constant<1>{});
    case 3: return f(Constant<3>{});
    case 5: return f(Constant<5>{});
    default: return f(Constant<7>{});
  }
}

}  // namespace fif::FIF_ISA
