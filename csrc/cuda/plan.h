// Host side of the inference kernel: which tile, how many blocks, how many bytes. Plain C++, no CUDA: the same
// numbers are launched, tested and printed by fif_ops.explain.
//
// A block computes `channels` primary maps and their cheap ones on a tile of tile_h x tile_w pixels. It needs the
// primary maps one halo further on every side, so the product runs over `positions` = (tile_h + 2 R) * (tile_w + 2 pad)
// places, at most kPositions. Fewer, larger tiles waste fewer halo places; a tile that fits the map wastes fewer
// outside it.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace fif::gpu {

constexpr int kThreads = 256;
constexpr int kPositions = 256;  // places of a tile, halo included: 14 x 14 pixels with a 3 x 3 kernel
constexpr int kChunk = 32;       // input channels of one stage

struct Plan {
  int tile_h, tile_w;    // pixels of a tile
  int pad;               // columns to the left and right of it: the halo, rounded up to whole loads (NCHW)
  int tiles_h, tiles_w;  // tiles of a map
  int channels;          // primary maps of a block: 16, 32 or 64
  int vector;            // elements of one load from x
  int64_t blocks_x;      // tiles of all images
  int blocks_y;          // blocks of channels
  int64_t bytes_read;    // predicted traffic to and from the second-level cache
  int64_t bytes_written;
};

FIF_PORTABLE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Elements that may be loaded at once: a power of two, at most 16 bytes, that divides every offset that a load starts
// at.
inline int load_vector(const Problem& p, const Input& x) {
  int vector = 16 / element_bytes(p.dtype);
  const uintptr_t address = reinterpret_cast<uintptr_t>(x.data) / element_bytes(p.dtype);
  const int64_t run = p.channels_last ? p.in_channels : p.width;
  while (vector > 1 && (run % vector || x.step % vector || x.batch % vector || address % vector)) vector /= 2;
  return vector;
}

// The tile with the least work: places computed, with a charge for the part of them that lies outside the map.
inline Plan plan_inference(const Problem& p, const Input& x) {
  const int halo = p.kernel / 2;
  Plan best{};
  best.vector = load_vector(p, x);
  best.pad = p.channels_last ? halo : static_cast<int>(round_up(halo, best.vector));
  best.channels = p.primary <= 16 ? 16 : p.primary <= 32 ? 32 : 64;
  int64_t least = INT64_MAX;
  for (int w = 1; w <= p.width; ++w) {
    if (!p.channels_last && w % best.vector && w != p.width) continue;
    const int64_t columns = w + 2 * best.pad;
    const int64_t room = kPositions / columns - 2 * halo;
    if (room < 1) break;
    const int64_t tall = room < p.height ? room : p.height;
    const int64_t rows = ceil_div(p.height, ceil_div(p.height, tall));  // as even as that many tiles can be
    const int64_t tiles = ceil_div(p.width, w) * ceil_div(p.height, rows);
    const int64_t cost = tiles * (columns * (rows + 2 * halo) + 32);
    if (cost >= least) continue;
    least = cost;
    best.tile_w = w;
    best.tile_h = static_cast<int>(rows);
  }
  best.tiles_h = static_cast<int>(ceil_div(p.height, best.tile_h));
  best.tiles_w = static_cast<int>(ceil_div(p.width, best.tile_w));
  best.blocks_x = p.batch * best.tiles_h * best.tiles_w;
  best.blocks_y = static_cast<int>(ceil_div(p.primary, best.channels));
  const int64_t places = (best.tile_h + 2 * halo) * (best.tile_w + 2 * halo);
  best.bytes_read = best.blocks_x * best.blocks_y * (places + best.channels) * p.in_channels * element_bytes(p.dtype);
  best.bytes_written = p.batch * p.pixels() * p.out_channels * element_bytes(p.dtype);
  return best;
}

}  // namespace fif::gpu
