// Include this before a CUDA source (g++ -include cusim.h -x c++ kernels.cu) to compile its kernels and their launches
// for the CPU, with one fiber per CUDA thread. Made for -fsanitize=address,undefined and -fsanitize=thread.
//
// Kernels reach the hardware through csrc/cuda/device.h, which calls the functions below; the rest is CUDA's own
// vocabulary: threadIdx, __syncthreads, shuffles, votes, atomics, fast mathematics, a little of the runtime's API.
// A rule that is broken ends the launch with a cusim::Error; engine.h has settings() and launches().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ "use FIF_STATIC_SHARED or FIF_SHARED of device.h"

#include "engine.h"

namespace cusim {

// A declaration's own key, by the type of a lambda, tells static shared objects apart.
template <class T, class Key>
T& static_shared(Key) {
  static const char key = 0;
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T)));
}

template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  typedef uint64_t type __attribute__((vector_size(16), may_alias));
};
template <>
struct WordOf<8> {
  typedef uint64_t type __attribute__((may_alias));
};
template <>
struct WordOf<4> {
  typedef uint32_t type __attribute__((may_alias));
};
template <>
struct WordOf<2> {
  typedef uint16_t type __attribute__((may_alias));
};
template <int Bytes>
using Word = typename WordOf<Bytes>::type;

CUSIM_MACHINE inline void check_aligned(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("%s: misaligned address, must be a multiple of %d", what, bytes);
}
template <class V>
V load_vector(const void* p) {
  check_aligned(p, sizeof(V), "vector load");
  const auto word = *static_cast<const volatile Word<sizeof(V)>*>(p);
  V v;
  memcpy(static_cast<void*>(&v), const_cast<const Word<sizeof(V)>*>(&word), sizeof v);
  return v;
}
template <class V>
void store_vector(void* p, const V& v) {
  check_aligned(p, sizeof(V), "vector store");
  Word<sizeof(V)> word;
  memcpy(&word, static_cast<const void*>(&v), sizeof v);
  *static_cast<volatile Word<sizeof(V)>*>(p) = word;
}
template <class V>
V load_global(const void* p) {
  check_global(p, sizeof(V), "global load");
  return load_vector<V>(p);
}
template <class V>
void store_global(void* p, const V& v) {
  check_global(p, sizeof(V), "global store");
  store_vector(p, v);
}

CUSIM_MACHINE inline void queue_copy(const Copy& copy) {
  Fiber& f = machine.fibers[machine.current];
  if (copy.source_bytes < 0 || copy.source_bytes > copy.bytes)
    fail("cp.async: %d source bytes, must be 0..%d", copy.source_bytes, copy.bytes);
  check_shared(copy.to, copy.bytes, copy.bytes, "cp.async destination");
  check_global(copy.from, copy.bytes, "cp.async source");
  if (f.copy_count == kMaxCopies) fail("cp.async: over %d copies under way in one thread", kMaxCopies);
  Copy& entry = f.copies[(f.first_copy + f.copy_count++) % kMaxCopies];
  entry = copy;
  entry.group = f.group;
}

// Takes the oldest copy off the queue, if its group is older than the newest `pending_groups`.
CUSIM_MACHINE inline bool next_copy(int pending_groups, Copy& copy) {
  Fiber& f = machine.fibers[machine.current];
  if (f.copy_count == 0 || f.copies[f.first_copy].group >= f.group - pending_groups) return false;
  copy = f.copies[f.first_copy];
  f.first_copy = (f.first_copy + 1) % kMaxCopies;
  f.copy_count--;
  return true;
}

template <int Bytes>
void move_word(void* to, const void* from, int source_bytes) {
  Word<Bytes> word{};
  if (source_bytes == Bytes) {
    word = *static_cast<const volatile Word<Bytes>*>(from);
  } else {
    for (int i = 0; i < source_bytes; i++)
      reinterpret_cast<char*>(&word)[i] = static_cast<const volatile char*>(from)[i];
  }
  *static_cast<volatile Word<Bytes>*>(to) = word;
}

// The data arrives at the wait. Until then the destination holds NaN: a read that comes too early shows, and so does
// one that comes too late for what was there before.
template <int Bytes>
void copy_async(void* shared, const void* global, int source_bytes) {
  queue_copy({shared, global, Bytes, source_bytes, 0});
  move_word<Bytes>(shared, global, source_bytes);  // both accesses where they are asked for, for the sanitizers
  *static_cast<volatile Word<Bytes>*>(shared) = ~Word<Bytes>{};
}
CUSIM_MACHINE inline void copy_async_commit() { machine.fibers[machine.current].group++; }
inline void copy_async_wait(int pending_groups) {
  Copy copy;
  while (next_copy(pending_groups, copy)) {
    if (copy.bytes == 16) move_word<16>(copy.to, copy.from, copy.source_bytes);
    if (copy.bytes == 8) move_word<8>(copy.to, copy.from, copy.source_bytes);
    if (copy.bytes == 4) move_word<4>(copy.to, copy.from, copy.source_bytes);
  }
}

template <class Operand>
void warp_operation(Place place, unsigned mask, Operand& operand, void (*operation)(void**, unsigned)) {
  wait_warp(place, mask, &operand, operation);
}

template <class T>
struct Shuffle {
  T value;
  int source;  // a lane, or negative: keep the value
  CUSIM_MACHINE static void run(void** operands, unsigned mask) {
    T result[32];
    for (int l = 0; l < 32; l++) {
      if (!(mask >> l & 1)) continue;
      const int s = static_cast<Shuffle*>(operands[l])->source;
      if (s >= 0 && !(mask >> s & 1))
        fail("shuffle: lane %d reads lane %d, which the mask %08x leaves out", l, s, mask);
      result[l] = static_cast<Shuffle*>(operands[s < 0 ? l : s])->value;
    }
    for (int l = 0; l < 32; l++)
      if (mask >> l & 1) static_cast<Shuffle*>(operands[l])->value = result[l];
  }
};
CUSIM_MACHINE inline int lane() { return machine.current & 31; }
template <class T>
T shuffle(Place place, unsigned mask, T value, int source) {
  Shuffle<T> operand{value, source};
  wait_warp(place, mask, &operand, Shuffle<T>::run);
  return operand.value;
}

struct Ballot {
  unsigned vote;
  CUSIM_MACHINE static void run(void** operands, unsigned mask) {
    unsigned votes = 0;
    for (int l = 0; l < 32; l++)
      if (mask >> l & 1) votes |= unsigned(static_cast<Ballot*>(operands[l])->vote != 0) << l;
    for (int l = 0; l < 32; l++)
      if (mask >> l & 1) static_cast<Ballot*>(operands[l])->vote = votes;
  }
};
inline unsigned ballot(Place place, unsigned mask, bool vote) {
  Ballot operand{vote};
  wait_warp(place, mask, &operand, Ballot::run);
  return operand.vote;
}
// Lanes exchange the addresses of rows; each then reads its own numbers, so that the sanitizers see who reads what.
template <int Matrices, bool Transposed>
struct MatrixLoad {
  const uint16_t* row;
  const uint16_t* from[Matrices][2];  // the rows of the low and the high half of each register
  CUSIM_MACHINE static void run(void** operands, unsigned) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < Matrices * 2; i++) {
        const int row = i / 2 * 8 + (Transposed ? l % 4 * 2 + i % 2 : l / 4);
        static_cast<MatrixLoad*>(operands[l])->from[i / 2][i % 2] = static_cast<MatrixLoad*>(operands[row])->row;
      }
  }
};
template <int Matrices, bool Transposed>
void load_matrix(uint32_t* result, const void* row) {
  MatrixLoad<Matrices, Transposed> operand{static_cast<const uint16_t*>(row), {}};
  if (lane() < 8 * Matrices) check_shared(row, 16, 16, "ldmatrix");
  wait_warp({"ldmatrix"}, 0xffffffffu, &operand, MatrixLoad<Matrices, Transposed>::run);
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < Matrices; i++) {
    if (Transposed) {
      const unsigned low = *static_cast<const volatile Word<2>*>(operand.from[i][0] + g);
      const unsigned high = *static_cast<const volatile Word<2>*>(operand.from[i][1] + g);
      result[i] = low | high << 16;
    } else {
      result[i] = *reinterpret_cast<const volatile Word<4>*>(operand.from[i][0] + t * 2);
    }
  }
}

// D(16x8) += A(16xK) B(Kx8). `decode` turns a lane's registers into the numbers of the fragment, in PTX order.
struct Multiply {
  float* d;
  const uint32_t *a, *b;
};
CUSIM_MACHINE inline void multiply_add(void** operands, const float* a, const float* b, int depth) {
  for (int l = 0; l < 32; l++) {
    float* d = static_cast<Multiply*>(operands[l])->d;
    for (int i = 0; i < 4; i++) {
      const float* row = a + (l / 4 + i / 2 * 8) * depth;
      const float* column = b + (l % 4 * 2 + i % 2) * depth;
      float sum = 0;
      for (int k = 0; k < depth; k++) sum += row[k] * column[k];
      d[i] += sum;
    }
  }
}
CUSIM_UNSEEN inline float half_to_float(uint16_t bits) {
  const unsigned sign = unsigned(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;  // exact, subnormal numbers included
  return std::bit_cast<float>(sign | std::bit_cast<unsigned>(magnitude));
}
template <class T>
CUSIM_MACHINE void multiply_16bit_run(void** operands, unsigned) {
  float a[16 * 16], b[8 * 16];  // B by columns
  auto number = [](uint32_t word, int half) {
    const uint16_t bits = uint16_t(word >> (16 * half));
    return std::is_same_v<T, __half> ? half_to_float(bits) : std::bit_cast<float>(uint32_t(bits) << 16);
  };
  for (int l = 0; l < 32; l++) {
    const Multiply& lane = *static_cast<Multiply*>(operands[l]);
    const int g = l / 4, t = l % 4;
    for (int half = 0; half < 2; half++) {
      for (int r = 0; r < 4; r++) a[(g + r % 2 * 8) * 16 + t * 2 + r / 2 * 8 + half] = number(lane.a[r], half);
      for (int r = 0; r < 2; r++) b[g * 16 + t * 2 + r * 8 + half] = number(lane.b[r], half);
    }
  }
  multiply_add(operands, a, b, 16);
}
CUSIM_MACHINE inline void multiply_tf32_run(void** operands, unsigned) {
  float a[16 * 8], b[8 * 8];
  auto number = [](uint32_t word) {
    return std::bit_cast<float>(word & 0xffffe000u);
  };  // the hardware ignores the rest
  for (int l = 0; l < 32; l++) {
    const Multiply& lane = *static_cast<Multiply*>(operands[l]);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; r++) a[(g + r % 2 * 8) * 8 + t + r / 2 * 4] = number(lane.a[r]);
    for (int r = 0; r < 2; r++) b[g * 8 + t + r * 4] = number(lane.b[r]);
  }
  multiply_add(operands, a, b, 8);
}
template <class T>
void multiply_16bit(float* d, const uint32_t* a, const uint32_t* b) {
  Multiply operand{d, a, b};
  wait_warp({"mma m16n8k16"}, 0xffffffffu, &operand, multiply_16bit_run<T>);
}
inline void multiply_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  Multiply operand{d, a, b};
  wait_warp({"mma m16n8k8"}, 0xffffffffu, &operand, multiply_tf32_run);
}
inline uint32_t to_tf32(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > settings().device.shared_optin) return machine.last_status = cudaErrorInvalidValue;
  machine.optin[kernel] = value;
  return cudaSuccess;
}
inline cudaError_t take_last_error() { return std::exchange(machine.last_status, cudaSuccess); }
inline cudaError_t get_device(int* ordinal) {
  *ordinal = settings().device.ordinal;
  return cudaSuccess;
}
inline cudaError_t set_device(int ordinal) {
  settings().device.ordinal = ordinal;
  return cudaSuccess;
}
inline cudaError_t get_attribute(int* value, cudaDeviceAttr attribute, int) {
  const Device& d = settings().device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = d.sm_count; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_optin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_sm; break;
    case cudaDevAttrComputeCapabilityMajor: *value = d.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.minor; break;
    default: return machine.last_status = cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
inline const char* error_string(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "error";
}

}  // namespace cusim

#define cudaFuncSetAttribute ::cusim::set_function_attribute
#define cudaGetLastError ::cusim::take_last_error
#define cudaPeekAtLastError() (::cusim::machine.last_status)
#define cudaGetDevice ::cusim::get_device
#define cudaSetDevice ::cusim::set_device
#define cudaDeviceGetAttribute ::cusim::get_attribute
#define cudaGetErrorString ::cusim::error_string

#define CUSIM_PLACE(what) \
  ::cusim::Place { what, file, line }
#define CUSIM_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUSIM_WHERE) { cusim::wait_block(CUSIM_PLACE("__syncthreads"), 0); }
inline int __syncthreads_count(int v, CUSIM_WHERE) {
  return cusim::wait_block(CUSIM_PLACE("__syncthreads_count"), v != 0);
}
inline int __syncthreads_or(int v, CUSIM_WHERE) {
  return cusim::wait_block(CUSIM_PLACE("__syncthreads_or"), v != 0) != 0;
}
inline int __syncthreads_and(int v, CUSIM_WHERE) {
  return cusim::wait_block(CUSIM_PLACE("__syncthreads_and"), v == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUSIM_WHERE) {
  cusim::wait_warp(CUSIM_PLACE("__syncwarp"), mask, nullptr, cusim::meet);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, CUSIM_WHERE) {
  const int lane = cusim::lane();
  return cusim::shuffle(CUSIM_PLACE("__shfl_sync"), mask, v, (lane & -width) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int flip, int width = 32, CUSIM_WHERE) {
  const int lane = cusim::lane(), source = lane ^ flip;
  return cusim::shuffle(CUSIM_PLACE("__shfl_xor_sync"), mask, v, source >= (lane & -width) + width ? -1 : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned step, int width = 32, CUSIM_WHERE) {
  const int lane = cusim::lane(), source = lane + int(step);
  return cusim::shuffle(CUSIM_PLACE("__shfl_down_sync"), mask, v, source >= (lane & -width) + width ? -1 : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned step, int width = 32, CUSIM_WHERE) {
  const int lane = cusim::lane(), source = lane - int(step);
  return cusim::shuffle(CUSIM_PLACE("__shfl_up_sync"), mask, v, source < (lane & -width) ? -1 : source);
}
inline unsigned __ballot_sync(unsigned mask, int v, CUSIM_WHERE) {
  return cusim::ballot(CUSIM_PLACE("__ballot_sync"), mask, v != 0);
}
inline int __any_sync(unsigned mask, int v, CUSIM_WHERE) {
  return cusim::ballot(CUSIM_PLACE("__any_sync"), mask, v != 0) != 0;
}
inline int __all_sync(unsigned mask, int v, CUSIM_WHERE) {
  return cusim::ballot(CUSIM_PLACE("__all_sync"), mask, v != 0) == mask;
}
#undef CUSIM_PLACE
#undef CUSIM_WHERE

// Orders what this thread did before the fence with what others do after theirs.
inline void __threadfence() {
  CUSIM_ACQUIRE(&cusim::machine.fence_token);
  CUSIM_RELEASE(&cusim::machine.fence_token);
}
inline void __threadfence_block() { __threadfence(); }

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return std::atomic_ref<T>(*p).exchange(v, std::memory_order_relaxed);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  std::atomic_ref<T>(*p).compare_exchange_strong(expected, v, std::memory_order_relaxed);
  return expected;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  T old = std::atomic_ref<T>(*p).load(std::memory_order_relaxed);
  while (old < v && !std::atomic_ref<T>(*p).compare_exchange_weak(old, v, std::memory_order_relaxed)) continue;
  return old;
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  T old = std::atomic_ref<T>(*p).load(std::memory_order_relaxed);
  while (v < old && !std::atomic_ref<T>(*p).compare_exchange_weak(old, v, std::memory_order_relaxed)) continue;
  return old;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, const T& v) {
  *p = v;
}

inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline float __frsqrt_rn(float v) { return 1 / std::sqrt(v); }
inline float __frcp_rn(float v) { return 1 / v; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __saturatef(float v) { return v > 0 ? v < 1 ? v : 1.f : 0.f; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(unsigned(v)); }
inline int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(unsigned(v)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
using std::max;
using std::min;
