// Matrix products by tile registers: of bf16 numbers, and of f32 ones, each taken for the sum of three bf16 numbers.
//
// An f32 number without its last 16 bits is a bf16 one; of what is then left the same holds, and what is left of that
// is one: x = x0 + x1 + x2 without an error. Of the nine products of two such sums, six (x0 w0, x0 w1, x1 w0, x1 w1,
// x0 w2, x2 w0) are summed in f32, and the three others are too small to count: about 2^-25 of the product, where
// rounding the sum costs 2^-24. Six products of 16,384 operations in 16 cycles each are 2.7 times as fast as what the
// multiply-add units do meanwhile, and, since fewer sums are rounded, nearer to the product in f64. Numbers below 1e-30
// in magnitude lose digits, and those below 1e-38 are zeros, as for all instructions on bf16 numbers. Where infinities
// and NaN make a sum that is not finite, it is computed once more by multiply-adds, from the numbers themselves.
#pragma once

#include "gemm.h"
#include "tiles.h"

namespace fif::FIF_ISA {

// The depth of a product in chunks that a tile holds.
struct TileChunks {
  int64_t count, size;
  bool copies = false;  // whether rows must be copied to `width` numbers, zeros at their ends

  // In equal chunks of numbers as they lie in memory, if any divide the depth.
  explicit TileChunks(int64_t depth) {
    const int64_t least = max_of<int64_t>(1, ceil_div(depth, kTileDepth));
    for (count = least; count <= least + 1; ++count) {
      size = depth / count;
      copies = size * count != depth || size % 2 != 0;
      if (!copies) return;
    }
    count = least;
    size = kTileDepth;
  }
  int64_t width() const { return count * size; }
};

constexpr int kParts = 3;
constexpr int64_t kTileNumbers = kTileSide * kTileDepth;

// The same for numbers in parts, in `segments` that do not share a chunk: as few chunks as may be, zeros at the end of
// the last of a segment. Factors lie in tiles: [tiles of rows or lanes, chunks, parts, a tile's memory], where a
// chunk's numbers i and size / 2 + i are pair i.
struct PartChunks {
  int64_t segments, depth, each, size;  // depth of a segment, chunks of one

  PartChunks(int64_t segments, int64_t depth)
      : segments(segments), depth(depth), each(max_of<int64_t>(1, ceil_div(depth, kTileDepth))),
        size(ceil_div(ceil_div(depth, each), 2) * 2) {}
  int64_t count() const { return segments * each; }
  // Numbers of chunk k, and where they begin in the depth of its segment.
  int64_t begin(int64_t k) const { return k % each * size; }
  int64_t numbers(int64_t k) const { return min_of(size, depth - begin(k)); }
  // bf16 numbers of one tile's rows or lanes over the whole depth.
  int64_t stream() const { return count() * kParts * kTileNumbers; }
  // Where in a tile of lanes number n of a chunk lies.
  int64_t in_lanes(int64_t j, int64_t n) const { return (n % (size / 2) * kTileSide + j) * 2 + n / (size / 2); }
  // bf16 numbers for what one thread takes apart.
  int64_t buffer() const { return 2 * stream() + 2 * kParts * kTileNumbers; }
};

// Part 0, 1 or 2 of a constant, rounded, so that what the products leave out has no sign of its own.
bf16 part_of(float v, int part);

struct TileResult {
  float* c;
  int64_t c_row;
  int64_t rows, cols;
  const float* scale;
  const float* shift;
  Activation activation;
};

// Rows of bf16 numbers times b [vectors, chunks * chunk / 2, lanes], pairs along the depth; by column. Lanes beyond the
// last channel must be there, in b, scale and shift alike.
struct TileProduct {
  TileResult to;
  const bf16* a;
  int64_t a_row;
  const bf16* b;
  int64_t chunks, chunk;  // how many, and numbers of each
};
void gemm(const TileProduct& g, TileRegisters& tiles);

// Rows of f32 numbers times b, tiles of lanes; by column. A row has as many segments, and so far apart, as chunks and
// a_segment say; the rows come in lines of `line` rows.
struct PartsProduct {
  TileResult to;
  const float* a;
  int64_t a_row, a_segment, line, a_line;
  const bf16* b;
  PartChunks chunks;
  bf16* buffer;

  const float* row(int64_t i) const { return a + i / line * a_line + i % line * a_row; }
};
void gemm(const PartsProduct& g, TileRegisters& tiles);

// Dense rows, as tiles of tile_rows rows (16 at most).
void take_rows_apart(const float* rows, int64_t count, const PartChunks& chunks, int64_t tile_rows, bf16* to);

// Such rows, and taken apart like that, times planes of f32 numbers, b_k apart, whose columns are lanes; by row.
struct PlanarPartsProduct {
  TileResult to;
  const float* rows;
  const bf16* a;
  int64_t tile_rows;
  const float* b;
  int64_t b_k;
  PartChunks chunks;
  bf16* buffer;
};
void gemm(const PlanarPartsProduct& g, TileRegisters& tiles);

}  // namespace fif::FIF_ISA
