// Runs launches: blocks one after the other, the threads of a block in an order that the settings choose.
#pragma once

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstring>
#include <new>
#include <type_traits>

#include "machine.h"
#include "shared.h"

namespace cusim {

CUSIM_MACHINE inline char* map_memory(size_t bytes, int protection) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

// Room for n threads and their shared memory.
CUSIM_MACHINE inline void reserve(Cluster& c, int n) {
  const size_t stride = kStack + kGuard;
  if (c.shared.space == nullptr) c.shared.space = map_memory(Shared::kSpace, PROT_READ | PROT_WRITE);
  if (n > c.capacity) {
    if (c.stacks != nullptr) munmap(c.stacks, c.capacity * stride);
    c.fibers = static_cast<Fiber*>(realloc(static_cast<void*>(c.fibers), n * sizeof(Fiber)));
    c.stacks = map_memory(n * stride, PROT_NONE);
    c.copies = static_cast<Copy*>(realloc(static_cast<void*>(c.copies), n * kMaxCopies * sizeof(Copy)));
    if (c.fibers == nullptr || c.copies == nullptr) throw std::bad_alloc();
    for (int i = 0; i < n; i++) {
      if (i >= c.capacity) c.fibers[i].tsan = nullptr;
      c.fibers[i].copies = c.copies + i * kMaxCopies;
      c.fibers[i].stack = c.stacks + i * stride + kGuard;
      mprotect(c.fibers[i].stack, kStack, PROT_READ | PROT_WRITE);
    }
    c.capacity = n;
  }
#if defined(__SANITIZE_THREAD__)
  for (int i = 0; i < n; i++)
    if (c.fibers[i].tsan == nullptr) c.fibers[i].tsan = __tsan_create_fiber(0);
#endif
}

CUSIM_MACHINE inline void prepare_fibers() {
  Machine& m = machine;
  for (int i = 0; i < m.count; i++) {
    Fiber& f = m.fibers[i];
    f.state = State::kRun;
    f.place = {};
    f.parity = f.met_parity = f.barriers = f.full_syncs = 0;
    f.first_copy = f.copy_count = 0;
    f.group = 0;
    f.asan = nullptr;
    f.index = {unsigned(i) % blockDim.x, unsigned(i) / blockDim.x % blockDim.y,
               unsigned(i) / (blockDim.x * blockDim.y)};
    CUSIM_UNPOISON(f.stack, kStack);
    void** top = reinterpret_cast<void**>(f.stack + kStack - 64 - i % 60 * 64);  // not all in the same cache lines
    fill(top - 8, 0, 8 * sizeof(void*));
    top[-2] =
        reinterpret_cast<void*>(fiber_entry);  // where the first exchange returns to, 16-byte stack alignment kept
    f.stack_pointer = top - 8;
  }
}

// Runs the operation of every group of lanes that is complete; whether there was one.
CUSIM_MACHINE inline bool complete_warp(int first) {
  Machine& m = machine;
  const int lanes = std::min(32, m.count - first);
  bool any = false;
  for (int i = 0; i < lanes; i++) {
    Fiber& f = m.fibers[first + i];
    if (f.state != State::kWarp) continue;
    const unsigned mask = f.mask;
    void* operands[32] = {};
    bool complete = true;
    for (int l = 0; l < 32 && complete; l++) {
      if (!(mask >> l & 1)) continue;
      if (l >= lanes || m.fibers[first + l].state == State::kDone)
        fail("deadlock: %s at %s:%d waits for lane %d of warp %d, which %s", f.place.what, f.place.file, f.place.line,
             l, first / 32, l >= lanes ? "the block does not have" : "has returned");
      Fiber& peer = m.fibers[first + l];
      complete = peer.state == State::kWarp && peer.mask == mask;
      if (complete && peer.operation != f.operation)
        fail("divergence: lanes %d and %d of warp %d meet in different operations, %s and %s", i, l, first / 32,
             f.place.what, peer.place.what);
      operands[l] = peer.operand;
    }
    if (!complete) continue;
    f.operation(operands, mask);
    for (int l = 0; l < lanes; l++) {
      Fiber& peer = m.fibers[first + l];
      if (!(mask >> l & 1)) continue;
      peer.state = State::kRun;
      peer.met_parity = peer.parity;
    }
    any = true;
  }
  return any;
}

// Lets every lane of a warp run until it waits, completes warp operations, and so on; whether anything moved.
CUSIM_MACHINE inline bool run_warp(int first) {
  Machine& m = machine;
  const int lanes = std::min(32, m.count - first), order = m.settings.order;
  bool moved = false;
  for (;;) {
    int lane_order[32];
    for (int i = 0; i < lanes; i++) lane_order[i] = order == 1 ? lanes - 1 - i : i;
    if (order > 1) std::shuffle(lane_order, lane_order + lanes, m.random);
    for (int i = 0; i < lanes; i++) {
      if (m.fibers[first + lane_order[i]].state != State::kRun) continue;
      switch_to_fiber(first + lane_order[i]);
      moved = true;
      if (m.fibers[first + lane_order[i]].state == State::kFailed) {
        CUSIM_ACQUIRE(&m.end_token);
        throw Error(m.last_error = m.message);
      }
    }
    if (!complete_warp(first)) return moved;
    moved = true;
    if (order > 1 && m.random() % 2) return true;  // another warp may overtake
  }
}

// All threads wait or have returned and no warp operation is complete: opens the block barrier, or fails.
CUSIM_MACHINE inline void complete_block() {
  Machine& m = machine;
  int waiting = -1, other = -1;
  m.vote_sum = 0;
  for (int i = 0; i < m.count; i++) {
    const Fiber& f = m.fibers[i];
    if (f.state == State::kBlock && waiting < 0) waiting = i;
    if (f.state == State::kWarp || (f.state == State::kDone && other < 0)) other = i;
    m.vote_sum += f.vote;
  }
  const Place& at = m.fibers[waiting < 0 ? other : waiting].place;
  for (int i = 0; i < m.count && waiting >= 0 && other < 0; i++) {
    const Place& p = m.fibers[i].place;
    if (p.line != at.line || p.what != at.what || (p.file != at.file && strcmp(p.file, at.file) != 0)) other = i;
  }
  if (waiting >= 0 && other < 0) {
    for (int i = 0; i < m.count; i++) m.fibers[i].state = State::kRun;
    return;
  }
  const Fiber& f = m.fibers[other];
  const bool barrier = waiting >= 0;
  fail("%s: thread %d of block %u,%u,%u waits in %s at %s:%d, while thread %d %s %s at %s:%d",
       barrier ? "divergent barrier" : "deadlock", barrier ? waiting : other, blockIdx.x, blockIdx.y, blockIdx.z,
       at.what, at.file, at.line, other, f.state == State::kDone ? "has returned; its last wait was" : "waits in",
       f.place.what, f.place.file, f.place.line);
}

CUSIM_MACHINE inline void run_block() {
  Machine& m = machine;
  std::vector<int> warps;
  for (int w = 0; w < m.count; w += 32) warps.push_back(w);
  if (m.settings.order == 1) std::reverse(warps.begin(), warps.end());
  for (;;) {
    if (m.settings.order > 1) std::shuffle(warps.begin(), warps.end(), m.random);
    bool moved = false;
    for (int w : warps) moved |= run_warp(w);
    if (moved) continue;
    int done = 0;
    for (int i = 0; i < m.count; i++) done += m.fibers[i].state == State::kDone;
    if (done == m.count) break;
    complete_block();
  }
}

inline void check_launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  Machine& m = machine;
  const auto optin = m.optin.find(kernel);
  const size_t limit = std::max(48 << 10, optin == m.optin.end() ? 0 : optin->second);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("launch of %s: grid %u,%u,%u, must be 1..2147483647, 1..65535, 1..65535", name, grid.x, grid.y, grid.z);
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64)
    fail("launch of %s: block %u,%u,%u, must be 1..1024 threads, z up to 64", name, block.x, block.y, block.z);
  if (shared_bytes > size_t(m.settings.device.shared_optin))
    fail("launch of %s: %zu bytes of dynamic shared memory, over the device's %d", name, shared_bytes,
         m.settings.device.shared_optin);
  if (shared_bytes > limit)
    fail("launch of %s: %zu bytes of dynamic shared memory, over the %zu that the kernel opted in to", name,
         shared_bytes, limit);
}

// Adds a line to the file that CUSIM_LAUNCHES names, if any: the kernel's address in its library, threads of a block,
// bytes of dynamic shared memory.
inline void log_launch(const void* kernel, const Launch& launch) {
  const char* path = variable("CUSIM_LAUNCHES", "");
  if (*path == 0) return;
  Dl_info library;
  FILE* file = fopen(path, "a");
  if (file == nullptr || dladdr(kernel, &library) == 0) fail("no log of launches at %s", path);
  const long address = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
  fprintf(file, "%lx %u %zu\n", address, launch.block.x * launch.block.y * launch.block.z, launch.dynamic_shared);
  fclose(file);
}

// How many clusters the blocks of a launch take turns on; ThreadSanitizer needs a megabyte per fiber.
inline int cluster_count([[maybe_unused]] int threads) {
#if defined(__SANITIZE_THREAD__)
  return threads <= 512 && machine.launches.back().blocks > 1 ? 2 : 1;
#else
  return 1;
#endif
}

CUSIM_MACHINE inline void run_blocks(dim3 grid, Launch& record) {
  Machine& m = machine;
  const unsigned long total = record.blocks;
  std::vector<unsigned> shuffled(m.settings.order > 1 && total < (1 << 24) ? total : 0);
  for (size_t i = 0; i < shuffled.size(); i++) shuffled[i] = unsigned(i);
  std::shuffle(shuffled.begin(), shuffled.end(), m.random);
  for (unsigned long i = 0; i < total; i++) {
    const unsigned long b = !shuffled.empty() ? shuffled[i] : m.settings.order == 1 ? total - 1 - i : i;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    m.cluster = &m.clusters[i % cluster_count(m.count)];
    m.fibers = m.cluster->fibers;
    prepare_shared(record.dynamic_shared);
    prepare_fibers();
    run_block();
    record.static_shared = m.cluster->shared.static_bytes;
    record.blocks_run++;
  }
  CUSIM_ACQUIRE(&m.end_token);
}

// After an Error: the main thread has seen what the fibers did that will never go on; they make room for new ones.
CUSIM_MACHINE inline void give_up_fibers() {
#if defined(__SANITIZE_THREAD__)
  Machine& m = machine;
  for (Cluster& c : m.clusters)
    for (int i = 0; i < c.capacity; i++) {
      Fiber& f = c.fibers[i];
      if (f.tsan == nullptr) continue;
      __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
      __tsan_switch_to_fiber(m.main_tsan, 0);
      __tsan_destroy_fiber(f.tsan);
      f.tsan = nullptr;
    }
#endif
}

// Runs `body` for every thread of the grid and returns when all have returned.
template <class F>
void launch(const char* name, const void* kernel, F&& body, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t) {
  Machine& m = machine;
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.current = -1;
  check_launch(name, kernel, grid, block, shared_bytes);
  m.launches.push_back({name, grid, block, shared_bytes, 0, 1ul * grid.x * grid.y * grid.z, 0});
  log_launch(kernel, m.launches.back());
  if (m.settings.dry_run) return;
#if defined(__SANITIZE_THREAD__)
  m.main_tsan = __tsan_get_current_fiber();
#endif
  using Body = std::remove_reference_t<F>;
  m.body = [](void* p) { (*static_cast<Body*>(p))(); };
  m.body_argument = const_cast<void*>(static_cast<const void*>(&body));
  m.count = int(block.x * block.y * block.z);
  m.random.seed(unsigned(m.settings.order));
  blockDim = block;
  gridDim = grid;
  for (int c = 0; c < cluster_count(m.count); c++) reserve(m.clusters[c], m.count);
  CUSIM_RELEASE(&m.begin_token);
  try {
    run_blocks(grid, m.launches.back());
  } catch (...) {
    give_up_fibers();
    throw;
  }
}

}  // namespace cusim
