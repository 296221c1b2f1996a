// Inference in one launch: primary product, normalisation, activation, depthwise part, normalisation, activation, both
// halves into the output.
//
// A block computes 16, 32 or 64 primary maps and their cheap ones on one tile of pixels, or on several small images.
//   1. Product over the tile and its halo: chunks of 32 input channels come by cp.async into two stages of shared
//   memory,
//      tensor cores multiply (f32: plain fused multiply-adds), sums stay in registers.
//   2. Normalised and activated maps go to shared memory, over the stages, which are done with; places outside the map
//      are zero there, whatever the normalisation adds.
//   3. Depthwise from shared memory; primary and cheap pixels leave for the output, four channels (NHWC) or a row of
//      pixels (NCHW) at a time.
// Bytes per output pixel: C * (1 + halo share) read, M + N written. Limit: memory for few channels, shared memory
// bandwidth for many.
#include "product.h"
#include "sizer.h"
#include "unit.h"

namespace fif::gpu {
namespace {

template <class T, bool Last, int Channels>
struct Arrays {
  float *norm1, *norm2, *taps;  // [2][channels], [2][S][channels], [taps][S][channels]
  int64_t *source, *target;     // [places] offsets in x and in the output; -1 outside the map
  Stages<T, Rows<T, Last, Channels>> stages;
};

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, bool Last, int K, int Channels, class Arena>
FIF_HOST_DEVICE void carve(Arena& arena, int multiplier, Arrays<T, Last, Channels>* arrays) {
  arrays->norm1 = arena.template take<float>(2 * Channels);
  arrays->norm2 = arena.template take<float>(2 * Channels * multiplier);
  arrays->taps = arena.template take<float>(K * K * Channels * multiplier);
  arrays->source = arena.template take<int64_t>(kPositions);
  arrays->target = arena.template take<int64_t>(kPositions);
  carve_stages(arena, &arrays->stages);
}

template <class T, bool Last, int K, int Channels>
struct Block {
  using Row = Rows<T, Last, Channels>;
  static constexpr int R = K / 2;

  const InferCall& call;
  const Problem& p;
  int group, first_map, end_map;     // maps of the block lie in one group of the primary convolution
  int row0, column0, columns, rows;  // first pixel of the tile's halo; places per row, rows per image
  int places;                        // in all images of the block
  int64_t image;                     // the first
  Arrays<T, Last, Channels> s;

  FIF_DEVICE Block(const InferCall& c, SharedArena& arena) : call(c), p(c.p) {
    const int tiles = c.plan.tiles_h * c.plan.tiles_w;
    const int tile = static_cast<int>(blockIdx.x % tiles);
    image = blockIdx.x / tiles * c.plan.images;
    row0 = tile / c.plan.tiles_w * c.plan.tile_h - R;
    column0 = tile % c.plan.tiles_w * c.plan.tile_w - c.plan.pad;
    columns = c.plan.tile_w + 2 * c.plan.pad;
    rows = c.plan.tile_h + 2 * R;
    places = c.plan.images * rows * columns;
    group = blockIdx.y / c.plan.blocks_per_group;
    const int maps = static_cast<int>(p.primary / p.groups);
    first_map = group * maps + blockIdx.y % c.plan.blocks_per_group * Channels;
    end_map = (group + 1) * maps;
    carve<T, Last, K, Channels>(arena, static_cast<int>(p.multiplier), &s);
  }

  // Constants of this block's channels, and the table of places.
  FIF_DEVICE void prepare() {
    const int multiplier = static_cast<int>(p.multiplier);
    for (int i = threadIdx.x; i < kPositions; i += kThreads) {
      const int h = row0 + i / columns % rows, w = column0 + i % columns;
      const int64_t n = image + i / (columns * rows);
      const bool inside = i < places && n < p.batch && h >= 0 && h < p.height && w >= 0 && w < p.width;
      const int64_t from = (h * p.in_width + w) * p.stride, to = h * p.width + w;
      s.source[i] = inside ? n * call.x.batch + from * (Last ? call.x.step : 1) : -1;
      s.target[i] = inside ? n * call.out.batch + to * (Last ? call.out.step : 1) : -1;
    }
    for (int i = threadIdx.x; i < Channels; i += kThreads) {
      const float2 v = first_map + i < end_map ? frozen_scale_shift<T>(call.primary, first_map + i) : float2{0.f, 0.f};
      s.norm1[i] = v.x;
      s.norm1[Channels + i] = v.y;
    }
    // Cheap map number t of channel i at [t][i].
    for (int i = threadIdx.x; i < Channels * multiplier; i += kThreads) {
      const int map = first_map + i % Channels, t = i / Channels;
      const float2 v =
          map < end_map ? frozen_scale_shift<T>(call.cheap, int64_t(map) * multiplier + t) : float2{0.f, 0.f};
      s.norm2[i] = v.x;
      s.norm2[Channels * multiplier + i] = v.y;
    }
    for (int i = threadIdx.x; i < Channels * multiplier * K * K; i += kThreads) {
      const int map = first_map + i % Channels, t = i / Channels % multiplier, tap = i / (Channels * multiplier);
      const T* weight = static_cast<const T*>(call.cheap_weight);
      s.taps[i] = map < end_map ? to_float(weight[(int64_t(map) * multiplier + t) * K * K + tap]) : 0.f;
    }
  }

  // Sums of this thread.
  template <class S>
  FIF_DEVICE void product(S& sums) {
    const int reduced = static_cast<int>(p.in_channels / p.groups), rounded = (places + 15) & ~15;
    const T* x = static_cast<const T*>(call.x.data) + int64_t(group) * reduced * (Last ? 1 : call.x.step);
    const T* weight = static_cast<const T*>(call.primary_weight);
    multiply_chunks(sums, s.stages, reduced, [&](int stage, int chunk) {
      with_vector<T>(call.plan.vector, [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        const auto from = [&](int place, int c) -> const T* {
          if (s.source[place] < 0 || chunk + c >= reduced) return nullptr;
          return x + s.source[place] + (chunk + c) * (Last ? 1 : call.x.step);
        };
        if constexpr (Last)
          copy_rows<V, Row::kInput>(s.stages.input(stage), rounded, kChunk / V, x, from);
        else
          copy_rows<V, Row::kInput>(s.stages.input(stage), kChunk, rounded / V, x,
                                    [&](int c, int place) { return from(place, c); });
      });
      copy_weight<T, Row::kWeight>(s.stages.weight(stage), weight, reduced, Channels, kChunk, first_map, end_map, chunk,
                                   reduced);
    });
  }

  // ---- depthwise

  // Four channels from c on, column w of the tile, two rows of an image that starts at place `first_place`: cheap maps
  // number t of each.
  FIF_DEVICE void store_quads(int c, int w, int strip, int first_place, int t) {
    constexpr int kRows = 2, Q = 4;
    const int multiplier = static_cast<int>(p.multiplier);
    float tap[K * K][Q], sum[kRows][Q] = {};
    if constexpr (K == 3) {  // larger kernels would not leave registers for anything else
      FIF_UNROLL
      for (int k = 0; k < K * K; ++k) load_quad(s.taps + (k * multiplier + t) * Channels + c, tap[k]);
    }
    FIF_UNROLL
    for (int row = 0; row < kRows + K - 1; ++row) {
      const int r = strip * kRows + row;
      if (r >= rows) break;
      FIF_UNROLL
      for (int dx = 0; dx < K; ++dx) {
        float v[Q];
        load_quad(s.stages.maps + (first_place + r * columns + w + call.plan.pad - R + dx) * Row::kMap + c, v);
        FIF_UNROLL
        for (int dy = 0; dy < K; ++dy) {
          if (row - dy < 0 || row - dy >= kRows) continue;
          if constexpr (K != 3) load_quad(s.taps + ((dy * K + dx) * multiplier + t) * Channels + c, tap[dy * K + dx]);
          FIF_UNROLL
          for (int q = 0; q < Q; ++q) sum[row - dy][q] = fmaf(v[q], tap[dy * K + dx][q], sum[row - dy][q]);
        }
      }
    }
    float scale[Q], shift[Q];
    load_quad(s.norm2 + t * Channels + c, scale);
    load_quad(s.norm2 + (multiplier + t) * Channels + c, shift);
    const int left = end_map - first_map - c;  // channels from c on that exist
    FIF_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const int r = strip * kRows + row, place = first_place + (r + R) * columns + w + call.plan.pad;
      if (r >= call.plan.tile_h || s.target[place] < 0) break;
      T* to = static_cast<T*>(call.out.data) + s.target[place];
      if (t == 0 && p.splice) put_quad(to + first_map + c, 1, left, vec_load<Q>(s.stages.maps + place * Row::kMap + c));
      Vec<T, Q> z;
      FIF_UNROLL
      for (int q = 0; q < Q; ++q) z[q] = from_float<T>(activate(fmaf(sum[row][q], scale[q], shift[q]), p.activation));
      const int64_t first = p.kept_primary() + int64_t(first_map + c) * multiplier + t;
      const int64_t kept = ceil_div(p.out_channels - first, multiplier);
      put_quad(to + first, multiplier, left < kept ? left : static_cast<int>(kept), z);
    }
  }

  // Channel c, column w of the tile, four rows of an image that starts at place `first_place`: cheap map number t.
  FIF_DEVICE void store_rows(int c, int w, int strip, int first_place, int t) {
    constexpr int kRows = 4;
    const int multiplier = static_cast<int>(p.multiplier);
    const T* map = s.stages.maps + c * Row::kMap + first_place;
    float sum[kRows] = {};
    FIF_UNROLL
    for (int row = 0; row < kRows + K - 1; ++row) {
      const int r = strip * kRows + row;
      if (r >= rows) break;
      FIF_UNROLL
      for (int dx = 0; dx < K; ++dx) {
        const float v = to_float(map[r * columns + w + call.plan.pad - R + dx]);
        FIF_UNROLL
        for (int dy = 0; dy < K; ++dy)
          if (row - dy >= 0 && row - dy < kRows)
            sum[row - dy] = fmaf(v, s.taps[((dy * K + dx) * multiplier + t) * Channels + c], sum[row - dy]);
      }
    }
    const float scale = s.norm2[t * Channels + c], shift = s.norm2[(multiplier + t) * Channels + c];
    const int64_t channel = p.kept_primary() + int64_t(first_map + c) * multiplier + t;
    FIF_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const int r = strip * kRows + row, place = (r + R) * columns + w + call.plan.pad;
      if (r >= call.plan.tile_h || s.target[first_place + place] < 0) break;
      T* out = static_cast<T*>(call.out.data) + s.target[first_place + place];
      if (t == 0 && p.splice) out[(first_map + c) * call.out.step] = map[place];
      if (channel < p.out_channels)
        out[channel * call.out.step] = from_float<T>(activate(fmaf(sum[row], scale, shift), p.activation));
    }
  }

  // Neighbouring threads write neighbouring channels (NHWC) or pixels (NCHW).
  FIF_DEVICE void depthwise() {
    const int width = call.plan.tile_w, multiplier = static_cast<int>(p.multiplier);
    const int left = end_map - first_map, channels = left < Channels ? left : Channels, per_image = rows * columns;
    if constexpr (Last) {
      const int quads = (channels + 3) / 4, strips = (call.plan.tile_h + 1) / 2, one = quads * width * strips;
      const int items = one * call.plan.images;
      for (int i = threadIdx.x; i < items * multiplier; i += kThreads) {
        const int item = i % items, of_image = item % one;
        store_quads(of_image % quads * 4, of_image / quads % width, of_image / (quads * width), item / one * per_image,
                    i / items);
      }
    } else {
      const int strips = (call.plan.tile_h + 3) / 4, one = width * strips * call.plan.images, items = channels * one;
      for (int i = threadIdx.x; i < items * multiplier; i += kThreads) {
        const int item = i % items, of_channel = item % one;
        store_rows(item / one, of_channel % width, of_channel / width % strips,
                   of_channel / (width * strips) * per_image, i / items);
      }
    }
  }
};

template <class T, bool Last, int K, int Channels, bool Tf32>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor<T, Channels, Tf32>())
    infer_kernel(const __grid_constant__ InferCall call) {
  using Row = Rows<T, Last, Channels>;
  FIF_SHARED(shared);
  SharedArena arena(shared);
  Block<T, Last, K, Channels> block(call, arena);
  block.prepare();
  __syncthreads();
  const Arrays<T, Last, Channels>& s = block.s;
  Sums<T, Last, Channels, false, Tf32> sums(block.places);
  block.product(sums);
  each_sum(sums, block.places, [&](int place, int channel, float sum) {
    const float v = activate(fmaf(sum, s.norm1[channel], s.norm1[Channels + channel]), call.p.activation);
    s.stages.maps[Last ? place * Row::kMap + channel : channel * Row::kMap + place] =
        from_float<T>(s.target[place] >= 0 ? v : 0.f);
  });
  __syncthreads();
  block.depthwise();
}

template <class T, bool Last, int K, int Channels>
int shared_bytes(const Problem& p) {
  Arrays<T, Last, Channels> unused;
  return bytes_of([&](Sizer& sizer) { carve<T, Last, K, Channels>(sizer, static_cast<int>(p.multiplier), &unused); });
}

template <class T, bool Last, int K, int Channels, bool Tf32>
cudaError_t launch(const InferCall& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(call.plan.blocks_x), call.plan.blocks_y);
  return FIF_LAUNCH((infer_kernel<T, Last, K, Channels, Tf32>), grid, kThreads,
                    (shared_bytes<T, Last, K, Channels>(call.p)), stream, call);
}

template <class T, bool Last, int K, bool Tf32>
cudaError_t launch(const InferCall& call, cudaStream_t stream) {
  switch (call.plan.channels) {
    case 16: return launch<T, Last, K, 16, Tf32>(call, stream);
    case 32: return launch<T, Last, K, 32, Tf32>(call, stream);
    default: return launch<T, Last, K, 64, Tf32>(call, stream);
  }
}

}  // namespace

bool plan_inference(InferCall& call, const Device& device) {
  const Problem& p = call.p;
  const auto shared = [&](int channels) -> int64_t {
    return with_format(p, [&](auto format) -> int64_t {
      using T = typename decltype(format)::type;
      constexpr bool kLast = decltype(format)::kLast;
      const auto of = [&](auto kernel) {
        constexpr int K = decltype(kernel)::value;
        return channels == 16 ? shared_bytes<T, kLast, K, 16>(p)
            : channels == 32  ? shared_bytes<T, kLast, K, 32>(p)
                              : shared_bytes<T, kLast, K, 64>(p);
      };
      return p.kernel == 3 ? of(std::integral_constant<int, 3>{}) : of(std::integral_constant<int, 5>{});
    });
  };
  call.plan = plan_inference(p, call.x, device, shared);
  return shared(call.plan.channels) <= device.shared_per_block;
}

cudaError_t launch_inference(const InferCall& call, cudaStream_t stream) {
  return with_format(call.p, [&](auto format) {
    using T = typename decltype(format)::type;
    constexpr bool kLast = decltype(format)::kLast;
    const bool small = call.p.kernel == 3;
    if constexpr (sizeof(T) == 4)
      if (call.p.tf32) return small ? launch<T, kLast, 3, true>(call, stream) : launch<T, kLast, 5, true>(call, stream);
    return small ? launch<T, kLast, 3, false>(call, stream) : launch<T, kLast, 5, false>(call, stream);
  });
}

}  // namespace fif::gpu
