// Training forward in at most three launches, all from the primary maps before normalisation ("raw"), which backward
// wants anyway:
//   1. raw_kernel: raw = primary convolution (+ bias), and the moments of each primary map. Bytes per pixel: C read,
//      M written. Without a primary convolution of ours, moments_kernel reads raw instead.
//   2. moments_kernel: normalises, activates and convolves a tile in shared memory, for the moments of the cheap maps
//      alone. M read.
//   3. apply_kernel: the same again, now with all statistics known; both halves go into the output. M read, M + N
//      written.
// Launch 2 is left out where the cheap normalisation is frozen. A block leaves one partial per channel, and every block
// of the next launch adds up those of its channels, in one order: no atomics. Limit: memory.
#include "cheap.h"
#include "product.h"
#include "sizer.h"

namespace fif::gpu {
namespace {

// ---- 1.

template <class T, bool Last, int Channels>
struct RawArrays {
  int64_t *source, *target;  // [places] of x and of raw, -1 behind the last
  Stages<T, Rows<T, Last, Channels>> stages;
  float* parts;  // [3][sharers][channels], over the stages
};

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, bool Last, int Channels, class Arena>
FIF_HOST_DEVICE void carve_raw(Arena& arena, RawArrays<T, Last, Channels>* s) {
  s->source = arena.template take<int64_t>(kPositions);
  s->target = arena.template take<int64_t>(kPositions);
  const int start = arena.mark();
  carve_stages(arena, &s->stages);
  arena.rewind(start);
  s->parts = arena.template take<float>(3 * 32 * Channels);
}

// Pixels count through all images of the batch, so that small maps fill a tile.
template <bool Last>
FIF_DEVICE void list_places(const TrainCall& call, int64_t first, int64_t* source, int64_t* target) {
  const Problem& p = call.p;
  for (int i = threadIdx.x; i < kPositions; i += kThreads) {
    const int64_t place = first + i, image = place / p.pixels(), pixel = place % p.pixels();
    const bool exists = image < p.batch;
    const int64_t from = pixel / p.width * p.stride * p.in_width + pixel % p.width * p.stride;
    source[i] = exists ? image * call.x.batch + from * (Last ? call.x.step : 1) : -1;
    target[i] = exists ? image * call.raw.batch + pixel * (Last ? call.raw.step : 1) : -1;
  }
}

template <class T, bool Last, int Channels, bool Tf32>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor<T, Channels, Tf32>())
    raw_kernel(const __grid_constant__ TrainCall call) {
  using R = Rows<T, Last, Channels>;
  using S = Sums<T, Last, Channels, false, Tf32>;
  const Problem& p = call.p;
  const ProductPlan& plan = call.product;
  FIF_SHARED(shared);
  SharedArena arena(shared);
  RawArrays<T, Last, Channels> s;
  carve_raw<T, Last, Channels>(arena, &s);

  const int reduced = static_cast<int>(p.in_channels / p.groups), wide = static_cast<int>(p.primary / p.groups);
  const int group = blockIdx.y / plan.blocks_per_group;
  const int first = group * wide + blockIdx.y % plan.blocks_per_group * Channels, end = (group + 1) * wide;
  const T* x = static_cast<const T*>(call.x.data) + int64_t(group) * reduced * (Last ? 1 : call.x.step);
  T* raw = static_cast<T*>(call.raw.data) + first * (Last ? 1 : call.raw.step);
  const T* weight = static_cast<const T*>(call.primary_weight);
  const int kept = end - first < Channels ? end - first : Channels;

  Tally<S::kSlots> tally;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    list_places<Last>(call, tile * kPositions, s.source, s.target);
    __syncthreads();
    const int64_t left = p.batch * p.pixels() - tile * kPositions;
    const int places = left < kPositions ? static_cast<int>(left) : kPositions, rounded = (places + 15) & ~15;
    S sums(places);
    multiply_chunks(sums, s.stages, reduced, [&](int stage, int chunk) {
      with_vector<T>(plan.vector, [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        const auto from = [&](int place, int c) -> const T* {
          if (s.source[place] < 0 || chunk + c >= reduced) return nullptr;
          return x + s.source[place] + (chunk + c) * (Last ? 1 : call.x.step);
        };
        if constexpr (Last)
          copy_rows<V, R::kInput>(s.stages.input(stage), rounded, kChunk / V, x, from);
        else
          copy_rows<V, R::kInput>(s.stages.input(stage), kChunk, rounded / V, x,
                                  [&](int c, int place) { return from(place, c); });
      });
      copy_weight<T, R::kWeight>(s.stages.weight(stage), weight, reduced, Channels, kChunk, first, end, chunk, reduced);
    });
    float bias[S::kSlots];
    FIF_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int channel = first + sums.channel(slot);
      bias[slot] = channel < end ? value_at<T>(call.primary_bias, channel, call.bias_is_float, 0.f) : 0.f;
    }
    // Moments are those of the rounded values, which all that follows reads.
    FIF_UNROLL
    for (int v = 0; v < S::kValues; ++v) {
      const int place = sums.place(v);
      if (place >= places) continue;
      float value[S::kSlots];
      FIF_UNROLL
      for (int slot = 0; slot < S::kSlots; ++slot) {
        const T rounded_value = from_float<T>(sums.at(slot, v) + bias[slot]);
        value[slot] = to_float(rounded_value);
        const int c = sums.channel(slot);
        s.stages.maps[Last ? place * R::kMap + c : c * R::kMap + place] = rounded_value;
      }
      tally.add(value);
    }
    __syncthreads();
    with_vector<T>(plan.store_vector, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const int pieces = (Last ? kept : places) / V, count = (Last ? places : kept) * pieces;
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int row = i / pieces, column = i % pieces * V;
        const int64_t to = Last ? s.target[row] + column : row * call.raw.step + s.target[column];
        vec_store(raw + to, vec_load<V>(s.stages.maps + row * R::kMap + column));
      }
    });
    __syncthreads();
  }

  const S nothing(0);  // knows which channels this thread holds
  FIF_UNROLL
  for (int slot = 0; slot < S::kSlots; ++slot) {
    float* part = s.parts + nothing.sharer() * Channels + nothing.channel(slot);
    const Moments m = tally.moments(slot);
    part[0] = m.count, part[32 * Channels] = m.mean, part[64 * Channels] = m.m2;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < kept; c += kThreads) {
    Moments m;
    for (int w = 0; w < S::kSharers; ++w) {
      const float* part = s.parts + w * Channels + c;
      m.merge({part[0], part[32 * Channels], part[64 * Channels]});
    }
    const Partials& partials = call.primary.partials;
    *partial(partials, first + c, 3, 0, blockIdx.x) = m.count;
    *partial(partials, first + c, 3, 1, blockIdx.x) = m.mean;
    *partial(partials, first + c, 3, 2, blockIdx.x) = m.m2;
  }
}

// ---- 2.

// Blocks along y: blocks of channels, once for each of the S cheap maps of a primary one. With OfPrimary the moments
// are those of raw itself.
template <class T, bool Last, int K, bool OfPrimary>
__global__ void __launch_bounds__(kThreads, 2) moments_kernel(const __grid_constant__ TrainCall call) {
  using B = CheapBlock<T, Last, K>;
  FIF_SHARED(shared);
  SharedArena arena(shared);
  CheapArrays<T> s;
  carve_cheap<T, Last, K>(arena, call.p, call.plan, {1, -1}, &s);
  B block(call.p, call.plan);
  const int t = blockIdx.y / call.plan.blocks_y;

  if constexpr (!OfPrimary) {
    const bool writes = blockIdx.x == 0 && t == 0;
    block.each_primary(s.primary, [&](int64_t channel, float (&v)[kConstants]) {
      const float2 found = statistics<T>(call.primary, channel, writes);
      const float2 norm = scale_shift<T>(call.primary.norm, channel, found.x, found.y);
      v[kScale] = norm.x, v[kShift] = norm.y;
    });
    block.load_taps(call.cheap_weight, s.taps);
    __syncthreads();
  }
  const Taps<Last, K> taps = block.taps(s.taps, t);
  const Field<T, Last> y = block.field(s.y, 1);
  const Input raw{call.raw.data, call.raw.batch, call.raw.step};
  Tally<B::kSlots> tally;
  const auto add = [&](const float (&v)[kQuad], int count) {
    if constexpr (Last) {
      if (count > 0) tally.add(v);
    } else {
      FIF_UNROLL
      for (int q = 0; q < kQuad; ++q)
        if (q < count) tally.add({v[q]});
    }
  };
  for (int64_t tile = blockIdx.x; tile < call.plan.tiles; tile += gridDim.x) {
    block.place(tile);
    if constexpr (OfPrimary) {
      block.template each_strip<1>(0, [&](int row, int column, int) {
        const int count = block.count(row, column);
        float v[kQuad];
        if (count > 0) get_quad(block.primary(raw, row, column), 1, count, v), add(v, count);
      });
    } else {
      block.fill(raw, s, 1);
      __syncthreads();
      block.each_strip(0, [&](int row, int column, int rows) {
        float z[B::kRows][kQuad] = {};
        convolve<B::kRows, false>(y, taps, row, column, rows, z);
        FIF_UNROLL
        for (int r = 0; r < B::kRows; ++r)
          if (r < rows) add(z[r], block.count(row + r, column));
      });
      __syncthreads();
    }
  }

  FIF_UNROLL
  for (int slot = 0; slot < B::kSlots; ++slot) {
    const Moments m = tally.moments(slot);
    block.leave(s.parts, 0, slot, m.count);
    block.leave(s.parts, 1, slot, m.mean);
    block.leave(s.parts, 2, slot, m.m2);
  }
  __syncthreads();
  block.each_result([&](int c, int64_t map) {
    Moments m;
    for (int w = 0; w < block.workers; ++w)
      m.merge({*block.part(s.parts, 0, w, c), *block.part(s.parts, 1, w, c), *block.part(s.parts, 2, w, c)});
    const Partials& partials = OfPrimary ? call.primary.partials : call.cheap.partials;
    const int64_t channel = OfPrimary ? map : map * block.multiplier + t;
    *partial(partials, channel, 3, 0, blockIdx.x) = m.count;
    *partial(partials, channel, 3, 1, blockIdx.x) = m.mean;
    *partial(partials, channel, 3, 2, blockIdx.x) = m.m2;
  });
}

// ---- 3.

template <class T, bool Last, int K>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(const __grid_constant__ TrainCall call) {
  using B = CheapBlock<T, Last, K>;
  FIF_SHARED(shared);
  SharedArena arena(shared);
  CheapArrays<T> s;
  carve_cheap<T, Last, K>(arena, call.p, call.plan, {1, -1}, &s);
  B block(call.p, call.plan);

  const auto prepare = [&](const TrainNorm& n) {
    return [&](int64_t channel, float (&v)[kConstants]) {
      const float2 found = statistics<T>(n, channel, blockIdx.x == 0);
      const float2 norm = scale_shift<T>(n.norm, channel, found.x, found.y);
      v[kScale] = norm.x, v[kShift] = norm.y;
    };
  };
  block.each_primary(s.primary, prepare(call.primary));
  for (int t = 0; t < block.multiplier; ++t) block.each_cheap(s.cheap, t, prepare(call.cheap));
  block.load_taps(call.cheap_weight, s.taps);
  __syncthreads();
  const Field<T, Last> y = block.field(s.y, 1);
  const Input raw{call.raw.data, call.raw.batch, call.raw.step};
  for (int64_t tile = blockIdx.x; tile < call.plan.tiles; tile += gridDim.x) {
    block.place(tile);
    block.fill(raw, s, 1);
    __syncthreads();
    for (int t = 0; t < block.multiplier; ++t) {
      const Taps<Last, K> taps = block.taps(s.taps, t);
      float scale[B::kSlots], shift[B::kSlots];
      block.cheap_constants(s.cheap, kScale, t, scale);
      block.cheap_constants(s.cheap, kShift, t, shift);
      block.each_strip(0, [&](int row, int column, int rows) {
        float z[B::kRows][kQuad] = {};
        convolve<B::kRows, false>(y, taps, row, column, rows, z);
        FIF_UNROLL
        for (int r = 0; r < B::kRows; ++r) {
          const int count = r < rows ? block.count(row + r, column) : 0;
          if (count == 0) break;
          if (t == 0 && call.p.splice)
            put_quad(block.template address<T>(call.out, block.first_map + block.channel, row + r, column), 1, count,
                     vec_load<kQuad>(y.at(row + r, column)));
          const int64_t kept = block.cheap_count(t, row + r, column);
          if (kept == 0) continue;
          FIF_UNROLL
          for (int q = 0; q < kQuad; ++q)
            z[r][q] = activate(fmaf(z[r][q], scale[B::slot(q)], shift[B::slot(q)]), call.p.activation);
          put_quad(block.template address<T>(call.out, block.cheap_channel(t), row + r, column), block.cheap_stride(),
                   kept, z[r]);
        }
      });
    }
    __syncthreads();
  }
}

// ---- launches

template <class T, bool Last, int Channels>
cudaError_t launch_raw(const TrainCall& call, cudaStream_t stream) {
  RawArrays<T, Last, Channels> unused;
  const int shared = bytes_of([&](Sizer& sizer) { carve_raw<T, Last, Channels>(sizer, &unused); });
  const dim3 grid(call.product.blocks_x, call.product.blocks_y);
  if constexpr (sizeof(T) == 4)
    if (call.p.tf32) return FIF_LAUNCH((raw_kernel<T, Last, Channels, true>), grid, kThreads, shared, stream, call);
  return FIF_LAUNCH((raw_kernel<T, Last, Channels, false>), grid, kThreads, shared, stream, call);
}

template <class T, bool Last>
cudaError_t launch_raw(const TrainCall& call, cudaStream_t stream) {
  return call.product.channels == 64 ? launch_raw<T, Last, 64>(call, stream) : launch_raw<T, Last, 32>(call, stream);
}

template <class T, bool Last, int K>
cudaError_t launch_cheap(TrainCall call, cudaStream_t stream) {
  CheapArrays<T> unused;
  const int shared = bytes_of([&](Sizer& s) { carve_cheap<T, Last, K>(s, call.p, call.plan, {1, -1}, &unused); });
  const unsigned blocks = call.plan.blocks_x;
  if (call.primary.batch && !call.p.has_primary) {
    const dim3 grid(blocks, call.plan.blocks_y);
    const cudaError_t error = FIF_LAUNCH((moments_kernel<T, Last, K, true>), grid, kThreads, shared, stream, call);
    if (error != cudaSuccess) return error;
  }
  if (call.cheap.batch) {
    const dim3 grid(blocks, call.plan.blocks_y * static_cast<unsigned>(call.p.multiplier));
    const cudaError_t error = FIF_LAUNCH((moments_kernel<T, Last, K, false>), grid, kThreads, shared, stream, call);
    if (error != cudaSuccess) return error;
    call.primary.ready = true;
  }
  return FIF_LAUNCH((apply_kernel<T, Last, K>), dim3(blocks, call.plan.blocks_y), kThreads, shared, stream, call);
}

}  // namespace

int64_t cheap_shared_bytes(const Problem& p, const CheapPlan& plan, int reach_y, int reach_z) {
  return with_format(p, [&](auto format) -> int64_t {
    using T = typename decltype(format)::type;
    constexpr bool kLast = decltype(format)::kLast;
    CheapArrays<T> unused;
    return bytes_of([&](Sizer& sizer) {
      if (p.kernel == 3)
        carve_cheap<T, kLast, 3>(sizer, p, plan, {reach_y, reach_z}, &unused);
      else
        carve_cheap<T, kLast, 5>(sizer, p, plan, {reach_y, reach_z}, &unused);
    });
  });
}

bool plan_training(TrainCall& call, const Device& device) {
  const Problem& p = call.p;
  if (p.has_primary) call.product = plan_product(p, call.x, device);
  const int64_t along_y = call.cheap.batch ? p.multiplier : 1;
  call.plan =
      plan_cheap(p, device, 1, along_y, [&](const CheapPlan& plan) { return cheap_shared_bytes(p, plan, 1, -1); });
  return call.plan.tile_h > 0;
}

cudaError_t launch_training(const TrainCall& call, cudaStream_t stream) {
  return with_format(call.p, [&](auto format) {
    using T = typename decltype(format)::type;
    constexpr bool kLast = decltype(format)::kLast;
    if (call.p.has_primary) {
      const cudaError_t error = launch_raw<T, kLast>(call, stream);
      if (error != cudaSuccess) return error;
    }
    return call.p.kernel == 3 ? launch_cheap<T, kLast, 3>(call, stream) : launch_cheap<T, kLast, 5>(call, stream);
  });
}

}  // namespace fif::gpu
