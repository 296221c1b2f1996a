// Kernels that use every operation of device.h, right or, on demand, wrong in one place: what the simulator is tested on.
//
//   selftest CASE ORDER [BUG]     exit status 0: right, 1: wrong results, 3: the simulator reported an error
//
// The cases named in kFilters turn standard input into standard output, for a comparison elsewhere. The file compiles
// with nvcc as well; on a GPU the same cases show what the hardware does.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.h"

using namespace fif::gpu;

#define BUGS(X)                                                                                                        \
  X(none) X(static_overrun) X(stale_shared) X(global_overread) X(missing_barrier) X(divergent_barrier) X(early_return) \
  X(two_barriers) X(lane_missing) X(lane_outside) X(mixed_operations) X(block_race) X(missing_wait) X(short_wait)      \
  X(unpublished_copy) X(early_refill) X(copy_under_way) X(misaligned_copy) X(copy_to_global) X(copy_overrun)           \
  X(dynamic_overrun) X(arena_overrun) X(arena_too_large) X(missing_overlay_barrier) X(write_after_read)                \
  X(misaligned_ldmatrix) X(ldmatrix_of_global) X(misaligned_vector) X(misaligned_cast) X(global_overwrite)             \
  X(missing_fence) X(grid_y) X(grid_z) X(grid_empty) X(block_size) X(shared_limit) X(no_optin)

enum Bug {
#define X(name) name,
  BUGS(X)
#undef X
};

// ---- Reductions: static shared memory, barriers, shuffles, atomics ------------------------------------------------

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

// ---- Copies: dynamic shared memory, a pipeline of cp.async --------------------------------------------------------

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

// ---- A matrix product: arena, overlay, ldmatrix, mma --------------------------------------------------------------

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

// ---- Filters: every lane's registers in, every lane's registers out, one warp per block ----------------------------

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

// ---- Host -----------------------------------------------------------------------------------------------------------

// n elements that host and device reach; on the CPU of exactly that size, so that what lies beyond is caught.
template <class T>
struct Buffer {
  explicit Buffer(size_t n) : count(n) {
#if defined(__CUDACC__)
    if (cudaMallocManaged(&data, n * sizeof(T)) != cudaSuccess) abort();
#else
    data = static_cast<T*>(malloc(n * sizeof(T)));
#endif
    memset(static_cast<void*>(data), 0xff, n * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#if defined(__CUDACC__)
    (void)cudaFree(data);
#else
    free(data);
#endif
  }
  T& operator[](size_t i) { return data[i]; }
  T* data = nullptr;
  size_t count;
};

bool finish(cudaError_t error) {
#if defined(__CUDACC__)
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
#endif
  if (error != cudaSuccess) fprintf(stderr, "launch: %s\n", cudaGetErrorString(error));
  return error == cudaSuccess;
}

bool close(double got, double want) { return std::fabs(got - want) <= 1e-4 * (1 + std::fabs(want)); }

float noise(size_t i) { return float(i * 7919 % 101) / 50 - 1; }

bool run_reduce(Bug bug) {
  const int rows = 3, columns = 200;
  Buffer<float> x(rows * columns), sums(rows * kWarps), total(1);
  for (size_t i = 0; i < x.count; i++) x[i] = noise(i);
  total[0] = 0;
  if (!finish(FIF_LAUNCH(reduce, rows, kThreads, 0, nullptr, x.data, sums.data, total.data, columns, bug))) return false;
  double all = 0;
  bool right = true;
  for (int r = 0; r < rows; r++)
    for (int w = 0; w < kWarps; w++) {
      double want = 0;
      for (int c = (w + 1) % kWarps * 32; c < columns; c += kThreads)
        for (int l = 0; l < 32 && c + l < columns; l++) want += x[size_t(r) * columns + c + l];
      right &= close(sums[r * kWarps + w], want);
      all += want;
    }
  return right && close(total[0], all);
}

bool run_last_block(Bug bug) {
  const int blocks = 5;
  Buffer<float> x(blocks * 32), partial(blocks), total(1);
  Buffer<unsigned> finished(1);
  double want = 0;
  for (size_t i = 0; i < x.count; i++) want += x[i] = noise(i);
  finished[0] = 0;
  return finish(FIF_LAUNCH(last_block, blocks, 32, 0, nullptr, x.data, partial.data, finished.data, total.data, bug)) &&
         close(total[0], want);
}

bool run_votes(Bug) {
  Buffer<int> out(64 * 12);
  if (!finish(FIF_LAUNCH(votes, 1, 64, 0, nullptr, out.data))) return false;
  bool right = true;
  int chain[2][16];
  for (int w = 0; w < 2; w++)
    for (int i = 0; i < 16; i++) chain[w][i] = w * 32 + i;
  for (int round = 0; round < 3; round++)
    for (auto& c : chain)
      for (int i = 0; i < 16; i += 2) c[i] = c[i + 1] = c[i] + c[i + 1];
  for (int t = 0; t < 64; t++) {
    const int lane = t % 32, base = t - lane;
    int largest = 0, sum = 0;
    for (int i = 0; i < 4; i++) largest = std::max(largest, (t / 4 * 4 + i) ^ 21);
    for (int i = 0; i < 8; i++) sum += t / 8 * 8 + i;
    const int want[12] = {22, 1, 0, 0x42108421, base == 32, base == 0, t / 8 * 8 + 3, lane % 16 < 2 ? t : t - 2,
                          lane > 26 ? t : t + 5, lane < 16 ? chain[base / 32][lane] : t, largest, sum};
    for (int i = 0; i < 12; i++) {
      if (out[t * 12 + i] == want[i]) continue;
      fprintf(stderr, "votes: thread %d question %d: %d, must be %d\n", t, i, out[t * 12 + i], want[i]);
      right = false;
    }
  }
  return right;
}

template <int Bytes>
bool run_pipeline(Bug bug) {
  const int tiles = 3, tile = kThreads * Bytes;
  const int valid = tiles * tile - Bytes - Bytes / 2;
  Buffer<char> x((valid + 15) / 16 * 16), out(size_t(tiles) * tile);
  for (size_t i = 0; i < x.count; i++) x[i] = char(i * 31 % 113);
  if (!finish(FIF_LAUNCH(pipeline<Bytes>, 1, kThreads, 2 * tile, nullptr, x.data, out.data, tiles, int64_t(valid), bug)))
    return false;
  bool right = true;
  for (int i = 0; i < tiles * tile; i++) {
    const int word = i / Bytes, from = (word / kThreads * kThreads + kThreads - 1 - word % kThreads) * Bytes + i % Bytes;
    right &= out[i] == (from < valid ? x[from] : 0);
  }
  return right;
}

template <class T>
bool run_product(Bug bug) {
  const int depth = 48;
  Buffer<T> a(kRows * depth), b(depth * kColumns);
  Buffer<float> out(kRows * kColumns);
  for (size_t i = 0; i < a.count; i++) a[i] = T(noise(i));
  for (size_t i = 0; i < b.count; i++) b[i] = T(noise(i * 3 + 1));
  const int bytes = product_bytes<T>() - (bug == arena_too_large ? 16 : 0);
  if (!finish(FIF_LAUNCH(product<T>, 1, kThreads, bytes, nullptr, a.data, b.data, out.data, depth, bug))) return false;
  bool right = true;
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < kColumns; c++) {
      double want = 0;
      for (int k = 0; k < depth; k++) want += double(float(a[r * depth + k])) * double(float(b[k * kColumns + c]));
      right &= close(out[r * kColumns + c], want);
    }
  return right;
}

bool run_limits(Bug bug) {
  dim3 grid(1), block(32);
  size_t bytes = 100 << 10;
  if (bug == grid_y) grid.y = 65536;
  if (bug == grid_z) grid.z = 65536;
  if (bug == grid_empty) grid.x = 0;
  if (bug == block_size) block = dim3(32, 33);
  if (bug == shared_limit) bytes = 256 << 10;
#if !defined(__CUDACC__)
  if (bug == no_optin) cusim::launch("nothing", nullptr, [] { nothing(); }, grid, block, bytes, nullptr);
#endif
  return finish(FIF_LAUNCH(nothing, grid, block, bytes, nullptr));
}

using Filter = std::function<cudaError_t(unsigned blocks, const uint32_t* in, uint32_t* out)>;
struct Sizes {
  int in, out;  // words per lane
};

template <class T>
cudaError_t run_fragments(unsigned blocks, const uint32_t* in, uint32_t* out) {
  return FIF_LAUNCH(fragments<T>, blocks, 32, 0, nullptr, in, reinterpret_cast<float*>(out));
}
cudaError_t run_matrices(unsigned blocks, const uint32_t* in, uint32_t* out) {
  return FIF_LAUNCH(matrices, blocks, 32, 32 * 16, nullptr, in, out);
}
cudaError_t run_conversions(unsigned blocks, const uint32_t* in, uint32_t* out) {
  return FIF_LAUNCH(conversions, blocks, 32, 0, nullptr, in, out);
}

const std::map<std::string, bool (*)(Bug)> kCases = {
    {"reduce", run_reduce},
    {"last_block", run_last_block},
    {"votes", run_votes},
    {"pipeline_16", run_pipeline<16>},
    {"pipeline_8", run_pipeline<8>},
    {"pipeline_4", run_pipeline<4>},
    {"product_fp16", run_product<__half>},
    {"product_bf16", run_product<__nv_bfloat16>},
    {"limits", run_limits},
};
const std::map<std::string, std::pair<Sizes, Filter>> kFilters = {
    {"mma_fp16", {{10, 4}, run_fragments<__half>}}, {"mma_bf16", {{10, 4}, run_fragments<__nv_bfloat16>}},
    {"mma_tf32", {{10, 4}, run_fragments<float>}},  {"ldmatrix", {{5, 12}, run_matrices}},
    {"conversions", {{1, 7}, run_conversions}},
};

bool run_filter(const Sizes& sizes, const Filter& filter) {
  std::vector<uint32_t> words;
  for (uint32_t word; fread(&word, sizeof word, 1, stdin) == 1;) words.push_back(word);
  const unsigned blocks = unsigned(words.size() / 32 / sizes.in);
  Buffer<uint32_t> in(words.size()), out(size_t(blocks) * 32 * sizes.out);
  memcpy(in.data, words.data(), words.size() * sizeof(uint32_t));
  if (!finish(filter(blocks, in.data, out.data))) return false;
  return fwrite(out.data, sizeof(uint32_t), out.count, stdout) == out.count;
}

// One case, or all; 0 where everything is right.
int run(const std::string& name, Bug bug) {
  if (const auto filter = kFilters.find(name); filter != kFilters.end())
    return run_filter(filter->second.first, filter->second.second) ? 0 : 1;
  int wrong = 0;
  for (const auto& [key, function] : kCases) {
    if (name != "all" && name != key) continue;
    if (function(bug)) continue;
    fprintf(stderr, "%s: wrong results\n", key.c_str());
    wrong = 1;
  }
  return wrong;
}

int main(int argc, char** argv) {
  const std::vector<std::string> names = {
#define X(name) #name,
      BUGS(X)
#undef X
  };
  if (argc < 3) return 2;
  int bug = none;
  while (argc > 3 && names[bug] != argv[3])
    if (size_t(++bug) == names.size()) return 2;
#if defined(__CUDACC__)
  return run(argv[1], Bug(bug));
#else
  cusim::settings().order = atoi(argv[2]);
  try {
    return run(argv[1], Bug(bug));
  } catch (const cusim::Error& error) {
    fprintf(stderr, "error: %s\n", error.what());
  }
  if (run(argv[1], none) != 0 || cusim::last_error().empty()) return 4;  // an error leaves a simulator that works
  return 3;
#endif
}
