// The only header through which the kernels meet the hardware (sm_80 and newer, mma.sync and cp.async).
//
// nvcc compiles it for GPUs. A host compiler may compile the same kernels over a simulator whose header was included
// before this one: each operation below then calls the simulator's function of the same meaning. Thread blocks are
// expected to be one-dimensional, so that threadIdx.x % 32 is the lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define FIF_HOST_DEVICE __host__ __device__ __forceinline__
#define FIF_DEVICE __device__ __forceinline__

#if defined(__CUDACC__)
#define FIF_UNROLL _Pragma("unroll")
#define FIF_UNROLL_2 _Pragma("unroll 2")
#define FIF_NO_UNROLL _Pragma("unroll 1")
// Declares `unsigned char name[]`, the dynamic shared memory; give it to a SharedArena.
#define FIF_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// Declares a static shared object: FIF_STATIC_SHARED(sums, float[4][32]);
#define FIF_STATIC_SHARED(name, ...) __shared__::fif::gpu::Same<__VA_ARGS__> name
#else
// The simulator gains nothing by unrolling, and would compile long.
#define FIF_UNROLL _Pragma("GCC unroll 1")
#define FIF_UNROLL_2 FIF_UNROLL
#define FIF_NO_UNROLL FIF_UNROLL
#define FIF_SHARED(name) unsigned char* const name = ::cusim::dynamic_shared()
#define FIF_STATIC_SHARED(name, ...) auto& name = ::cusim::static_shared<__VA_ARGS__>([] {})
#endif

// FIF_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...): launches and returns a cudaError_t. A kernel
// with a comma in its template arguments goes in parentheses.
#define FIF_LAUNCH(kernel, ...) ::fif::gpu::launch(#kernel, kernel, __VA_ARGS__)

namespace fif::gpu {

template <class T>
using Same = T;  // lets an array type stand before a name

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kDefaultSharedLimit = 48 << 10;  // bytes of dynamic shared memory that need no opt-in

template <class... Parameters, class... Arguments>
[[nodiscard]] cudaError_t launch([[maybe_unused]] const char* name, void (*kernel)(Parameters...), dim3 grid,
                                 dim3 block, size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096 - 8 * sizeof...(Parameters), "over the limit of all GPUs");
  if (shared_bytes > kDefaultSharedLimit) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next check of somebody else reports it
      return error;
    }
  }
#if defined(__CUDACC__)
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
#else
  ::cusim::launch(
      name, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); }, grid, block, shared_bytes, stream);
#endif
  return cudaGetLastError();
}

// Offsets of arrays in dynamic shared memory. The host sizes a launch with the same calls that the kernel's SharedArena
// makes.
class SharedLayout {
 public:
  // The byte offset of `count` elements of T; a multiple of `align`, at least 16.
  template <class T>
  FIF_HOST_DEVICE constexpr int take(int count, int align = 16) {
    const int start = (next_ + align - 1) / align * align;
    next_ = start + count * int(sizeof(T));
    if (next_ > bytes_) bytes_ = next_;
    return start;
  }
  FIF_HOST_DEVICE constexpr int mark() const { return next_; }
  // What is taken from here on overlays what was taken since the mark, and starts with undefined contents.
  FIF_HOST_DEVICE constexpr void rewind(int mark) { next_ = mark; }
  // Bytes needed for everything taken so far, overlays counted once.
  FIF_HOST_DEVICE constexpr int bytes() const { return bytes_; }

 private:
  int next_ = 0, bytes_ = 0;
};

// Typed arrays in dynamic shared memory. All threads make the same calls. In a kernel that makes an arena, all dynamic
// shared memory is reached through it.
class SharedArena {
 public:
  FIF_DEVICE explicit SharedArena(unsigned char* base) : base_(base) {}
  template <class T>
  FIF_DEVICE T* take(int count, int align = 16) {
    const int start = layout_.take<T>(count, align);
#if defined(__CUDACC__)
    return reinterpret_cast<T*>(base_ + start);
#else
    return static_cast<T*>(::cusim::carve_shared(base_, start, size_t(count) * sizeof(T), align));
#endif
  }
  FIF_DEVICE int mark() const { return layout_.mark(); }
  FIF_DEVICE void rewind(int mark) { layout_.rewind(mark); }
  FIF_DEVICE int bytes() const { return layout_.bytes(); }

 private:
  unsigned char* base_;
  SharedLayout layout_;
};

FIF_DEVICE float to_float(float v) { return v; }
FIF_DEVICE float to_float(__half v) { return __half2float(v); }
FIF_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// The nearest T.
template <class T>
FIF_DEVICE T from_float(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    static_assert(std::is_same_v<T, float>);
    return v;
  }
}

// The same bits as another type of the same size. By the compiler itself where it agrees (not for pairs of halves):
// after memcpy nvcc loads vectors byte by byte.
template <class To, class From>
FIF_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  if constexpr (std::is_trivially_copyable_v<To> && std::is_trivially_copyable_v<From>) {
    return __builtin_bit_cast(To, from);
  } else {
    To to;
    memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof to);
    return to;
  }
}

// Two numbers, rounded to the 16-bit type T, in one register; the first in the low half.
template <class T>
FIF_DEVICE uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  }
}

// The two numbers of a register as packed by pack2.
template <class T>
FIF_DEVICE float2 unpack2(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(bit_cast<__half2>(pair));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return make_float2(bit_cast<float>(pair << 16), bit_cast<float>(pair & 0xffff0000u));
  }
}

// The nearest tf32 number (ties away from zero) as the register that mma_tf32 takes.
FIF_DEVICE uint32_t to_tf32(float v) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
#else
  return ::cusim::to_tf32(v);
#endif
}

// N elements that move in one access of N * sizeof(T) = 2, 4, 8 or 16 bytes, aligned to that.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  static constexpr int kSize = N;
  T v[N];
  FIF_DEVICE T& operator[](int i) { return v[i]; }
  FIF_DEVICE const T& operator[](int i) const { return v[i]; }
};

#if defined(__CUDACC__)
template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <class V>
using Word = typename WordOf<sizeof(V)>::type;
#endif

// Any memory: Vec<T, N> v = vec_load<N>(p).
template <int N, class T>
FIF_DEVICE Vec<T, N> vec_load(const T* p) {
#if defined(__CUDACC__)
  using V = Vec<T, N>;
  return bit_cast<V>(*reinterpret_cast<const Word<V>*>(p));
#else
  return ::cusim::load_vector<Vec<T, N>>(p);
#endif
}

// Global memory that nothing writes during the launch (ld.global.nc).
template <int N, class T>
FIF_DEVICE Vec<T, N> vec_load_const(const T* p) {
#if defined(__CUDACC__)
  using V = Vec<T, N>;
  return bit_cast<V>(__ldg(reinterpret_cast<const Word<V>*>(p)));
#else
  return ::cusim::load_global<Vec<T, N>>(p);
#endif
}

// Global memory that is read once (ld.global.cs: first to leave the caches).
template <int N, class T>
FIF_DEVICE Vec<T, N> vec_load_stream(const T* p) {
#if defined(__CUDACC__)
  using V = Vec<T, N>;
  return bit_cast<V>(__ldcs(reinterpret_cast<const Word<V>*>(p)));
#else
  return ::cusim::load_global<Vec<T, N>>(p);
#endif
}

// Any memory.
template <class T, int N>
FIF_DEVICE void vec_store(T* p, const Vec<T, N>& v) {
#if defined(__CUDACC__)
  *reinterpret_cast<Word<Vec<T, N>>*>(p) = bit_cast<Word<Vec<T, N>>>(v);
#else
  ::cusim::store_vector(p, v);
#endif
}

// Global memory that is not read again soon (st.global.cs).
template <class T, int N>
FIF_DEVICE void vec_store_stream(T* p, const Vec<T, N>& v) {
#if defined(__CUDACC__)
  __stcs(reinterpret_cast<Word<Vec<T, N>>*>(p), bit_cast<Word<Vec<T, N>>>(v));
#else
  ::cusim::store_global(p, v);
#endif
}

// One element of global memory that nothing writes during the launch.
template <class T>
FIF_DEVICE T load_const(const T* p) {
  return vec_load_const<1>(p)[0];
}

#if defined(__CUDACC__)
FIF_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#endif

// Starts a copy of Bytes (4, 8 or 16; both addresses aligned to that); only the first `source_bytes` are read, the rest
// is zero. 16 bytes pass by the L1 cache.
template <int Bytes>
FIF_DEVICE void cp_async_part(void* shared, const void* global, int source_bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#if defined(__CUDACC__)
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
  }
#else
  ::cusim::copy_async<Bytes>(shared, global, source_bytes);
#endif
}

// Starts a copy of Bytes, or of zeros where not `valid`; `global` is then not read, but must be a sane address.
template <int Bytes>
FIF_DEVICE void cp_async(void* shared, const void* global, bool valid = true) {
  cp_async_part<Bytes>(shared, global, valid ? Bytes : 0);
}

// Closes the group of this thread's copies since the last commit.
FIF_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ::cusim::copy_async_commit();
#endif
}

// Waits until at most the N newest groups of this thread are under way; a barrier shows the data to other threads.
template <int N>
FIF_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  ::cusim::copy_async_wait(N);
#endif
}

// Tensor cores. All 32 lanes take part.
//
// g = lane / 4, t = lane % 4. Accumulators of every shape: d[0..3] = D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1].

// Four 8x8 matrices of 16-bit elements; lane 8i + r names row r (16 aligned bytes) of matrix i. Register i of a lane
// holds elements (g, 2t) and (g, 2t+1) of matrix i.
FIF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  ::cusim::load_matrix<4, false>(r, row);
#endif
}

// As ldmatrix_x4 with each matrix transposed: elements (2t, g) and (2t+1, g).
FIF_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  ::cusim::load_matrix<4, true>(r, row);
#endif
}

// Two matrices; lanes 0..15 name the rows, what the others name is ignored.
FIF_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  ::cusim::load_matrix<2, false>(r, row);
#endif
}

// As ldmatrix_x2, transposed.
FIF_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  ::cusim::load_matrix<2, true>(r, row);
#endif
}

// D(16x8) += A(16x16) B(16x8), T fp16 or bf16. Pairs along k, low half first: a[0..3] = A[g][2t..], A[g+8][2t..],
// A[g][2t+8..], A[g+8][2t+8..]; b[0..1] = B[2t..][g], B[2t+8..][g].
template <class T>
FIF_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  ::cusim::multiply_16bit<T>(d, a, b);
#endif
}

// D(16x8) += A(16x8) B(8x8) of tf32 registers: a[0..3] = A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4];
// b[0..1] = B[t][g], B[t+4][g].
FIF_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  ::cusim::multiply_tf32(d, a, b);
#endif
}

FIF_DEVICE int lane_id() { return int(threadIdx.x) & 31; }
FIF_DEVICE int warp_id() { return int(threadIdx.x) >> 5; }

// The sum over each aligned group of Width lanes, in every lane of the group and the same in all; all 32 lanes call it.
template <int Width = 32, class T>
FIF_DEVICE T warp_sum(T v) {
  static_assert(Width >= 1 && Width <= 32 && (Width & (Width - 1)) == 0);
  FIF_UNROLL
  for (int step = Width / 2; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}

// The largest over each aligned group of Width lanes, likewise.
template <int Width = 32, class T>
FIF_DEVICE T warp_max(T v) {
  static_assert(Width >= 1 && Width <= 32 && (Width & (Width - 1)) == 0);
  FIF_UNROLL
  for (int step = Width / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, v, step);
    v = other > v ? other : v;
  }
  return v;
}

}  // namespace fif::gpu
