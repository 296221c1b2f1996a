// Host side of the kernels: which tile, how many blocks, how many bytes. Plain C++, no CUDA: the same
// numbers are launched, tested and printed by fif_ops.explain.
//
// In inference a block computes `channels` primary maps and their cheap ones on a tile of tile_h x tile_w pixels. It
// needs the primary maps one halo further on every side, so the product runs over (tile_h + 2 R) * (tile_w + 2 pad)
// places, at most kPositions. Fewer, larger tiles waste fewer halo places; a tile that fits the map wastes fewer
// outside it. In training the product and the depthwise part are launches of their own, with tiles of their own.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace fif::gpu {

constexpr int kThreads = 256;
constexpr int kPositions = 256;  // places of a tile, halo included: 14 x 14 pixels with a 3 x 3 kernel
constexpr int kChunk = 32;       // input channels of one stage

FIF_PORTABLE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Elements of x that may be loaded at once: a power of two, at most 16 bytes, that divides every offset that a load
// starts at. In NCHW a load stays within `run` neighbouring pixels.
inline int load_vector(const Problem& p, const Input& x, int64_t run) {
  int vector = 16 / element_bytes(p.dtype);
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data) / element_bytes(p.dtype));
  if (p.channels_last)
    run = p.in_channels / p.groups;
  else if (p.stride > 1)
    run = 1;
  while (vector > 1 && (run % vector || x.step % vector || x.batch % vector || address % vector)) vector /= 2;
  return vector;
}

// What the plans depend on of a GPU.
struct Device {
  int multiprocessors;
  int shared_per_block;  // bytes that a launch may ask for
  int shared_per_multiprocessor;

  // Shared memory that lets two blocks stand on a multiprocessor; at least what any launch may have.
  int64_t budget() const {
    const int64_t half = shared_per_multiprocessor / 2 - 1024;
    return half < shared_per_block ? half : shared_per_block;
  }
};

// Blocks that go through `tiles` together with others along y: enough to fill the device `times` over.
inline int persistent_blocks(const Device& device, int64_t tiles, int64_t along_y, int times) {
  const int64_t wanted = ceil_div(int64_t(device.multiprocessors) * times, along_y);
  return static_cast<int>(tiles < wanted ? tiles : wanted);
}

// The largest power of two, from `most` down, that divides all offsets.
template <class... Offsets>
int common_vector(int most, Offsets... offsets) {
  int vector = most;
  while (vector > 1 && ((offsets % vector) || ...)) vector /= 2;
  return vector;
}

// ---- inference

struct Plan {
  int tile_h, tile_w;    // pixels of a tile
  int pad;               // columns to the left and right of it: the halo, rounded up to whole loads (NCHW)
  int tiles_h, tiles_w;  // tiles of a map
  int images;            // of a block, where a map is one tile
  int channels;          // primary maps of a block: 16, 32 or 64
  int vector;            // elements of one load from x
  int blocks_per_group;  // blocks of channels in a group of the primary convolution
  int64_t blocks_x;      // tiles of all images
  int blocks_y;          // blocks of channels
  int64_t bytes_read;    // predicted traffic to and from the second-level cache
  int64_t bytes_written;
};

// The tile with the least work: places computed, with a charge for the part of them that lies outside the map.
// `shared_bytes(channels)` says what a block would take.
template <class SharedBytes>
Plan plan_inference(const Problem& p, const Input& x, const Device& device, SharedBytes shared_bytes) {
  const int halo = p.kernel / 2;
  const int64_t maps = p.primary / p.groups;
  Plan best{};
  best.vector = load_vector(p, x, p.width);
  best.pad = p.channels_last ? halo : static_cast<int>(round_up(halo, best.vector));
  best.channels = maps <= 16 ? 16 : maps <= 32 ? 32 : 64;
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
  const int64_t tiles = p.batch * best.tiles_h * best.tiles_w;
  const auto blocks_of = [&](int channels) { return ceil_div(maps, channels) * p.groups; };
  // Narrow blocks where wide ones would leave multiprocessors idle; several images where they are too many anyway.
  while (best.channels > 16 &&
         (tiles * blocks_of(best.channels) < device.multiprocessors / 2 ||
          shared_bytes(best.channels) > device.shared_per_block))
    best.channels /= 2;
  best.blocks_per_group = static_cast<int>(ceil_div(maps, best.channels));
  best.blocks_y = static_cast<int>(blocks_of(best.channels));
  const int64_t positions = (best.tile_h + 2 * halo) * (best.tile_w + 2 * best.pad);
  best.images = 1;
  if (best.tiles_h == 1 && best.tiles_w == 1) {
    const int64_t most = kPositions / positions, spare = tiles * best.blocks_y / (2 * device.multiprocessors);
    best.images = static_cast<int>(spare < 1 ? 1 : spare < most ? spare : most);
  }
  best.blocks_x = ceil_div(tiles, best.images);
  const int64_t places = (best.tile_h + 2 * halo) * (best.tile_w + 2 * halo) * best.images;
  best.bytes_read =
      best.blocks_x * best.blocks_y * (places + best.channels) * (p.in_channels / p.groups) * element_bytes(p.dtype);
  best.bytes_written = p.batch * p.pixels() * p.out_channels * element_bytes(p.dtype);
  return best;
}

// ---- training

// The primary product over all pixels of the batch, kPositions at a time.
struct ProductPlan {
  int channels;          // of a block: 32 or 64
  int blocks_per_group;  // blocks of channels in a group
  int vector;            // elements of one load of maps
  int store_vector;      // elements of one store
  int64_t tiles;
  int blocks_x, blocks_y;
};

inline ProductPlan plan_product(const Problem& p, const Input& x, const Device& device) {
  const int wide = 16 / element_bytes(p.dtype);
  const int64_t maps = p.primary / p.groups;
  ProductPlan plan{};
  plan.channels = maps <= 32 ? 32 : 64;
  plan.blocks_per_group = static_cast<int>(ceil_div(maps, plan.channels));
  plan.blocks_y = static_cast<int>(plan.blocks_per_group * p.groups);
  plan.vector = load_vector(p, x, p.in_pixels());
  plan.store_vector = common_vector(wide, p.channels_last ? maps : p.pixels());
  plan.tiles = ceil_div(p.batch * p.pixels(), kPositions);
  plan.blocks_x = persistent_blocks(device, plan.tiles, plan.blocks_y, 2);
  return plan;
}

// The depthwise part: tiles of an image by blocks of channels.
struct CheapPlan {
  int tile_h, tile_w, tiles_h, tiles_w;
  int channels;            // of a block: in NHWC a multiple of four, in NCHW a warp has one
  int64_t tiles;           // of all images
  int blocks_x, blocks_y;  // blocks that share the tiles; blocks of channels
};

// `shared_bytes(plan)` says what a block would take. Widths are whole maps, halves, thirds, ...; as many rows as there
// is room for. Less halo wins, then larger tiles. Without room for any tile, tile_h is 0.
template <class SharedBytes>
CheapPlan plan_cheap(const Problem& p, const Device& device, int64_t room, int reach, int64_t along_y,
                     SharedBytes shared_bytes) {
  CheapPlan best{};
  double least = 0;
  const int most = p.dtype == Dtype::f32 ? 32 : 64, halo = reach * (p.kernel / 2);
  const int64_t blocks = ceil_div(p.primary, most);
  best.channels = p.channels_last ? static_cast<int>(round_up(ceil_div(p.primary, blocks), 4)) : kThreads / 32;
  for (int channels = best.channels; best.tile_h == 0 && channels > 0;
       channels = p.channels_last && channels > 4 ? static_cast<int>(round_up(channels / 2, 4)) : 0) {
    best.channels = channels;
    for (int64_t cuts = 1, last = 0; cuts <= p.width && (cuts <= 8 || best.tile_h == 0); ++cuts) {
      CheapPlan plan = best;
      const int64_t even = ceil_div(p.width, cuts);
      plan.tile_w = static_cast<int>(p.channels_last || cuts == 1 ? even : round_up(even, 4));
      if (plan.tile_w == last) continue;
      last = plan.tile_w;
      int64_t rows = p.height < 128 ? p.height : 128, low = 0;
      while (low < rows) {  // the most rows that fit
        plan.tile_h = static_cast<int>((low + rows + 1) / 2);
        if (shared_bytes(plan) <= room)
          low = plan.tile_h;
        else
          rows = plan.tile_h - 1;
      }
      if (low == 0) continue;
      plan.tile_h = static_cast<int>(ceil_div(p.height, ceil_div(p.height, low)));
      plan.tiles_h = static_cast<int>(ceil_div(p.height, plan.tile_h));
      plan.tiles_w = static_cast<int>(ceil_div(p.width, plan.tile_w));
      const double tiles = static_cast<double>(plan.tiles_h) * plan.tiles_w;
      const double cost = tiles * ((plan.tile_h + 2.0 * halo) * (plan.tile_w + 2.0 * halo) + 32);
      if (best.tile_h != 0 && cost >= least) continue;
      least = cost;
      best = plan;
    }
  }
  if (best.tile_h == 0) return best;
  best.tiles = p.batch * best.tiles_h * best.tiles_w;
  best.blocks_y = static_cast<int>(ceil_div(p.primary, best.channels));
  best.blocks_x = persistent_blocks(device, best.tiles, best.blocks_y * along_y, 4);
  return best;
}

// The same with as much shared memory as lets two blocks stand side by side, or else as much as there is.
template <class SharedBytes>
CheapPlan plan_cheap(const Problem& p, const Device& device, int reach, int64_t along_y, SharedBytes shared_bytes) {
  const CheapPlan plan = plan_cheap(p, device, device.budget(), reach, along_y, shared_bytes);
  return plan.tile_h > 0 ? plan : plan_cheap(p, device, device.shared_per_block, reach, along_y, shared_bytes);
}

// The gradients of the primary convolution.
struct GradientPlan {
  int splits;                    // shares of the pixels, each with a partial weight gradient; 0: not wanted
  int map_tiles, channel_tiles;  // of a group
  int input_vector, map_vector;  // elements of one load of x, and of what has raw's layout
  int channels, blocks_per_group, blocks_y, store_vector;  // of the input's gradient, as in ProductPlan
  int64_t input_blocks, sum_blocks;
};

inline GradientPlan plan_gradient(const Problem& p, const Input& x, bool need_x, bool need_weight,
                                  const Device& device) {
  constexpr int kTile = 64;
  const int wide = 16 / element_bytes(p.dtype);
  const int64_t maps = p.primary / p.groups, channels = p.in_channels / p.groups;
  GradientPlan plan{};
  plan.map_tiles = static_cast<int>(ceil_div(maps, kTile));
  plan.channel_tiles = static_cast<int>(ceil_div(channels, kTile));
  const int64_t tiles = plan.map_tiles * plan.channel_tiles * p.groups;
  if (need_weight && p.has_primary)
    plan.splits = persistent_blocks(device, ceil_div(p.batch * p.pixels(), kTile), tiles, 2);
  plan.input_vector = load_vector(p, x, p.in_pixels());
  plan.map_vector = p.channels_last ? common_vector(wide, maps) : common_vector(wide, p.stride == 1 ? p.pixels() : 1);
  plan.channels = channels <= 32 ? 32 : 64;
  plan.blocks_per_group = static_cast<int>(ceil_div(channels, plan.channels));
  plan.blocks_y = static_cast<int>(plan.blocks_per_group * p.groups);
  plan.store_vector = common_vector(wide, p.channels_last ? channels : p.in_pixels());
  if (need_x && p.has_primary) plan.input_blocks = ceil_div(p.batch * p.in_pixels(), kPositions) * plan.blocks_y;
  const int64_t sums = p.cheap() * p.kernel * p.kernel + (plan.splits > 0 ? p.primary * channels : 0);
  plan.sum_blocks = ceil_div(sums, kThreads);
  return plan;
}

}  // namespace fif::gpu
