// Launches the kernels of planted.h and checks what they computed: what the simulator is tested on.
//
//   selftest CASE ORDER [BUG]     ORDER and BUG are numbers
//
// The exit status: 0 for right and 1 for wrong results, 3 for an error of the simulator that leaves it usable.
// The cases named in kFilters turn standard input into standard output, for a comparison elsewhere. The file compiles
// with nvcc as well; on a GPU the same cases show what the hardware does.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "planted.h"

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
  if (!finish(FIF_LAUNCH(reduce, rows, kThreads, 0, nullptr, x.data, sums.data, total.data, columns, bug)))
    return false;
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

bool run_exchange(Bug bug) {
  Buffer<float> x(32), out(32);
  for (size_t i = 0; i < 32; i++) x[i] = noise(i);
  if (!finish(FIF_LAUNCH(exchange, 1, 32, 0, nullptr, x.data, out.data, bug))) return false;
  bool right = true;
  for (size_t i = 0; i < 32; i++) right &= out[i] == x[(i + 1) % 32];
  return right;
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
    const int want[12] = {22,
                          1,
                          0,
                          0x42108421,
                          base == 32,
                          base == 0,
                          t / 8 * 8 + 3,
                          lane % 16 < 2 ? t : t - 2,
                          lane > 26 ? t : t + 5,
                          lane < 16 ? chain[base / 32][lane] : t,
                          largest,
                          sum};
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
  if (!finish(
          FIF_LAUNCH(pipeline<Bytes>, 1, kThreads, 2 * tile, nullptr, x.data, out.data, tiles, int64_t(valid), bug)))
    return false;
  bool right = true;
  for (int i = 0; i < tiles * tile; i++) {
    const int word = i / Bytes,
              from = (word / kThreads * kThreads + kThreads - 1 - word % kThreads) * Bytes + i % Bytes;
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
  size_t bytes = 64 << 10;
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

// What the simulator writes down about launches, and what it does not do.
bool run_record(Bug) {
#if !defined(__CUDACC__)
  cusim::reset_launches();
  if (!run_product<__half>(none)) return false;
  const cusim::Launch first = cusim::launches().at(0);
  bool right = cusim::launches().size() == 1 && first.name == "product<T>" && first.grid.x == 1 &&
      first.block.x == unsigned(kThreads) && first.dynamic_shared == size_t(product_bytes<__half>());
  right &= first.static_shared == 0 && first.blocks == 1 && first.blocks_run == 1;
  right &= run_reduce(none) && cusim::launches().at(1).static_shared == kWarps * 32 * sizeof(float);
  cusim::settings().dry_run = true;
  right &= FIF_LAUNCH(nothing, dim3(1u << 30, 65535), 32, 0, nullptr) == cudaSuccess;
  right &= cusim::launches().size() == 3 && cusim::launches()[2].blocks_run == 0;
  cusim::settings() = {.order = cusim::settings().order, .device = {.shared_optin = 99 << 10}};
  right &= FIF_LAUNCH(nothing, 1, 32, 99 << 10, nullptr) == cudaSuccess;
  right &= FIF_LAUNCH(nothing, 1, 32, 100 << 10, nullptr) == cudaErrorInvalidValue;
  cusim::settings().device = {};
  return right && cusim::launches().size() == 4;
#else
  return true;
#endif
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
    {"exchange", run_exchange},
    {"votes", run_votes},
    {"pipeline_16", run_pipeline<16>},
    {"pipeline_8", run_pipeline<8>},
    {"pipeline_4", run_pipeline<4>},
    {"product_fp16", run_product<__half>},
    {"product_bf16", run_product<__nv_bfloat16>},
    {"limits", run_limits},
    {"record", run_record},
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
  if (argc < 3) return 2;
  const Bug bug = Bug(argc > 3 ? atoi(argv[3]) : 0);
#if defined(__CUDACC__)
  return run(argv[1], bug);
#else
  cusim::settings().order = atoi(argv[2]);
  try {
    return run(argv[1], bug);
  } catch (const cusim::Error& error) {
    fprintf(stderr, "error: %s\n", error.what());
  }
  if (run(argv[1], none) != 0 || cusim::last_error().empty()) return 4;  // an error leaves a simulator that works
  return 3;
#endif
}
