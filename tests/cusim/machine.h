// The machine of the simulator: one fiber per CUDA thread, all on one OS thread, and what a thread does to wait or
// fail.
//
// Shared memory, global memory and kernels are ordinary memory and code, so sanitizers see every access. The functions
// here are the machine itself and are not instrumented. A thread runs until it waits: one that spins until another has
// written something hangs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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
#define CUSIM_UNSEEN __attribute__((no_sanitize("address", "thread", "undefined")))
#define CUSIM_MACHINE CUSIM_UNSEEN __attribute__((noinline))

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
  unsigned long blocks, blocks_run;
};

struct Device {  // as cudaDeviceGetAttribute and the limits of a launch report it
  int shared_optin = 227 << 10, shared_per_sm = 228 << 10, sm_count = 132, major = 9, minor = 0, ordinal = 0;
};

inline const char* variable(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value == nullptr ? otherwise : value;
}

struct Settings {
  // 0: threads and blocks ascending, 1: descending, else shuffled with this seed
  int order = atoi(variable("CUSIM_ORDER", "0"));
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
  unsigned mask;                                      // of the warp operation this lane waits in
  void* operand;                                      // what it brings to that operation
  void (*operation)(void**, unsigned);                // done once for the warp, by the machine
  int vote;                                           // what it brings to a block barrier
  unsigned parity, met_parity, barriers, full_syncs;  // which token is next
  Copy* copies;                                       // a ring of kMaxCopies
  unsigned first_copy, copy_count;
  int group;
};

// What ThreadSanitizer takes for the happens-before edges inside a block, and from its end to the next block on the
// same cluster. The pairs are used in turn, so that a thread which runs ahead adds no edge.
struct Tokens {
  char block[2], warp[32][2], lane[1024][2], end;
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
  Copy* copies = nullptr;
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
  Fiber* fibers = nullptr;  // of the current cluster
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
  CUSIM_ACQUIRE(&m.cluster->tokens.end);
  m.body(m.body_argument);
  Fiber& f = m.fibers[m.current];
  if (f.copy_count > 0) fail("a thread returns while its cp.async copies are under way");
  CUSIM_RELEASE(&m.end_token);
  CUSIM_RELEASE(&m.cluster->tokens.end);
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

}  // namespace cusim
