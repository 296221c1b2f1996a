// Backward through the depthwise part, from the output's gradient to that of the normalised primary maps; y (activated
// primary maps) and z (cheap maps before normalisation) are computed again from raw.
//   1. sums_kernel: the two sums over all pixels that the gradient of the cheap normalisation needs. M + N read per
//      pixel.
//   2. gradient_kernel: gradient of z on a tile and its halo, partial sums of the cheap weight's gradient, gradient of
//      y, through the activation: "through", with the two sums that the primary normalisation needs. 2 M + M + N read,
//      M written.
// What follows, the primary convolution's gradients, is in gradient.cu. Limit: memory; for many cheap maps of one
// primary map the bandwidth of shared memory.
#include "cheap.h"
#include "sizer.h"

namespace fif::gpu {
namespace {

// scale, shift, mean and rstd of a channel as in forward.
template <class T>
FIF_DEVICE void forward_constants(const BackwardNorm& n, int64_t channel, float (&v)[kConstants]) {
  v[kMean] = n.stats[channel];
  v[kRstd] = n.stats[n.channels + channel];
  const float2 norm = scale_shift<T>(n.norm, channel, v[kMean], v[kRstd]);
  v[kScale] = norm.x, v[kShift] = norm.y;
}

// The gradient of a cheap map after its activation, as that before it; and x hat.
template <class T, bool Last, int K>
struct CheapGradient {
  using B = CheapBlock<T, Last, K>;
  const B& block;
  const BackwardCall& call;
  const int t;
  float scale[B::kSlots], shift[B::kSlots], mean[B::kSlots], rstd[B::kSlots];

  FIF_DEVICE CheapGradient(const B& b, const BackwardCall& c, const float* constants, int number)
      : block(b), call(c), t(number) {
    block.cheap_constants(constants, kScale, t, scale);
    block.cheap_constants(constants, kShift, t, shift);
    block.cheap_constants(constants, kMean, t, mean);
    block.cheap_constants(constants, kRstd, t, rstd);
  }
  // Zeros where there is no gradient.
  FIF_DEVICE void operator()(int row, int column, const float (&z)[kQuad], float (&g)[kQuad],
                             float (&x_hat)[kQuad]) const {
    const int64_t kept = block.cheap_count(t, row, column);
    if (kept > 0)
      get_quad(block.template address<const T>(call.grad, block.cheap_channel(t), row, column), block.cheap_stride(),
               kept, g);
    FIF_UNROLL
    for (int q = 0; q < kQuad; ++q) {
      const int s = B::slot(q);
      x_hat[q] = (z[q] - mean[s]) * rstd[s];
      g[q] = q < kept ? activation_gradient(g[q], fmaf(z[q], scale[s], shift[s]), call.p.activation) : 0.f;
    }
  }
};

// Sums of the gradient and of it times x hat, for each channel of the thread.
template <int S>
struct PairSum {
  float plain[S] = {}, dot[S] = {};

  FIF_DEVICE void add(int s, float g, float x_hat) {
    plain[s] += g;
    dot[s] = fmaf(g, x_hat, dot[s]);
  }
};

template <class T, bool Last, int K>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const __grid_constant__ BackwardCall call) {
  using B = CheapBlock<T, Last, K>;
  FIF_SHARED(shared);
  SharedArena arena(shared);
  CheapArrays<T> s;
  carve_cheap<T, Last, K>(arena, call.p, call.sums_plan, {1, -1}, &s);
  const B block(call.p, call.sums_plan);
  const int t = blockIdx.y / call.sums_plan.blocks_y;
  block.each_primary(s.primary, [&](int64_t c, float (&v)[kConstants]) { forward_constants<T>(call.primary, c, v); });
  block.each_cheap(s.cheap, t, [&](int64_t c, float (&v)[kConstants]) { forward_constants<T>(call.cheap, c, v); });
  block.load_taps(call.cheap_weight, s.taps);
  __syncthreads();

  const Taps<Last, K> taps = block.taps(s.taps, t);
  const Field<T, Last> y = block.field(s.y, 1);
  B tile = block;
  const CheapGradient<T, Last, K> gradient(tile, call, s.cheap, t);
  PairSum<B::kSlots> sum;
  for (int64_t i = blockIdx.x; i < call.sums_plan.tiles; i += gridDim.x) {
    tile.place(i);
    tile.fill(call.raw, s, 1);
    __syncthreads();
    tile.each_strip(0, [&](int row, int column, int rows) {
      float z[B::kRows][kQuad] = {};
      convolve<B::kRows, false>(y, taps, row, column, rows, z);
      FIF_UNROLL
      for (int r = 0; r < B::kRows; ++r) {
        if (r >= rows) break;
        float g[kQuad] = {}, x_hat[kQuad];
        gradient(row + r, column, z[r], g, x_hat);
        FIF_UNROLL
        for (int q = 0; q < kQuad; ++q) sum.add(B::slot(q), g[q], x_hat[q]);
      }
    });
    __syncthreads();
  }
  FIF_UNROLL
  for (int slot = 0; slot < B::kSlots; ++slot) {
    block.leave(s.parts, 0, slot, sum.plain[slot]);
    block.leave(s.parts, 1, slot, sum.dot[slot]);
  }
  __syncthreads();
  block.each_result([&](int c, int64_t map) {
    const int64_t channel = map * block.multiplier + t;
    *partial(call.cheap.sums, channel, 2, 0, blockIdx.x) = block.total(s.parts, 0, c);
    *partial(call.cheap.sums, channel, 2, 1, blockIdx.x) = block.total(s.parts, 1, c);
  });
}

// Partial sums of the cheap weight's gradient. Threads that share a quad or channel are dealt out by kernel row and by
// row of the tile; each keeps the sums of its kernel row, in shared memory between tiles.
template <class T, bool Last, int K>
struct WeightSums {
  using B = CheapBlock<T, Last, K>;
  const B& block;
  float* const slots;
  const int parts, dy, first;  // tile rows first, first + parts, ...

  FIF_DEVICE WeightSums(const B& b, float* memory)
      : block(b), slots(memory), parts(b.workers / K), dy(b.worker % K), first(b.worker / K) {
    if (takes_part())
      for (int i = 0; i < b.multiplier * K * B::kSlots; ++i) slots[i * kThreads + threadIdx.x] = 0.f;
  }
  FIF_DEVICE bool takes_part() const { return block.worker < parts * K; }

  FIF_DEVICE void add(const Field<T, Last>& y, const Field<T, Last>& dz, int t) const {
    if (!takes_part()) return;
    float sum[K][B::kSlots] = {};
    for (int row = first; row < block.rows; row += parts) {
      for (int column = 0; column < block.columns; column += Last ? 1 : kQuad) {
        float g[kQuad];
        load_quad(dz.at(row, column), g);
        Window<Last, K> window;
        window.load(y, row + dy - K / 2, column);
        FIF_UNROLL
        for (int dx = 0; dx < K; ++dx) FIF_UNROLL
        for (int q = 0; q < kQuad; ++q) sum[dx][B::slot(q)] = fmaf(g[q], window.at(dx, q), sum[dx][B::slot(q)]);
      }
    }
    FIF_UNROLL
    for (int i = 0; i < K * B::kSlots; ++i)
      slots[(t * K * B::kSlots + i) * kThreads + threadIdx.x] += sum[i / B::kSlots][i % B::kSlots];
  }

  // After a barrier: what the block found, [S][K*K] of each channel.
  FIF_DEVICE void finish(float* sums) const {
    const int channels = block.channels, multiplier = block.multiplier;
    for (int i = threadIdx.x; i < channels * multiplier * K * K; i += kThreads) {
      const int k = i % (K * K), t = i / (K * K) % multiplier, c = i / (K * K * multiplier);
      if (block.first_map + c >= block.p.primary) continue;
      const int of_slot = (t * K + k % K) * B::kSlots + (Last ? c % kQuad : 0);
      float sum = 0.f;
      for (int part = 0; part < parts; ++part) {
        const int worker = part * K + k / K;
        sum += slots[of_slot * kThreads + (Last ? worker * (channels / kQuad) + c / kQuad : c * 32 + worker)];
      }
      sums[(int64_t(block.first_map + c) * multiplier + t) * K * K + k] = sum;
    }
  }
};

template <class T, bool Last, int K>
__global__ void __launch_bounds__(kThreads, Last && sizeof(T) == 4 ? 1 : 2)
    gradient_kernel(const __grid_constant__ BackwardCall call) {
  using B = CheapBlock<T, Last, K>;
  const Problem& p = call.p;
  FIF_SHARED(shared);
  SharedArena arena(shared);
  CheapArrays<T> s;
  carve_cheap<T, Last, K>(arena, p, call.plan, {2, 1}, &s);
  const B block(p, call.plan);
  const int multiplier = block.multiplier;
  const float count = static_cast<float>(p.batch * p.pixels());
  block.each_primary(s.primary, [&](int64_t c, float (&v)[kConstants]) { forward_constants<T>(call.primary, c, v); });
  for (int t = 0; t < multiplier; ++t)
    block.each_cheap(s.cheap, t, [&](int64_t c, float (&v)[kConstants]) {
      forward_constants<T>(call.cheap, c, v);
      const float plain = merged_sum(call.cheap.sums, c, 2, 0), dot = merged_sum(call.cheap.sums, c, 2, 1);
      if (call.cheap.batch) v[kSum] = plain / count, v[kDot] = dot / count;
      if (blockIdx.x == 0 && lane_id() == 0) {
        call.cheap.gradient[c] = dot;
        call.cheap.gradient[call.cheap.channels + c] = plain;
      }
    });
  block.load_taps(call.cheap_weight, s.taps);
  B tile = block;
  const WeightSums<T, Last, K> weight_sums(tile, s.slots);
  __syncthreads();

  const Field<T, Last> y = block.field(s.y, 2);
  PairSum<B::kSlots> sum;
  for (int64_t i = blockIdx.x; i < call.plan.tiles; i += gridDim.x) {
    tile.place(i);
    tile.fill(call.raw, s, 2);
    __syncthreads();
    for (int t = 0; t < multiplier; ++t) {
      const auto taps = block.template taps<!Last>(s.taps, t);
      const CheapGradient<T, Last, K> gradient(tile, call, s.cheap, t);
      const Field<T, Last> dz = block.field(s.z, 1, t);
      float plain[B::kSlots], dot[B::kSlots];
      block.cheap_constants(s.cheap, kSum, t, plain);
      block.cheap_constants(s.cheap, kDot, t, dot);
      tile.each_strip(1, [&](int row, int column, int rows) {
        float z[B::kRows][kQuad] = {};
        convolve<B::kRows, false>(y, taps, row, column, rows, z);
        FIF_UNROLL
        for (int r = 0; r < B::kRows; ++r) {
          if (r >= rows) break;
          const int present = tile.count(row + r, column);
          float g[kQuad] = {}, x_hat[kQuad];
          gradient(row + r, column, z[r], g, x_hat);
          FIF_UNROLL
          for (int q = 0; q < kQuad; ++q) {
            const int c = B::slot(q);
            g[q] = q < present ? gradient.scale[c] * (g[q] - plain[c] - x_hat[q] * dot[c]) : 0.f;
          }
          store_quad(dz.at(row + r, column), g);
        }
      });
    }
    __syncthreads();
    for (int t = 0; t < multiplier; ++t) weight_sums.add(y, block.field(s.z, 1, t), t);
    tile.each_strip(0, [&](int row, int column, int rows) {
      float dy[B::kRows][kQuad] = {};
      for (int t = 0; t < multiplier; ++t)
        convolve<B::kRows, true>(block.field(s.z, 1, t), block.template taps<!Last>(s.taps, t), row, column, rows, dy);
      // Afresh for every strip, since registers are scarce here.
      float scale[B::kSlots], shift[B::kSlots], mean[B::kSlots], rstd[B::kSlots];
      block.constants(s.primary, kScale, scale);
      block.constants(s.primary, kShift, shift);
      block.constants(s.primary, kMean, mean);
      block.constants(s.primary, kRstd, rstd);
      FIF_UNROLL
      for (int r = 0; r < B::kRows; ++r) {
        const int present = r < rows ? tile.count(row + r, column) : 0;
        if (present == 0) break;
        float g[kQuad] = {}, raw[kQuad];
        if (p.splice)
          get_quad(tile.template address<const T>(call.grad, tile.first_map + tile.channel, row + r, column), 1,
                   present, g);
        get_quad(tile.primary(call.raw, row + r, column), 1, present, raw);
        Vec<T, kQuad> through;
        FIF_UNROLL
        for (int q = 0; q < kQuad; ++q) {
          const int c = B::slot(q);
          const float u = fmaf(raw[q], scale[c], shift[c]);
          through[q] = from_float<T>(activation_gradient(g[q] + dy[r][q], u, p.activation));
          if (q < present) sum.add(c, to_float(through[q]), (raw[q] - mean[c]) * rstd[c]);
        }
        put_quad(tile.template address<T>(call.through, tile.first_map + tile.channel, row + r, column), 1, present,
                 through);
      }
    });
    __syncthreads();
  }
  weight_sums.finish(call.cheap_weight_sums + blockIdx.x * p.cheap() * K * K);
  FIF_UNROLL
  for (int slot = 0; slot < B::kSlots; ++slot) {
    block.leave(s.parts, 0, slot, sum.plain[slot]);
    block.leave(s.parts, 1, slot, sum.dot[slot]);
  }
  __syncthreads();
  block.each_result([&](int c, int64_t map) {
    *partial(call.primary.sums, map, 2, 0, blockIdx.x) = block.total(s.parts, 0, c);
    *partial(call.primary.sums, map, 2, 1, blockIdx.x) = block.total(s.parts, 1, c);
  });
}

template <class T, bool Last, int K>
cudaError_t launch(const BackwardCall& call, cudaStream_t stream) {
  const auto shared = [&](const CheapPlan& plan, Reach reach) {
    CheapArrays<T> unused;
    return bytes_of([&](Sizer& sizer) { carve_cheap<T, Last, K>(sizer, call.p, plan, reach, &unused); });
  };
  const dim3 first(call.sums_plan.blocks_x, call.sums_plan.blocks_y * static_cast<unsigned>(call.p.multiplier));
  const cudaError_t error =
      FIF_LAUNCH((sums_kernel<T, Last, K>), first, kThreads, shared(call.sums_plan, {1, -1}), stream, call);
  if (error != cudaSuccess) return error;
  const dim3 second(call.plan.blocks_x, call.plan.blocks_y);
  return FIF_LAUNCH((gradient_kernel<T, Last, K>), second, kThreads, shared(call.plan, {2, 1}), stream, call);
}

}  // namespace

bool plan_backward(BackwardCall& call, const Device& device) {
  const Problem& p = call.p;
  call.sums_plan =
      plan_cheap(p, device, 1, p.multiplier, [&](const CheapPlan& plan) { return cheap_shared_bytes(p, plan, 1, -1); });
  call.plan = plan_cheap(p, device, 2, 1, [&](const CheapPlan& plan) { return cheap_shared_bytes(p, plan, 2, 1); });
  call.gradient = plan_gradient(p, call.x, call.grad_x.data != nullptr, call.grad_primary_weight != nullptr, device);
  return call.sums_plan.tile_h > 0 && call.plan.tile_h > 0;
}

cudaError_t launch_backward(const BackwardCall& call, cudaStream_t stream) {
  const cudaError_t error = with_format(call.p, [&](auto format) {
    using T = typename decltype(format)::type;
    constexpr bool kLast = decltype(format)::kLast;
    return call.p.kernel == 3 ? launch<T, kLast, 3>(call, stream) : launch<T, kLast, 5>(call, stream);
  });
  return error != cudaSuccess ? error : launch_primary_gradients(call, stream);
}

}  // namespace fif::gpu
