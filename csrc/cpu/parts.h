// Products whose constant factor is taken apart at the beginning of a pass (tile_gemm.h), for want of packed constants.
#pragma once

#include "pass.h"
#include "tile_gemm.h"

namespace fif::FIF_ISA {

// Whether a product of f32 numbers is worth it. For short sums or few results, taking the other factor apart costs what
// the tiles save.
inline bool parts_pay(int64_t depth, int64_t results) {
  constexpr int64_t kShort = 24, kFew = 48;
  return kTiles && depth >= kShort && results > kFew;
}

// Constants [rows, depth], in blocks of rows, times planes of numbers.
class RowsInParts {
 public:
  // No rows: not wanted.
  RowsInParts(const void* constants, int64_t rows, int64_t depth, int64_t block, int64_t threads)
      : plain_(static_cast<const float*>(constants)), chunks_(1, depth), block_(block),
        tile_rows_(even_block(block, kTileSide)), stream_(ceil_div(block, tile_rows_) * chunks_.stream()),
        constants_(ceil_div(rows, block) * stream_), buffers_(rows ? threads * chunks_.buffer() : 0) {
    if constexpr (kTiles)
      for (int64_t i = 0; i < rows; i += block)
        take_rows_apart(plain_ + i * depth, min_of(block, rows - i), chunks_, tile_rows_,
                        constants_.get() + i / block * stream_);
  }
  // How many rows make a block, as even as may be: the planes are taken apart for each.
  static int64_t block(int64_t rows, int64_t threads) {
    constexpr int64_t kMost = 12 * kTileSide;
    return even_block(rows, min_of(kMost, ceil_div(ceil_div(rows, threads), kTileSide) * kTileSide));
  }
  // From row `first` on, which begins a block; to.rows are no more than that has.
  void multiply(int64_t first, const float* planes, int64_t step, const TileResult& to, int thread) const {
    if constexpr (kTiles) {
      TileRegisters tiles;
      gemm(PlanarPartsProduct{.to = to,
                              .rows = plain_ + first * chunks_.depth,
                              .a = constants_.get() + first / block_ * stream_,
                              .tile_rows = tile_rows_,
                              .b = planes,
                              .b_k = step,
                              .chunks = chunks_,
                              .buffer = buffers_.get() + thread * chunks_.buffer()},
           tiles);
    }
  }

 private:
  const float* const plain_;
  const PartChunks chunks_;
  const int64_t block_, tile_rows_, stream_;
  const Scratch<bf16> constants_, buffers_;
};

}  // namespace fif::FIF_ISA
