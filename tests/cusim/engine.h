// The machine of the simulator: one fiber per CUDA thread on one OS thread, blocks one after the other.
//
// Shared memory, global memory and kernels are ordinary memory and code, so sanitizers see every access. The functions
// here are the machine itself and are not instrumented.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "the simulator switches fibers in x86-64 assembly"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUSIM_POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define CUSIM_UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#else
#define CUSIM_POISON(p, n) (void)0
#define CUSIM_UNPOISON(p, n) (void)0
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUSIM_RELEASE(p) __tsan_release((void*)(p))
#define CUSIM_ACQUIRE(p) __tsan_acquire((void*)(p))
#else
#define CUSIM_RELEASE(p) (void)0
#define CUSIM_ACQUIRE(p) (void)0
#endif
#define CUSIM_MACHINE __attribute__((noinline, no_sanitize("address", "thread", "undefined")))

inline uint3 threadIdx, blockIdx;  // rewritten at every switch of fibers or blocks
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cusim {

// A rule of CUDA that the kernel or the launch breaks. Thrown out of the launch; the simulator stays usable.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  std::string name;
  dim3 grid, block;
  size_t dynamic_shared, static_shared;  // bytes; static: what the last block that ran had declared
  unsigned long blocks_run;
};

struct Device {  // as cudaDeviceGetAttribute and the limits of a launch report it
  int shared_optin = 227 << 10, shared_per_sm = 228 << 10, sm_count = 132, major = 9, minor = 0, ordinal = 0;
};

struct Settings {
  int order = 0;         // 0: threads and blocks ascending, 1: descending, else shuffled with this seed
  bool dry_run = false;  // check and record launches without running them
  Device device;
};

enum class State { kRun, kBlock, kWarp, kDone, kFailed };
struct Place {
  const char* what = "";
  const char* file = "";
  int line = 0;
};
struct Copy {
  void* to;
  const void* from;
  int bytes, source_bytes, group;
};
constexpr int kMaxCopies = 256, kMaxStatics = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10, kGuard = 4096;
#else
constexpr size_t kStack = 64 << 10, kGuard = 4096;
#endif

struct Fiber {
  void* stack_pointer;
  char* stack;
  void *asan, *tsan;
  State state;
  Place place;
  uint3 index;
  unsigned mask;                         // of the warp operation this lane waits in
  void* operand;                         // what it brings to that operation
  void (*operation)(void**, unsigned);   // done once for the warp, by the machine
  int vote;                              // what it brings to a block barrier
  unsigned parity, met_parity, barriers, full_syncs;  // which token is next
  Copy copies[kMaxCopies];               // a ring
  unsigned first_copy, copy_count;
  int group;
};

// What ThreadSanitizer takes for the happens-before edges of one block; each is used every other time, so that a thread
// which runs ahead adds no edge.
struct Tokens {
  char block[2], warp[32][2], lane[1024][2];
};

struct Shared {  // one block's shared memory, at the same addresses for every block
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kSpace = 8 << 20;
#else
  static constexpr size_t kSpace = 1 << 20;
#endif
  static constexpr size_t kGap = 256;
  char* space = nullptr;
  char *dynamic = nullptr, *arena = nullptr, *statics = nullptr;
  size_t dynamic_bytes = 0, arena_used = 0, static_used = 0, static_bytes = 0;
  std::map<std::pair<int, size_t>, char*> carved;
  struct {
    const void* key;
    char* memory;
  } known[kMaxStatics];
  int known_count = 0;
};

// What a block runs on. Under ThreadSanitizer blocks take turns on two, so that nothing orders a block and the next.
struct Cluster {
  Fiber* fibers = nullptr;
  char* stacks = nullptr;
  int capacity = 0;
  Shared shared;
  Tokens tokens;
};

struct Machine {
  Settings settings;
  std::vector<Launch> launches;
  std::map<const void*, int> optin;
  std::string last_error;
  cudaError_t last_status = cudaSuccess;
  std::mutex mutex;

  Cluster clusters[2];
  Cluster* cluster = clusters;
  Fiber* fibers = nullptr;             // of the current cluster
  int count = 0, current = -1;
  void (*body)(void*) = nullptr;
  void* body_argument = nullptr;
  void* main_stack_pointer = nullptr;
  void *main_asan = nullptr, *main_tsan = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  char begin_token, end_token, fence_token;
  int vote_sum = 0;
  std::mt19937 random;
  unsigned long switches = 0;
  char message[1024];
};
inline Machine machine;

inline Settings& settings() { return machine.settings; }
inline const std::vector<Launch>& launches() { return machine.launches; }
inline void reset_launches() { machine.launches.clear(); }
inline const std::string& last_error() { return machine.last_error; }

// memset that no sanitizer intercepts.
CUSIM_MACHINE inline void fill(void* p, int byte, size_t bytes) {
  asm volatile("rep stosb" : "+D"(p), "+c"(bytes) : "a"(byte) : "memory");
}

// Saves the registers that calls preserve, exchanges stacks, restores.
[[gnu::naked, gnu::noinline, gnu::no_profile_instrument_function, gnu::no_sanitize("address", "thread", "undefined")]]
inline void exchange_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

CUSIM_MACHINE inline void switch_to_main() {
  Machine& m = machine;
  Fiber& f = m.fibers[m.current];
  [[maybe_unused]] const bool leaves = f.state == State::kDone || f.state == State::kFailed;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaves ? nullptr : &f.asan, m.main_stack, m.main_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(m.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  exchange_stacks(&f.stack_pointer, m.main_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.asan, &m.main_stack, &m.main_stack_size);
#endif
}

CUSIM_MACHINE inline void switch_to_fiber(int i) {
  Machine& m = machine;
  Fiber& f = m.fibers[i];
  m.current = i;
  m.switches++;
  threadIdx = f.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.main_asan, f.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  exchange_stacks(&m.main_stack_pointer, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.main_asan, nullptr, nullptr);
#endif
  m.current = -1;
}

// Ends the launch with an Error: at once on the main stack, by way of it from a fiber (whose stack is given up).
[[noreturn]] CUSIM_MACHINE inline void fail(const char* format, ...) {
  Machine& m = machine;
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(m.message, sizeof m.message, format, arguments);
  va_end(arguments);
  n = std::min(n, int(sizeof m.message) - 1);
  if (m.current < 0) throw Error(m.last_error = m.message);
  snprintf(m.message + n, sizeof m.message - n, " (thread %u,%u,%u of block %u,%u,%u)", threadIdx.x, threadIdx.y,
           threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  m.fibers[m.current].state = State::kFailed;
  CUSIM_RELEASE(&m.end_token);
  switch_to_main();
  abort();
}

CUSIM_MACHINE inline void fiber_entry() {
  Machine& m = machine;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.main_stack, &m.main_stack_size);
#endif
  CUSIM_ACQUIRE(&m.begin_token);
  m.body(m.body_argument);
  Fiber& f = m.fibers[m.current];
  if (f.copy_count > 0) fail("a thread returns while its cp.async copies are under way");
  CUSIM_RELEASE(&m.end_token);
  f.state = State::kDone;
  switch_to_main();
  abort();
}

// Waits for all threads of the block; the sum of their votes.
CUSIM_MACHINE inline int wait_block(Place place, int vote) {
  Machine& m = machine;
  Fiber& f = m.fibers[m.current];
  f.state = State::kBlock;
  f.place = place;
  f.vote = vote;
  [[maybe_unused]] char* token = &m.cluster->tokens.block[f.barriers++ & 1];
  CUSIM_RELEASE(token);
  switch_to_main();
  CUSIM_ACQUIRE(token);
  return m.vote_sum;
}

// What __syncwarp does for the warp: nothing but wait. It alone of the warp operations orders memory accesses.
CUSIM_MACHINE inline void meet(void**, unsigned) {}

// Waits for all lanes of the mask, whose operands the machine then hands to the operation together.
CUSIM_MACHINE inline void wait_warp(Place place, unsigned mask, void* operand, void (*operation)(void**, unsigned)) {
  Machine& m = machine;
  Fiber& f = m.fibers[m.current];
  if (!(mask >> (m.current & 31) & 1)) fail("%s by a lane that its mask %08x leaves out", place.what, mask);
  f.state = State::kWarp;
  f.place = place;
  f.mask = mask;
  f.operand = operand;
  f.operation = operation;
#if defined(__SANITIZE_THREAD__)
  if (operation != meet) return switch_to_main();
  if (mask == 0xffffffffu) {
    char* token = &m.cluster->tokens.warp[m.current >> 5][f.full_syncs++ & 1];
    CUSIM_RELEASE(token);
    switch_to_main();
    CUSIM_ACQUIRE(token);
    return;
  }
  f.parity ^= 1;
  CUSIM_RELEASE(&m.cluster->tokens.lane[m.current][f.parity]);
  switch_to_main();
  for (int lane = 0; lane < 32; lane++) {
    const int peer = (m.current & ~31) + lane;
    if (mask >> lane & 1) CUSIM_ACQUIRE(&m.cluster->tokens.lane[peer][m.fibers[peer].met_parity]);
  }
#else
  switch_to_main();
#endif
}

// Room for the fibers of a launch.
CUSIM_MACHINE inline void reserve_fibers(Cluster& c, int n) {
  const size_t stride = kStack + kGuard;
  if (n > c.capacity) {
    if (c.stacks != nullptr) munmap(c.stacks, c.capacity * stride);
    c.fibers = static_cast<Fiber*>(realloc(static_cast<void*>(c.fibers), n * sizeof(Fiber)));
    c.stacks = static_cast<char*>(
        mmap(nullptr, n * stride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (c.fibers == nullptr || c.stacks == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < n; i++) {
      if (i >= c.capacity) c.fibers[i].tsan = nullptr;
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
    void** top = reinterpret_cast<void**>(f.stack + kStack - 64);
    fill(top - 8, 0, 8 * sizeof(void*));
    top[-2] = reinterpret_cast<void*>(fiber_entry);  // where the first exchange returns to, 16-byte stack alignment kept
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
        fail("deadlock: %s at %s:%d waits for lane %d of warp %d, which %s", f.place.what, f.place.file, f.place.line, l,
             first / 32, l >= lanes ? "the block does not have" : "has returned");
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
    if (p.line != at.line || strcmp(p.file, at.file) != 0 || strcmp(p.what, at.what) != 0) other = i;
  }
  if (waiting >= 0 && other < 0) {
    for (int i = 0; i < m.count; i++) m.fibers[i].state = State::kRun;
    return;
  }
  const Fiber& f = m.fibers[other];
  const bool barrier = waiting >= 0;
  fail("%s: thread %d of block %u,%u,%u waits in %s at %s:%d, while thread %d %s %s at %s:%d",
       barrier ? "divergent barrier" : "deadlock", barrier ? waiting : other, blockIdx.x, blockIdx.y, blockIdx.z, at.what,
       at.file, at.line, other, f.state == State::kDone ? "has returned; its last wait was" : "waits in", f.place.what,
       f.place.file, f.place.line);
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

// ---- Shared memory -----------------------------------------------------------------------------------------------

// Fresh memory for a block: NaN in every number format, poisoned wherever the launch has none.
CUSIM_MACHINE inline void prepare_shared(size_t dynamic_bytes) {
  Shared& s = machine.cluster->shared;
  if (s.space == nullptr)
    s.space = static_cast<char*>(
        mmap(nullptr, Shared::kSpace, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  CUSIM_POISON(s.space, Shared::kSpace);
  s.dynamic = s.space + 1024 + 128;  // 128-byte aligned and no more
  s.statics = s.space + (1 << 19);
  s.arena = s.space + (1 << 20);
  s.dynamic_bytes = dynamic_bytes;
  s.arena_used = s.static_used = s.static_bytes = 0;
  s.known_count = 0;
  s.carved.clear();
  CUSIM_UNPOISON(s.dynamic, dynamic_bytes);
  fill(s.dynamic, 0xff, dynamic_bytes);
}

CUSIM_MACHINE inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(machine.cluster->shared.dynamic);
}

// The array at an offset of dynamic shared memory. Under AddressSanitizer each lies alone between poisoned gaps (and
// overlays do not overlap); otherwise at its true place, so that ThreadSanitizer sees overlays collide.
CUSIM_MACHINE inline void* carve_shared(unsigned char* base, int offset, size_t bytes, int align) {
  Shared& s = machine.cluster->shared;
  if (reinterpret_cast<char*>(base) != s.dynamic) fail("SharedArena: the base is not dynamic shared memory");
  if (align > 128 || (align & (align - 1)) != 0) fail("SharedArena: alignment %d, must be a power of 2 up to 128", align);
  if (offset + bytes > s.dynamic_bytes)
    fail("SharedArena: %zu bytes at offset %d, but the launch has %zu bytes of dynamic shared memory", bytes, offset,
         s.dynamic_bytes);
#if defined(__SANITIZE_ADDRESS__)
  CUSIM_POISON(s.dynamic, s.dynamic_bytes);
  char*& place = s.carved[{offset, bytes}];
  if (place == nullptr) {
    place = s.arena + s.arena_used + Shared::kGap + offset % 128;  // the banks stay what they are
    s.arena_used += Shared::kGap * 2 + (bytes + 127) / 128 * 128;
    if (s.arena + s.arena_used > s.space + Shared::kSpace) fail("SharedArena: too many different overlays");
    CUSIM_UNPOISON(place, bytes);
    fill(place, 0xff, bytes);
  }
  return place;
#else
  return base + offset;
#endif
}

CUSIM_MACHINE inline void* static_shared(const void* key, size_t bytes, size_t align) {
  Shared& s = machine.cluster->shared;
  for (int i = 0; i < s.known_count; i++)
    if (s.known[i].key == key) return s.known[i].memory;
  if (s.known_count == kMaxStatics) fail("over %d static shared objects", kMaxStatics);
  s.static_bytes = (s.static_bytes + align - 1) / align * align + bytes;
  if (s.static_bytes > 48 << 10) fail("%zu bytes of static shared memory, over 48 KiB", s.static_bytes);
  if (s.static_bytes + s.dynamic_bytes > size_t(machine.settings.device.shared_optin))
    fail("%zu static and %zu dynamic bytes of shared memory, over the device's %d", s.static_bytes, s.dynamic_bytes,
         machine.settings.device.shared_optin);
  char* memory = s.statics + s.static_used + Shared::kGap + (align < 16 ? align : 0);  // aligned no better than it must be
  s.static_used += Shared::kGap * 2 + (bytes + 127) / 128 * 128;
  s.known[s.known_count++] = {key, memory};
  CUSIM_UNPOISON(memory, bytes);
  fill(memory, 0xff, bytes);
  return memory;
}

CUSIM_MACHINE inline void check_shared(const void* p, int bytes, int align, const char* what) {
  const Shared& s = machine.cluster->shared;
  const char* c = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % align != 0) fail("%s: misaligned address, must be a multiple of %d", what, align);
  if (c < s.space || c >= s.space + Shared::kSpace) fail("%s: not an address in shared memory", what);
  bool inside = c >= s.dynamic && c + bytes <= s.dynamic + s.dynamic_bytes;
  inside |= c >= s.statics && c + bytes <= s.statics + s.static_used;
  inside |= c >= s.arena && c + bytes <= s.arena + s.arena_used;
  if (!inside) fail("%s: out of bounds of shared memory", what);
}

CUSIM_MACHINE inline void check_global(const void* p, int align, const char* what) {
  const Shared& s = machine.cluster->shared;
  const char* c = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % align != 0) fail("%s: misaligned address, must be a multiple of %d", what, align);
  if (c >= s.space && c < s.space + Shared::kSpace) fail("%s: a shared address where a global one belongs", what);
}

// ---- Launches ----------------------------------------------------------------------------------------------------

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
    fail("launch of %s: %zu bytes of dynamic shared memory, over the %zu that the kernel opted in to", name, shared_bytes,
         limit);
}

// How many clusters the blocks of a launch take turns on; ThreadSanitizer needs a megabyte per fiber.
inline int cluster_count([[maybe_unused]] int threads) {
#if defined(__SANITIZE_THREAD__)
  return threads <= 512 ? 2 : 1;
#else
  return 1;
#endif
}

CUSIM_MACHINE inline void run_blocks(dim3 grid, Launch& record) {
  Machine& m = machine;
  const unsigned long total = 1ul * grid.x * grid.y * grid.z;
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
  m.launches.push_back({name, grid, block, shared_bytes, 0, 0});
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
  for (int c = 0; c < cluster_count(m.count); c++) reserve_fibers(m.clusters[c], m.count);
  CUSIM_RELEASE(&m.begin_token);
  try {
    run_blocks(grid, m.launches.back());
  } catch (...) {
    give_up_fibers();
    throw;
  }
}

}  // namespace cusim
