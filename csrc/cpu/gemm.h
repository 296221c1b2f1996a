// c(i, j) = epilogue(sum over k of a(i, k) * b(k, j)), the one matrix product behind every pass.
//
// b and c are contiguous along j, which lies in vector lanes; a is broadcast and may have any strides. So
//   NCHW primary          a = W[m, c]           b = x planes         c = maps         (lanes: pixels)
//   NHWC primary          a = x[pixel, c]       b = W transposed     c = pixels       (lanes: channels)
//   NCHW / NHWC grad_x    the same with W transposed and the maps' gradient for x
//   NHWC grad_W           a = gradient^T        b = x                c = W
//   NHWC primary in bf16  a = x[pixel, c]       b = pairs along k of W transposed (a_k is 1, b_k counts pairs)
// A tile of rows x vectors accumulators stays in registers over the whole depth; sums run over k in order, so a value
// does not depend on the tile that it falls in, nor on the number of threads.
#pragma once

#include "activation.h"

namespace fif::FIF_ISA {

enum class Finish : int {
  store,       // c = sum
  accumulate,  // c += sum
  by_row,      // c = activation(sum * scale[i] + shift[i])
  by_column,   // c = activation(sum * scale[j] + shift[j])
};

template <class A, class B, class C>
struct Gemm {
  const A* a;
  int64_t a_row, a_k;
  const B* b;
  int64_t b_k;
  C* c;
  int64_t c_row;
  int64_t rows, cols, depth;
  Finish finish = Finish::store;
  const Compute<A>* scale = nullptr;
  const Compute<A>* shift = nullptr;
  Activation activation = Activation::none;
  int64_t segments = 1, a_segment = 0;  // so many times the depth, from rows of a that lie a_segment further each time
  bool half = false;    // f32, with whole vectors of b and c: the upper half of the last one is not wanted
  int64_t b_ahead = 0;  // elements from what is read of b to what is asked of the caches: 0, or the next tile's
};

// The most rows that one tile holds; callers cut their channels into even blocks of at most this.
constexpr int kTileRows = kRegisters == 32 ? 12 : 6;

// As few blocks as the largest allows, as even as possible.
FIF_INLINE int64_t even_block(int64_t total, int64_t largest) { return ceil_div(total, ceil_div(total, largest)); }

template <class A, class B, class C>
void gemm(const Gemm<A, B, C>& g);

}  // namespace fif::FIF_ISA
