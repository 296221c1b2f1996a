// The depthwise part of training, forward and backward: what a block knows of its tile, and how it computes there.
//
// A block takes a few channels and goes through tiles of pixels, blockIdx.x, blockIdx.x + gridDim.x, ... It keeps
// activated primary maps with a halo (a Field) in shared memory; a thread works on four elements (a quad) at a time:
//   NHWC: four channels of one pixel; threads of one quad share the pixels of a tile (workers).
//   NCHW: four pixels of a row; a warp has a channel of its own, its lanes are the workers.
#pragma once

#include "unit.h"

namespace fif::gpu {

// Activated maps of a tile and its halo, one row after another.
//   NHWC: [rows][columns][channels + skew]    NCHW: [channels][rows][columns], columns start at a multiple of four
template <class T, bool Last>
struct Field {
  T* data;  // of this thread's quad or channel, at the tile's first pixel
  int row_pitch, column_pitch;

  FIF_DEVICE T* at(int row, int column) const { return data + row * row_pitch + column * column_pitch; }
};

template <class T, bool Last>
struct FieldShape {
  static constexpr int kSkew = 16 / sizeof(T);
  int halo, rows, columns, margin;  // margin: columns before the tile
  int pitch, plane;                 // elements from column to column; from channel to channel (NCHW)

  // Reaches `reach` kernel radii beyond the tile, in NCHW rounded up to quads.
  FIF_HOST_DEVICE FieldShape(const CheapPlan& plan, int radius, int reach)
      : halo(radius * reach), rows(plan.tile_h + 2 * radius * reach) {
    margin = Last ? halo : kQuad * reach;
    columns = (Last ? plan.tile_w : (plan.tile_w + kQuad - 1) / kQuad * kQuad) + 2 * margin;
    pitch = Last ? plan.channels + kSkew : 1;
    plane = rows * columns;
  }
  FIF_HOST_DEVICE int size(int channels) const { return Last ? plane * pitch : plane * channels; }
};

// How far the fields of a pass reach beyond the tile, in radii of the kernel; no z where it is not kept.
struct Reach {
  int y, z;
};

template <class T>
struct CheapArrays {
  float *primary, *cheap;  // constants of the channels: [kPrimary][channels], [kCheap][S][channels]
  float* taps;             // [S][K*K][channels]
  float* slots;            // [S][K][slots of a thread][threads], for the cheap weight's gradient
  T *y, *z;                // fields; z: [S]
  float* parts;            // over the fields: [items][workers][channels]
};

// Constants of a channel in shared memory.
enum { kScale, kShift, kMean, kRstd, kSum, kDot, kConstants };

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, bool Last, int K, class Arena>
FIF_HOST_DEVICE void carve_cheap(Arena& arena, const Problem& p, const CheapPlan& plan, Reach reach,
                                 CheapArrays<T>* s) {
  const int channels = plan.channels, multiplier = static_cast<int>(p.multiplier), radius = K / 2;
  s->primary = arena.template take<float>(kConstants * channels);
  s->cheap = arena.template take<float>(kConstants * channels * multiplier);
  s->taps = arena.template take<float>(K * K * channels * multiplier);
  if (reach.z >= 0) s->slots = arena.template take<float>(multiplier * K * (Last ? kQuad : 1) * kThreads);
  const int start = arena.mark();
  s->y = arena.template take<T>(FieldShape<T, Last>(plan, radius, reach.y).size(channels));
  if (reach.z >= 0)
    s->z = arena.template take<T>(multiplier * FieldShape<T, Last>(plan, radius, reach.z).size(channels));
  arena.rewind(start);
  s->parts = arena.template take<float>(3 * (Last ? kThreads * kQuad : kThreads));
}

// Kernel values of one channel, or of a quad of them: in registers, or (Held false) in shared memory.
template <bool Last, int K, bool Held = !Last || K == 3>
class Taps {
  static constexpr bool kHeld = Held;
  float held_[kHeld ? K * K : 1][Last ? kQuad : 1];
  const float* shared_;
  const int channels_;

 public:
  FIF_DEVICE Taps(const float* shared, int channels) : shared_(shared), channels_(channels) {
    if constexpr (kHeld) {
      FIF_UNROLL
      for (int k = 0; k < K * K; ++k) {
        if constexpr (Last)
          load_quad(shared + k * channels, held_[k]);
        else
          held_[k][0] = shared[k * channels];
      }
    }
  }
  // sum[q] += v(q) * tap k of q's channel
  template <class V>
  FIF_DEVICE void multiply_add(int k, V v, float (&sum)[kQuad]) const {
    float tap[Last ? kQuad : 1];
    if constexpr (kHeld) {
      FIF_UNROLL
      for (int q = 0; q < (Last ? kQuad : 1); ++q) tap[q] = held_[k][q];
    } else {
      load_quad(shared_ + k * channels_, tap);
    }
    FIF_UNROLL
    for (int q = 0; q < kQuad; ++q) sum[q] = fmaf(v(q), tap[Last ? q : 0], sum[q]);
  }
};

// The neighbours in one row that K taps of a quad need.
template <bool Last, int K>
struct Window {
  float v[Last ? K : 1][Last ? kQuad : kQuad + K - 1];

  FIF_DEVICE float at(int dx, int q) const { return Last ? v[dx][q] : v[0][q + dx]; }

  template <class T>
  FIF_DEVICE void load(const Field<T, Last>& field, int row, int column) {
    if constexpr (Last) {
      FIF_UNROLL
      for (int dx = 0; dx < K; ++dx) load_quad(field.at(row, column + dx - K / 2), v[dx]);
    } else {
      const T* from = field.at(row, column);
      float middle[kQuad];
      load_quad(from, middle);
      FIF_UNROLL
      for (int i = 0; i < K / 2; ++i) v[0][i] = to_float(from[i - K / 2]);
      FIF_UNROLL
      for (int q = 0; q < kQuad; ++q) v[0][K / 2 + q] = middle[q];
      FIF_UNROLL
      for (int i = 0; i < K / 2; ++i) v[0][K / 2 + kQuad + i] = to_float(from[kQuad + i]);
    }
  }
};

// Rows of quads from (row, column) on: sum[r][q] += the depthwise convolution; with Turned, its transpose.
template <int Rows, bool Turned, class T, bool Last, int K, bool Held>
FIF_DEVICE void convolve(const Field<T, Last>& field, const Taps<Last, K, Held>& taps, int row, int column, int rows,
                         float (&sum)[Rows][kQuad]) {
  FIF_UNROLL
  for (int i = 0; i < Rows + K - 1; ++i) {
    if (i >= rows + K - 1) break;
    Window<Last, K> window;
    window.load(field, row + i - K / 2, column);
    FIF_UNROLL
    for (int dy = 0; dy < K; ++dy) {
      if (i - dy < 0 || i - dy >= Rows) continue;
      FIF_UNROLL
      for (int dx = 0; dx < K; ++dx) {
        const int k = dy * K + dx;
        taps.multiply_add(Turned ? K * K - 1 - k : k, [&](int q) { return window.at(dx, q); }, sum[i - dy]);
      }
    }
  }
}

template <class T, bool Last, int K>
struct CheapBlock {
  // Rows of a strip: as many as there are registers for.
  static constexpr int R = K / 2, kRows = Last && K == 5 ? 1 : 2, kSlots = Last ? kQuad : 1;

  const Problem& p;
  const CheapPlan& plan;
  const int channels;  // of a block
  const int multiplier;
  int workers, worker;     // threads that share this thread's quad or channel; beyond all tiles if it has none
  int channel;             // of the thread's quad, within the block
  int first_map, present;  // of the block; channels of the thread's quad that exist
  int64_t image;           // of the tile
  int row0, column0, rows, columns;  // the tile's pixels that lie in the map

  FIF_DEVICE CheapBlock(const Problem& problem, const CheapPlan& cheap_plan)
      : p(problem), plan(cheap_plan), channels(cheap_plan.channels), multiplier(static_cast<int>(problem.multiplier)),
        first_map(static_cast<int>(blockIdx.y) % cheap_plan.blocks_y * cheap_plan.channels) {
    const int thread = threadIdx.x, quads = Last ? channels / kQuad : channels;
    workers = Last ? kThreads / quads : 32;
    worker = Last ? thread / quads : lane_id();
    channel = Last ? thread % quads * kQuad : warp_id();
    if (worker >= workers) worker = 1 << 30;
    const int64_t left = p.primary - first_map - channel;
    present = left < 0 ? 0 : left > kSlots ? kSlots : static_cast<int>(left);
  }

  FIF_DEVICE void place(int64_t tile) {
    const int64_t per_image = int64_t(plan.tiles_h) * plan.tiles_w;
    const int within = static_cast<int>(tile % per_image);
    image = tile / per_image;
    row0 = within / plan.tiles_w * plan.tile_h;
    column0 = within % plan.tiles_w * plan.tile_w;
    rows = min_of(plan.tile_h, static_cast<int>(p.height) - row0);
    columns = min_of(plan.tile_w, static_cast<int>(p.width) - column0);
  }

  FIF_DEVICE static int min_of(int a, int b) { return a < b ? a : b; }
  FIF_DEVICE static int slot(int q) { return Last ? q : 0; }

  FIF_DEVICE Field<T, Last> field(T* memory, int reach, int t = 0) const {
    const FieldShape<T, Last> shape(plan, R, reach);
    const int first = (shape.halo * shape.columns + shape.margin) * shape.pitch;
    T* data = memory + t * shape.size(channels) + first + (Last ? channel : channel * shape.plane);
    return {data, shape.columns * shape.pitch, shape.pitch};
  }

  // Elements of the quad at a pixel of the tile (or around it) that exist.
  FIF_DEVICE int count(int row, int column) const {
    const int h = row0 + row, w = column0 + column;
    if (h < 0 || h >= p.height || w < 0 || w >= p.width || present == 0) return 0;
    return Last ? present : min_of(kQuad, static_cast<int>(p.width) - w);
  }

  // Where the quad's first element lies in a map of the image, for the channel that `first` is at the block's first.
  template <class E, class M>
  FIF_DEVICE E* address(const M& map, int64_t first, int row, int column) const {
    const int64_t pixel = (row0 + row) * p.width + column0 + column;
    return static_cast<E*>(map.data) + image * map.batch + (Last ? pixel * map.step + first : first * map.step + pixel);
  }
  FIF_DEVICE const T* primary(const Input& map, int row, int column) const {
    return address<const T>(map, first_map + channel, row, column);
  }
  FIF_DEVICE int64_t cheap_channel(int t) const {
    return p.kept_primary() + int64_t(first_map + channel) * multiplier + t;
  }
  FIF_DEVICE int64_t cheap_stride() const { return Last ? multiplier : 1; }
  // As count(), for cheap maps number t: those beyond out_channels do not exist.
  FIF_DEVICE int64_t cheap_count(int t, int row, int column) const {
    const int64_t n = count(row, column), kept = p.out_channels - cheap_channel(t);
    if (kept <= 0) return 0;
    const int64_t room = (kept + multiplier - 1) / multiplier;
    return Last && room < n ? room : n;
  }

  // body(row, column, rows) for all strips of `Rows` rows of quads in a field of this reach.
  template <int Rows = kRows, class Body>
  FIF_DEVICE void each_strip(int reach, Body body) const {
    const FieldShape<T, Last> shape(plan, R, reach);
    const int step = Last ? 1 : kQuad, across = shape.columns / step;
    for (int i = worker; i < across * ((shape.rows + Rows - 1) / Rows); i += workers) {
      const int row = i / across * Rows;
      body(row - shape.halo, i % across * step - shape.margin, min_of(Rows, shape.rows - row));
    }
  }

  // Activated primary maps of the tile and as far around it as the field reaches; zeros outside the map.
  FIF_DEVICE void fill(const Input& raw, const CheapArrays<T>& s, int reach) const {
    const Field<T, Last> y = field(s.y, reach);
    float scale[kSlots], shift[kSlots];
    constants(s.primary, kScale, scale);
    constants(s.primary, kShift, shift);
    each_strip<1>(reach, [&](int row, int column, int) {
      const int n = count(row, column);
      float v[kQuad] = {};
      if (n > 0) {
        get_quad(primary(raw, row, column), 1, n, v);
        FIF_UNROLL
        for (int q = 0; q < kQuad; ++q)
          v[q] = q < n ? activate(fmaf(v[q], scale[slot(q)], shift[slot(q)]), p.activation) : 0.f;
      }
      store_quad(y.at(row, column), v);
    });
  }

  // ---- constants of the block's channels

  FIF_DEVICE void constants(const float* array, int which, float (&v)[kSlots]) const {
    FIF_UNROLL
    for (int q = 0; q < kSlots; ++q) v[q] = array[which * channels + channel + q];
  }
  FIF_DEVICE void cheap_constants(const float* array, int which, int t, float (&v)[kSlots]) const {
    constants(array + t * channels, which * multiplier, v);
  }

  // prepare(channel, float (&constants)[kConstants]) of every existing channel, by whole warps, into the array;
  // channels in the order of the maps are `first` + i * stride.
  template <class Prepare>
  FIF_DEVICE void each_channel(float* array, int pitch, int64_t stride, int64_t offset, Prepare prepare) const {
    for (int c = warp_id(); c < channels; c += kWarps) {
      float v[kConstants] = {};
      if (first_map + c < p.primary) prepare((first_map + c) * stride + offset, v);
      if (lane_id() == 0) {
        FIF_UNROLL
        for (int i = 0; i < kConstants; ++i) array[i * pitch + c] = v[i];
      }
    }
  }
  template <class Prepare>
  FIF_DEVICE void each_primary(float* array, Prepare prepare) const {
    each_channel(array, channels, 1, 0, prepare);
  }
  template <class Prepare>
  FIF_DEVICE void each_cheap(float* array, int t, Prepare prepare) const {
    each_channel(array + t * channels, channels * multiplier, multiplier, t, prepare);
  }

  FIF_DEVICE void load_taps(const void* cheap_weight, float* taps) const {
    const T* weight = static_cast<const T*>(cheap_weight);
    for (int i = threadIdx.x; i < channels * multiplier * K * K; i += kThreads) {
      const int map = first_map + i % channels, k = i / channels % (K * K), t = i / (channels * K * K);
      taps[i] = map < p.primary ? to_float(weight[(int64_t(map) * multiplier + t) * K * K + k]) : 0.f;
    }
  }
  template <bool Held = !Last || K == 3>
  FIF_DEVICE Taps<Last, K, Held> taps(const float* all, int t) const {
    return Taps<Last, K, Held>(all + t * K * K * channels + channel, channels);
  }

  // ---- results of the block's channels

  FIF_DEVICE float* part(float* parts, int item, int of_worker, int c) const {
    return parts + (item * workers + of_worker) * channels + c;
  }
  // What this thread found of slot s, item by item.
  FIF_DEVICE void leave(float* parts, int item, int s, float v) const {
    if (worker < workers) *part(parts, item, worker, channel + s) = v;
  }
  // finish(channel in the block, map): by one thread for every existing channel of the block.
  template <class Finish>
  FIF_DEVICE void each_result(Finish finish) const {
    for (int c = threadIdx.x; c < channels; c += kThreads)
      if (first_map + c < p.primary) finish(c, int64_t(first_map) + c);
  }
  // The sum over workers of an item.
  FIF_DEVICE float total(float* parts, int item, int c) const {
    float sum = 0.f;
    for (int w = 0; w < workers; ++w) sum += *part(parts, item, w, c);
    return sum;
  }
};

}  // namespace fif::gpu
