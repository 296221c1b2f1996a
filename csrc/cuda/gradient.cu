// Backward through the primary convolution, in two launches of blocks with different roles. The gradient of the raw
// maps is never stored: it is coefficient[0] * through + coefficient[1] * raw + coefficient[2], channel by channel.
//   1. weight_kernel: partial sums of the primary weight's gradient, 64 maps by 64 channels over a share of all pixels;
//      and, from the sums that backward.cu left, the coefficients and the primary normalisation's gradients.
//   2. input_kernel: gradient of the input, a product like the forward one; and the final sums of both weights'
//      gradients, in one order.
// Bytes per pixel: 2 M + C read in the first, 2 M read and C written in the second, times the blocks of 64 channels.
// Without a primary convolution of ours, draw_kernel writes the gradient of raw as that of the input.
#include "cheap.h"
#include "product.h"
#include "sizer.h"

namespace fif::gpu {
namespace {

constexpr int kTile = 64;   // maps, and channels, of a block of weight_kernel
constexpr int kShare = 64;  // pixels of one of its stages

// The three coefficients of one primary map, by a whole warp.
template <class T>
FIF_DEVICE void coefficients_of(const BackwardCall& call, int64_t map, float (&v)[3], float (&gradient)[2]) {
  const BackwardNorm& n = call.primary;
  const float plain = merged_sum(n.sums, map, 2, 0), dot = merged_sum(n.sums, map, 2, 1);
  gradient[0] = dot, gradient[1] = plain;
  const float mean = n.stats[map], rstd = n.stats[n.channels + map];
  const float scale = rstd * value_at<T>(n.norm.weight, map, n.norm.is_float, 1.f);
  v[0] = scale, v[1] = v[2] = 0.f;
  if (n.batch) {
    const float count = static_cast<float>(call.p.batch * call.p.pixels());
    v[1] = -scale * rstd * (dot / count);
    v[2] = -scale * (plain / count) - v[1] * mean;
  }
}

// V elements of the gradient of raw to shared memory. Their coefficients lie `step` apart: 1 along channels, else 0.
template <int V, class T>
FIF_DEVICE void copy_gradient(T* to, const T* through, const T* raw, const float* const (&coefficient)[3], int step) {
  const Vec<T, V> g = vec_load_const<V>(through), r = vec_load_const<V>(raw);
  Vec<T, V> sum;
  FIF_UNROLL
  for (int i = 0; i < V; ++i) {
    const int c = i * step;
    sum[i] = from_float<T>(
        fmaf(to_float(g[i]), coefficient[0][c], fmaf(to_float(r[i]), coefficient[1][c], coefficient[2][c])));
  }
  vec_store(to, sum);
}

template <int V, class T>
FIF_DEVICE void clear(T* to) {
  Vec<T, V> zero;
  FIF_UNROLL
  for (int i = 0; i < V; ++i) zero[i] = from_float<T>(0.f);
  vec_store(to, zero);
}

// ---- 1.

// Both factors of one stage: [pixels][channels] (NHWC) or [channels][pixels].
template <class T>
struct Share {
  static constexpr int kPitch = kTile + 16 / sizeof(T);
  static_assert(kTile == kShare);
};

template <class T>
struct WeightArrays {
  float* coefficients;         // [3][kTile]
  int64_t *map_at, *input_at;  // [2 stages][kShare] places in raw and in x, -1 behind the last
  T *draws, *inputs;           // two stages of [kShare][kPitch]

  FIF_DEVICE T* draw(int stage) const { return draws + stage * kShare * Share<T>::kPitch; }
  FIF_DEVICE T* input(int stage) const { return inputs + stage * kShare * Share<T>::kPitch; }
};

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, class Arena>
FIF_HOST_DEVICE void carve_weight(Arena& arena, WeightArrays<T>* s) {
  s->coefficients = arena.template take<float>(3 * kTile);
  s->map_at = arena.template take<int64_t>(2 * kShare);
  s->input_at = arena.template take<int64_t>(2 * kShare);
  s->draws = arena.template take<T>(2 * kShare * Share<T>::kPitch);
  s->inputs = arena.template take<T>(2 * kShare * Share<T>::kPitch);
}

// Sums of 64 maps by 64 channels on tensor cores: eight warps of 16 maps by 32 channels.
template <class T, bool Last, bool Tf32>
class WeightSum {
  static constexpr int kPitch = Share<T>::kPitch, kStep = sizeof(T) == 2 ? 16 : 8;
  float sum_[4][4] = {};
  const int g_, t_, map_, channel_;

  FIF_DEVICE static int offset(int channel, int pixel) {
    return Last ? pixel * kPitch + channel : channel * kPitch + pixel;
  }

 public:
  FIF_DEVICE WeightSum()
      : g_(lane_id() / 4), t_(lane_id() % 4), map_(warp_id() / 2 * 16), channel_(warp_id() % 2 * 32) {}

  FIF_DEVICE void add(const T* draw, const T* input) {
    const int lane = lane_id();
    FIF_UNROLL_2
    for (int k = 0; k < kShare; k += kStep) {
      uint32_t a[4], b[4][2];
      if constexpr (Tf32) {
        FIF_UNROLL
        for (int e = 0; e < 4; ++e) a[e] = to_tf32(draw[offset(map_ + g_ + e % 2 * 8, k + t_ + e / 2 * 4)]);
        FIF_UNROLL
        for (int i = 0; i < 4; ++i) FIF_UNROLL
        for (int e = 0; e < 2; ++e) b[i][e] = to_tf32(input[offset(channel_ + i * 8 + g_, k + t_ + e * 4)]);
        FIF_UNROLL
        for (int i = 0; i < 4; ++i) mma_tf32(sum_[i], a, b[i]);
      } else {
        if constexpr (Last)
          ldmatrix_x4_trans(a, draw + offset(map_ + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8));
        else
          ldmatrix_x4(a, draw + offset(map_ + lane % 16, k + lane / 16 * 8));
        FIF_UNROLL
        for (int i = 0; i < 4; i += 2) {
          uint32_t r[4];
          if constexpr (Last)
            ldmatrix_x4_trans(r, input + offset(channel_ + (i + lane / 16) * 8, k + lane % 16));
          else
            ldmatrix_x4(r, input + offset(channel_ + (i + lane / 16) * 8 + lane % 8, k + lane / 8 % 2 * 8));
          b[i][0] = r[0], b[i][1] = r[1], b[i + 1][0] = r[2], b[i + 1][1] = r[3];
        }
        FIF_UNROLL
        for (int i = 0; i < 4; ++i) mma<T>(sum_[i], a, b[i]);
      }
    }
  }
  // use(map, channel, sum) for all that this thread holds
  template <class Use>
  FIF_DEVICE void each(Use use) const {
    FIF_UNROLL
    for (int i = 0; i < 4; ++i) FIF_UNROLL
    for (int e = 0; e < 4; ++e) use(map_ + g_ + e / 2 * 8, channel_ + i * 8 + t_ * 2 + e % 2, sum_[i][e]);
  }
};

// f32, exact: a thread takes 4 maps by 4 channels.
template <bool Last>
class WeightSum<float, Last, false> {
  static constexpr int kPitch = Share<float>::kPitch;
  float sum_[4][4] = {};
  const int map_, channel_;

  FIF_DEVICE static void load(const float* from, int channel, int pixel, float (&v)[4]) {
    if constexpr (Last) {
      load_quad(from + pixel * kPitch + channel, v);
    } else {
      FIF_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = from[(channel + i) * kPitch + pixel];
    }
  }

 public:
  FIF_DEVICE WeightSum() : map_(threadIdx.x / 16 * 4), channel_(threadIdx.x % 16 * 4) {}

  FIF_DEVICE void add(const float* draw, const float* input) {
    for (int k = 0; k < kShare; ++k) {
      float a[4], b[4];
      load(draw, map_, k, a);
      load(input, channel_, k, b);
      FIF_UNROLL
      for (int i = 0; i < 4; ++i) FIF_UNROLL
      for (int j = 0; j < 4; ++j) sum_[i][j] = fmaf(a[i], b[j], sum_[i][j]);
    }
  }
  template <class Use>
  FIF_DEVICE void each(Use use) const {
    FIF_UNROLL
    for (int i = 0; i < 4; ++i) FIF_UNROLL
    for (int j = 0; j < 4; ++j) use(map_ + i, channel_ + j, sum_[i][j]);
  }
};

// Blocks along x: shares of the pixels; along y: tiles of channels, then of maps, then groups.
template <class T, bool Last, bool Tf32>
__global__ void __launch_bounds__(kThreads, 2) weight_kernel(const __grid_constant__ BackwardCall call) {
  constexpr int kPitch = Share<T>::kPitch;
  const Problem& p = call.p;
  const GradientPlan& plan = call.gradient;
  FIF_SHARED(shared);
  SharedArena arena(shared);
  WeightArrays<T> s;
  carve_weight<T>(arena, &s);

  const int wide = static_cast<int>(p.primary / p.groups);
  const int reduced = static_cast<int>(p.in_channels / p.groups);
  const int channel_tile = blockIdx.y % plan.channel_tiles;
  const int map_tile = blockIdx.y / plan.channel_tiles % plan.map_tiles;
  const int group = blockIdx.y / (plan.channel_tiles * plan.map_tiles);
  const int first_map = group * wide + map_tile * kTile, end_map = (group + 1) * wide;
  const int first_channel = channel_tile * kTile;

  const bool writes = blockIdx.x == 0 && channel_tile == 0;
  for (int c = warp_id(); c < kTile; c += kWarps) {
    const int map = first_map + c;
    float v[3] = {}, gradient[2];
    if (map < end_map) {
      coefficients_of<T>(call, map, v, gradient);
      if (writes && lane_id() == 0) {
        FIF_UNROLL
        for (int i = 0; i < 3; ++i) call.coefficients[i * p.primary + map] = v[i];
        call.primary.gradient[map] = gradient[0];
        call.primary.gradient[p.primary + map] = gradient[1];
      }
    }
    if (lane_id() == 0) {
      FIF_UNROLL
      for (int i = 0; i < 3; ++i) s.coefficients[i * kTile + c] = v[i];
    }
  }
  if (plan.splits == 0) return;  // the weight's gradient is not wanted
  __syncthreads();

  const T* through = static_cast<const T*>(call.through.data) + first_map * (Last ? 1 : call.through.step);
  const T* raw = static_cast<const T*>(call.raw.data) + first_map * (Last ? 1 : call.raw.step);
  const int64_t input_first = int64_t(group) * reduced + first_channel;
  const T* x = static_cast<const T*>(call.x.data) + input_first * (Last ? 1 : call.x.step);
  const int64_t shares = (p.batch * p.pixels() + kShare - 1) / kShare;
  const int64_t begin = shares * blockIdx.x / plan.splits, end = shares * (blockIdx.x + 1) / plan.splits;
  const int maps = end_map - first_map < kTile ? end_map - first_map : kTile;
  const int channels = reduced - first_channel < kTile ? reduced - first_channel : kTile;

  const auto load = [&](int stage, int64_t share) {
    int64_t *map_at = s.map_at + stage * kShare, *input_at = s.input_at + stage * kShare;
    if (threadIdx.x < kShare) {
      const int64_t place = share * kShare + threadIdx.x, image = place / p.pixels(), pixel = place % p.pixels();
      const bool exists = image < p.batch;
      const int64_t from = pixel / p.width * p.stride * p.in_width + pixel % p.width * p.stride;
      map_at[threadIdx.x] = exists ? image * call.raw.batch + pixel * (Last ? call.raw.step : 1) : -1;
      input_at[threadIdx.x] = exists ? image * call.x.batch + from * (Last ? call.x.step : 1) : -1;
    }
    __syncthreads();
    with_vector<T>(plan.input_vector, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      copy_rows<V, kPitch>(s.input(stage), kShare, kShare / V, x, [&](int row, int column) -> const T* {
        const int channel = Last ? column : row;
        const int64_t at = input_at[Last ? row : column];
        return at < 0 || channel >= channels ? nullptr : x + at + channel * (Last ? 1 : call.x.step);
      });
    });
    cp_async_commit();
    with_vector<T>(plan.map_vector, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      FIF_UNROLL_2
      for (int i = threadIdx.x; i < kShare * kShare / V; i += kThreads) {
        const int row = i / (kShare / V), column = i % (kShare / V) * V, map = Last ? column : row;
        const int64_t at = map_at[Last ? row : column];
        T* to = s.draw(stage) + row * kPitch + column;
        if (at < 0 || map >= maps) {
          clear<V>(to);
          continue;
        }
        const int64_t from = at + map * (Last ? 1 : call.raw.step);
        const float* const coefficient[3] = {s.coefficients + map, s.coefficients + kTile + map,
                                             s.coefficients + 2 * kTile + map};
        copy_gradient<V>(to, through + from, raw + from, coefficient, Last ? 1 : 0);
      }
    });
  };
  WeightSum<T, Last, Tf32> sum;
  if (begin < end) load(0, begin);
  for (int64_t share = begin; share < end; ++share) {
    const int stage = static_cast<int>(share - begin) % 2;
    if (share + 1 < end) {
      load(1 - stage, share + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    sum.add(s.draw(stage), s.input(stage));
    __syncthreads();
  }
  float* sums = call.primary_weight_sums + blockIdx.x * p.primary * reduced;
  sum.each([&](int map, int channel, float v) {
    if (map < maps && channel < channels) sums[int64_t(first_map + map) * reduced + first_channel + channel] = v;
  });
}

// ---- 2.

// Element i of a weight's gradient: the sum of what `count` blocks found.
template <class T>
FIF_DEVICE void sum_up(void* gradient, const float* sums, int count, int64_t size, int64_t i) {
  float sum = 0.f;
  for (int block = 0; block < count; ++block) sum += sums[block * size + i];
  static_cast<T*>(gradient)[i] = from_float<T>(sum);
}

template <class T>
FIF_DEVICE void sum_weights(const BackwardCall& call, int block) {
  const int64_t cheap = call.p.cheap() * call.p.kernel * call.p.kernel;
  const int64_t primary = call.gradient.splits > 0 ? call.p.primary * (call.p.in_channels / call.p.groups) : 0;
  const int64_t i = int64_t(block) * kThreads + threadIdx.x;
  if (i < cheap)
    sum_up<T>(call.grad_cheap_weight, call.cheap_weight_sums, call.plan.blocks_x, cheap, i);
  else if (i < cheap + primary)
    sum_up<T>(call.grad_primary_weight, call.primary_weight_sums, call.gradient.splits, primary, i - cheap);
}

template <class T, bool Last, int Channels>
struct InputArrays {
  int64_t *source, *target;  // [places] of raw, -1 where there is none; of the input, -1 behind the last
  Stages<T, Rows<T, Last, Channels, true>> stages;
};

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, bool Last, int Channels, class Arena>
FIF_HOST_DEVICE void carve_input(Arena& arena, InputArrays<T, Last, Channels>* s) {
  s->source = arena.template take<int64_t>(kPositions);
  s->target = arena.template take<int64_t>(kPositions);
  carve_stages(arena, &s->stages);
}

// Blocks: of channels, for each tile of the input's pixels; then those that sum up weights.
template <class T, bool Last, int Channels, bool Tf32>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor<T, Channels, Tf32>())
    input_kernel(const __grid_constant__ BackwardCall call) {
  using R = Rows<T, Last, Channels, true>;
  const Problem& p = call.p;
  const GradientPlan& plan = call.gradient;
  if (blockIdx.x >= plan.input_blocks) return sum_weights<T>(call, static_cast<int>(blockIdx.x - plan.input_blocks));
  FIF_SHARED(shared);
  SharedArena arena(shared);
  InputArrays<T, Last, Channels> s;
  carve_input<T, Last, Channels>(arena, &s);

  const int reduced = static_cast<int>(p.primary / p.groups), wide = static_cast<int>(p.in_channels / p.groups);
  const int block = static_cast<int>(blockIdx.x % plan.blocks_y), group = block / plan.blocks_per_group;
  const int first = block % plan.blocks_per_group * Channels, kept = wide - first < Channels ? wide - first : Channels;
  const int64_t tile = blockIdx.x / plan.blocks_y, pixels = p.in_pixels();
  for (int i = threadIdx.x; i < kPositions; i += kThreads) {
    const int64_t place = tile * kPositions + i, image = place / pixels, pixel = place % pixels;
    const int64_t h = pixel / p.in_width, w = pixel % p.in_width;
    const bool exists = image < p.batch, mapped = exists && h % p.stride == 0 && w % p.stride == 0;
    const int64_t map_pixel = h / p.stride * p.width + w / p.stride;
    s.source[i] = mapped ? image * call.raw.batch + map_pixel * (Last ? call.raw.step : 1) : -1;
    s.target[i] = exists ? image * call.grad_x.batch + pixel * (Last ? call.grad_x.step : 1) : -1;
  }
  __syncthreads();

  const int64_t first_map = int64_t(group) * reduced, left = p.batch * pixels - tile * kPositions;
  const int places = left < kPositions ? static_cast<int>(left) : kPositions, rounded = (places + 15) & ~15;
  const T* through = static_cast<const T*>(call.through.data) + first_map * (Last ? 1 : call.through.step);
  const T* raw = static_cast<const T*>(call.raw.data) + first_map * (Last ? 1 : call.raw.step);
  const T* weight = static_cast<const T*>(call.primary_weight) + first_map * wide;
  const float* coefficients = call.coefficients + first_map;
  Sums<T, Last, Channels, true, Tf32> sums(places);
  multiply_chunks(sums, s.stages, reduced, [&](int stage, int chunk) {
    copy_weight<T, R::kWeight>(s.stages.weight(stage), weight, wide, kChunk, Channels, chunk, reduced, first, wide);
    with_vector<T>(plan.map_vector, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const int pieces = (Last ? kChunk : rounded) / V, count = (Last ? rounded : kChunk) * pieces;
      FIF_UNROLL_2
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int row = i / pieces, column = i % pieces * V, map = chunk + (Last ? column : row);
        const int64_t at = s.source[Last ? row : column];
        T* to = s.stages.input(stage) + row * R::kInput + column;
        if (at < 0 || map >= reduced) {
          clear<V>(to);
          continue;
        }
        const int64_t from = at + map * (Last ? 1 : call.raw.step);
        const float* const coefficient[3] = {coefficients + map, coefficients + p.primary + map,
                                             coefficients + 2 * p.primary + map};
        copy_gradient<V>(to, through + from, raw + from, coefficient, Last ? 1 : 0);
      }
    });
  });
  each_sum(sums, places, [&](int place, int c, float sum) {
    s.stages.maps[Last ? place * R::kMap + c : c * R::kMap + place] = from_float<T>(sum);
  });
  __syncthreads();
  T* grad_x = static_cast<T*>(call.grad_x.data) + (int64_t(group) * wide + first) * (Last ? 1 : call.grad_x.step);
  with_vector<T>(plan.store_vector, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const int pieces = (Last ? kept : places) / V, count = (Last ? places : kept) * pieces;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int row = i / pieces, column = i % pieces * V;
      const int64_t to = Last ? s.target[row] + column : row * call.grad_x.step + s.target[column];
      vec_store(grad_x + to, vec_load<V>(s.stages.maps + row * R::kMap + column));
    }
  });
}

// The gradient of raw itself, where another convolution made it. Blocks along y: of channels; one more sums up weights.
template <class T, bool Last>
__global__ void __launch_bounds__(kThreads, 2) draw_kernel(const __grid_constant__ BackwardCall call) {
  using B = CheapBlock<T, Last, 3>;
  if (blockIdx.y == call.plan.blocks_y) {
    const int64_t size = call.p.cheap() * call.p.kernel * call.p.kernel;
    for (int64_t i = blockIdx.x; i * kThreads < size; i += gridDim.x) sum_weights<T>(call, static_cast<int>(i));
    return;
  }
  if (call.grad_x.data == nullptr) return;
  B block(call.p, call.plan);
  float v[3][B::kSlots] = {};
  FIF_UNROLL
  for (int i = 0; i < 3; ++i) FIF_UNROLL
  for (int q = 0; q < B::kSlots; ++q)
    if (q < block.present) v[i][q] = call.coefficients[i * call.p.primary + block.first_map + block.channel + q];
  const Input through{call.through.data, call.through.batch, call.through.step};
  for (int64_t tile = blockIdx.x; tile < call.plan.tiles; tile += gridDim.x) {
    block.place(tile);
    block.template each_strip<1>(0, [&](int row, int column, int) {
      const int count = block.count(row, column);
      if (count == 0) return;
      float g[kQuad], raw[kQuad];
      get_quad(block.primary(through, row, column), 1, count, g);
      get_quad(block.primary(call.raw, row, column), 1, count, raw);
      FIF_UNROLL
      for (int q = 0; q < kQuad; ++q) {
        const int c = B::slot(q);
        g[q] = fmaf(g[q], v[0][c], fmaf(raw[q], v[1][c], v[2][c]));
      }
      put_quad(block.template address<T>(call.grad_x, block.first_map + block.channel, row, column), 1, count, g);
    });
  }
}

// ---- launches

template <class T, bool Last, bool Tf32>
cudaError_t launch_weight(const BackwardCall& call, cudaStream_t stream) {
  WeightArrays<T> unused;
  const int shared = bytes_of([&](Sizer& sizer) { carve_weight<T>(sizer, &unused); });
  const GradientPlan& plan = call.gradient;
  const dim3 grid(plan.splits > 0 ? plan.splits : 1,
                  (plan.splits > 0 ? plan.channel_tiles : 1) * plan.map_tiles * static_cast<unsigned>(call.p.groups));
  return FIF_LAUNCH((weight_kernel<T, Last, Tf32>), grid, kThreads, shared, stream, call);
}

template <class T, bool Last, int Channels, bool Tf32>
cudaError_t launch_input(const BackwardCall& call, cudaStream_t stream) {
  InputArrays<T, Last, Channels> unused;
  const int shared = bytes_of([&](Sizer& sizer) { carve_input<T, Last, Channels>(sizer, &unused); });
  const dim3 grid(static_cast<unsigned>(call.gradient.input_blocks + call.gradient.sum_blocks));
  return FIF_LAUNCH((input_kernel<T, Last, Channels, Tf32>), grid, kThreads, shared, stream, call);
}

template <class T, bool Last, bool Tf32>
cudaError_t launch(const BackwardCall& call, cudaStream_t stream) {
  const cudaError_t error = launch_weight<T, Last, Tf32>(call, stream);
  if (error != cudaSuccess) return error;
  if (!call.p.has_primary) {
    const dim3 grid(call.plan.blocks_x, call.plan.blocks_y + 1);
    return FIF_LAUNCH((draw_kernel<T, Last>), grid, kThreads, 0, stream, call);
  }
  return call.gradient.channels == 64 ? launch_input<T, Last, 64, Tf32>(call, stream)
                                      : launch_input<T, Last, 32, Tf32>(call, stream);
}

}  // namespace

cudaError_t launch_primary_gradients(const BackwardCall& call, cudaStream_t stream) {
  return with_format(call.p, [&](auto format) {
    using T = typename decltype(format)::type;
    constexpr bool kLast = decltype(format)::kLast;
    if constexpr (sizeof(T) == 4)
      if (call.p.tf32) return launch<T, kLast, true>(call, stream);
    return launch<T, kLast, false>(call, stream);
  });
}

}  // namespace fif::gpu
