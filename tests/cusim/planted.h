// Kernels that use every operation of device.h, right or, on demand, wrong in one place.
#pragma once

#include "cuda/device.h"

using namespace fif::gpu;

// What to do wrong. The tests read the names from here.
enum Bug {
  none,
  static_overrun,
  stale_shared,
  global_overread,
  missing_barrier,
  divergent_barrier,
  early_return,
  two_barriers,
  lane_missing,
  lane_outside,
  mixed_operations,
  block_race,
  missing_wait,
  short_wait,
  unpublished_copy,
  early_refill,
  copy_under_way,
  misaligned_copy,
  copy_to_global,
  copy_overrun,
  dynamic_overrun,
  arena_overrun,
  arena_too_large,
  missing_overlay_barrier,
  write_after_read,
  misaligned_ldmatrix,
  ldmatrix_of_global,
  misaligned_vector,
  global_load_of_shared,
  misaligned_cast,
  global_overwrite,
  missing_fence,
  missing_syncwarp,
  grid_y,
  grid_z,
  grid_empty,
  block_size,
  shared_limit,
  no_optin,
};

constexpr int kWarps = 4, kThreads = kWarps * 32;

// sums[row][w]: the sum of what warp w + 1 read of the row.
__global__ void reduce(const float* __restrict__ x, float* __restrict__ sums, float* total, int columns, Bug bug) {
  FIF_STATIC_SHARED(partial, float[kWarps][32]);
  const int warp = warp_id(), lane = lane_id();
  if (bug == early_return && threadIdx.x == kThreads - 1) return;
  float sum = 0;
  for (int c = threadIdx.x; c < columns; c += kThreads)
    sum += load_const(&x[size_t(blockIdx.x) * columns + c + (bug == global_overread ? 1 : 0)]);
  if (bug == static_overrun) (&partial[0][0])[threadIdx.x + 4] = sum;
  if (bug != stale_shared || blockIdx.x == 0) partial[warp][lane] = sum;
  if (bug == divergent_barrier) {
    if (lane < 16) __syncthreads();
  } else if (bug == two_barriers && warp == 0) {
    __syncthreads();
  } else if (bug != missing_barrier) {
    __syncthreads();
  }
  float v = partial[(warp + 1) % kWarps][lane];
  if (bug == lane_outside) v += __shfl_xor_sync(0xffffu << (lane & 16), v, 16) * 0;
  if (bug == mixed_operations) {
    if (lane == 5) {
      __syncwarp();
    } else {
      v += __shfl_xor_sync(kFullWarp, v, 0) * 0;
    }
  }
  if (bug != lane_missing || lane != 3) v = warp_sum(v);
  if (lane != 0) return;
  sums[blockIdx.x * kWarps + warp] = v;
  if (bug == block_race) {
    *total += v;
  } else {
    atomicAdd(total, v);
  }
}

// The last block to finish adds what all blocks wrote.
__global__ void last_block(const float* __restrict__ x, float* partial, unsigned* finished, float* total, Bug bug) {
  FIF_STATIC_SHARED(last, bool);
  const float sum = warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    if (bug != missing_fence) __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  if (bug != missing_fence) __threadfence();
  float v = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += 32) v += partial[b];
  v = warp_sum(v);
  if (threadIdx.x == 0) *total = v;
}

// Every lane hands its number to its neighbour through shared memory.
__global__ void exchange(const float* x, float* out, Bug bug) {
  FIF_STATIC_SHARED(row, float[32]);
  row[threadIdx.x] = x[threadIdx.x];
  if (bug == missing_syncwarp) {
    (void)warp_sum(1.f);  // lanes meet in a shuffle, but only __syncwarp orders memory
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = row[(threadIdx.x + 1) % 32];
}

// Votes and partial shuffles, one result per thread and question.
__global__ void votes(int* out) {
  const int thread = threadIdx.x, lane = lane_id();
  int* mine = out + thread * 12;
  mine[0] = __syncthreads_count(thread % 3 == 0);
  mine[1] = __syncthreads_or(thread == 17);
  mine[2] = __syncthreads_and(thread < 63);
  mine[3] = int(__ballot_sync(kFullWarp, lane % 5 == 0));
  mine[4] = __any_sync(kFullWarp, thread == 40);
  mine[5] = __all_sync(kFullWarp, thread < 32);
  mine[6] = __shfl_sync(kFullWarp, thread, 3, 8);
  mine[7] = __shfl_up_sync(kFullWarp, thread, 2, 16);
  mine[8] = __shfl_down_sync(kFullWarp, thread, 5);
  mine[9] = thread;
  if (lane < 16)
    for (int i = 0; i < 3; i++) mine[9] += __shfl_xor_sync(0x0000ffffu, mine[9], 1);
  mine[10] = warp_max<4>(thread ^ 21);
  mine[11] = warp_sum<8>(thread);
}

// Reverses every tile of kThreads words of Bytes; of the words only the first valid_bytes are read, the rest is zero.
template <int Bytes>
__global__ void __launch_bounds__(kThreads)
    pipeline(const char* __restrict__ x, char* __restrict__ out, int tiles, int64_t valid_bytes, Bug bug) {
  constexpr int kTile = kThreads * Bytes;
  FIF_SHARED(buffers);
  const int thread = threadIdx.x;
  auto fetch = [&](int tile) {
    const int64_t at = int64_t(tile) * kTile + thread * Bytes;
    const int64_t left = bug == copy_overrun ? Bytes : valid_bytes - at;
    unsigned char* to = buffers + tile % 2 * kTile + thread * Bytes;
    if (bug == misaligned_copy) to += 2;
    if (bug == dynamic_overrun && tile == 1) to[Bytes] = 0;
    if (left <= 0 || left >= Bytes) {
      cp_async<Bytes>(bug == copy_to_global ? static_cast<void*>(out + at) : to, x + at, left > 0);
    } else {
      cp_async_part<Bytes>(to, x + at, int(left));
    }
    cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; tile++) {
    const bool last = tile + 1 == tiles;
    if (!last || bug == copy_under_way) fetch(last ? tile : tile + 1);
    if (!last || bug == short_wait || bug == copy_under_way) {
      if (bug != missing_wait) cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (bug != unpublished_copy) __syncthreads();
    const unsigned char* from = buffers + tile % 2 * kTile + (kThreads - 1 - thread) * Bytes;
    vec_store(out + int64_t(tile) * kTile + thread * Bytes, vec_load<Bytes>(reinterpret_cast<const char*>(from)));
    if (bug != early_refill) __syncthreads();
  }
}

constexpr int kRows = 64, kColumns = 16, kDepth = 16, kPitch = 24;  // per block; the pitch keeps rows 16-byte aligned

// Bytes of dynamic shared memory of `product`.
template <class T>
int product_bytes() {
  SharedLayout layout;
  const int mark = layout.mark();
  layout.take<T>(kRows * kPitch);
  layout.take<T>(kDepth * kPitch);
  layout.rewind(mark);
  layout.take<float>(kRows * kColumns);
  return layout.bytes();
}

// out(kRows x kColumns) = a(kRows x depth) b(depth x kColumns), row-major; warp w does rows 16w.. .
template <class T>
__global__ void __launch_bounds__(kThreads)
    product(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out, int depth, Bug bug) {
  FIF_SHARED(raw);
  SharedArena arena(raw);
  const int start = arena.mark();
  T* as = arena.take<T>(kRows * kPitch);
  T* bs = arena.take<T>(kDepth * kPitch);
  const int thread = threadIdx.x, warp = warp_id(), lane = lane_id(), half = lane / 8 % 2;
  float d[2][4] = {};
  for (int k = 0; k < depth; k += kDepth) {
    for (int i = thread; i < kRows * 2; i += kThreads)
      vec_store(&as[i / 2 * kPitch + i % 2 * 8], vec_load_const<8>(&a[i / 2 * depth + k + i % 2 * 8]));
    if (thread < kDepth * 2)
      vec_store(&bs[thread / 2 * kPitch + thread % 2 * 8],
                vec_load_stream<8>(&b[(k + thread / 2) * kColumns + thread % 2 * 8]));
    if (bug == arena_overrun && thread == 0) as[kRows * kPitch] = from_float<T>(0.f);
    __syncthreads();
    uint32_t fa[4], fb[4];
    const T* row = &as[(warp * 16 + lane % 16) * kPitch + lane / 16 * 8];
    if (bug == misaligned_cast) d[0][0] += to_float(reinterpret_cast<const Vec<T, 8>*>(row + 1)->v[0]) * 0;
    if (bug == global_load_of_shared) d[0][0] += to_float(vec_load_const<8>(row)[0]) * 0;
    if (bug == misaligned_vector) d[0][0] += to_float(vec_load<8>(row + 1)[0]) * 0;
    ldmatrix_x4(fa, bug == ldmatrix_of_global ? a : bug == misaligned_ldmatrix ? row + 1 : row);
    if (warp % 2 == 0) {
      ldmatrix_x4_trans(fb, &bs[(lane % 8 + half * 8) * kPitch + lane / 16 * 8]);
    } else {
      uint32_t pair[2];
      for (int n = 0; n < 2; n++) {
        ldmatrix_x2_trans(pair, &bs[lane % 16 * kPitch + n * 8]);
        fb[n * 2] = pair[0];
        fb[n * 2 + 1] = pair[1];
      }
    }
    FIF_UNROLL
    for (int n = 0; n < 2; n++) {
      const uint32_t column[2] = {fb[n * 2], fb[n * 2 + 1]};
      mma<T>(d[n], fa, column);
    }
    if (bug != write_after_read && (bug != missing_overlay_barrier || k + kDepth < depth)) __syncthreads();
  }
  arena.rewind(start);
  float* staged = arena.take<float>(kRows * kColumns);
  for (int i = 0; i < 8; i++)
    staged[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i / 4][i % 4];
  __syncthreads();
  const int shift = bug == global_overwrite ? 4 : 0;
  for (int i = thread; i < kRows * kColumns / 4; i += kThreads)
    vec_store_stream(&out[i * 4 + shift], vec_load<4>(&staged[i * 4]));
}

// a[4], b[2], d[4] of each lane; d of each lane.
template <class T>
__global__ void fragments(const uint32_t* in, float* out) {
  const size_t lane = blockIdx.x * 32 + threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = in[lane * 10 + i];
  for (int i = 0; i < 2; i++) b[i] = in[lane * 10 + 4 + i];
  for (int i = 0; i < 4; i++) d[i] = bit_cast<float>(in[lane * 10 + 6 + i]);
  if constexpr (std::is_same_v<T, float>) {
    mma_tf32(d, a, b);
  } else {
    mma<T>(d, a, b);
  }
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = d[i];
}

// Of each lane, 8 numbers of a row (4 words) and the row to read; 12 words: x4, x4 transposed, x2, x2 transposed.
__global__ void matrices(const uint32_t* in, uint32_t* out) {
  FIF_SHARED(raw);
  SharedArena arena(raw);
  uint32_t* rows = arena.take<uint32_t>(32 * 4);
  const size_t lane = blockIdx.x * 32 + threadIdx.x;
  for (int i = 0; i < 4; i++) rows[threadIdx.x * 4 + i] = in[lane * 5 + i];
  __syncthreads();
  const uint32_t* row = &rows[in[lane * 5 + 4] * 4];
  uint32_t four[4], two[2];
  ldmatrix_x4(four, row);
  for (int i = 0; i < 4; i++) out[lane * 12 + i] = four[i];
  ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; i++) out[lane * 12 + 4 + i] = four[i];
  ldmatrix_x2(two, row);
  for (int i = 0; i < 2; i++) out[lane * 12 + 8 + i] = two[i];
  ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; i++) out[lane * 12 + 10 + i] = two[i];
}

// Of each lane a float f; 7 words: pack2(f, -f) in fp16 and bf16, fp16 there and back by unpack2 and by to_float, bf16
// likewise, tf32.
__global__ void conversions(const uint32_t* in, uint32_t* out) {
  const size_t lane = blockIdx.x * 32 + threadIdx.x;
  const float f = bit_cast<float>(in[lane]);
  const uint32_t half = pack2<__half>(f, -f), brain = pack2<__nv_bfloat16>(f, -f);
  out[lane * 7] = half;
  out[lane * 7 + 1] = brain;
  out[lane * 7 + 2] = bit_cast<uint32_t>(unpack2<__half>(half).y);
  out[lane * 7 + 3] = bit_cast<uint32_t>(to_float(from_float<__half>(f)));
  out[lane * 7 + 4] = bit_cast<uint32_t>(unpack2<__nv_bfloat16>(brain).y);
  out[lane * 7 + 5] = bit_cast<uint32_t>(to_float(from_float<__nv_bfloat16>(f)));
  out[lane * 7 + 6] = to_tf32(f);
}

__global__ void nothing() {}
