// One unit's sizes and options, and the plain-pointer arguments of its three passes. No torch headers: the same structs
// serve the kernels of every backend, the sanitizer builds and the operators.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FIF_PORTABLE __host__ __device__
#else
#define FIF_PORTABLE
#endif

namespace fif {

enum class Dtype : int { f32, f64, bf16, f16 };

// The codes are part of the operators' schema (fif_ops/ops.py has the names). Up to relu6 an activation is a clamp.
enum class Activation : int { none, relu, relu6, hardswish, silu, gelu };

struct Problem {
  int64_t batch, in_channels;
  int64_t in_height, in_width;  // of x
  int64_t height, width;        // of the maps: every stride-th row and column of x
  int64_t stride, groups;       // of the primary convolution
  int64_t primary;              // primary maps (M)
  int64_t multiplier;           // cheap maps per primary map (S); map m's are m*S ... m*S + S-1
  int64_t out_channels;  // channels kept of [primary maps, cheap maps], or of the cheap maps alone without splice
  int kernel;            // cheap kernel size: 1, 3, 5 or 7, zero padding (kernel - 1) / 2 *after* the activation
  Activation activation;
  bool splice;             // the primary maps come first in the output
  bool channels_last;      // of every activation tensor
  bool has_primary;        // else x holds the primary maps before normalisation, made by another convolution
  bool tf32;               // f32 products may round their factors to tf32
  Dtype dtype;             // of activations and convolution weights; normalisation is in the compute type (f32, or f64)
  int primary_kernel = 1;  // odd, zero padding (primary_kernel - 1) / 2 and, with that, maps of ceil(size / stride)
  // A depthwise convolution and its normalisation over the unit's result: 0 for none, else 3, 5 or 7, padded likewise.
  int depthwise_kernel = 0;
  int64_t depthwise_stride = 1;

  FIF_PORTABLE int64_t pixels() const { return height * width; }
  FIF_PORTABLE int64_t cheap() const { return primary * multiplier; }
  FIF_PORTABLE int64_t depth() const { return in_channels * primary_kernel * primary_kernel; }
  FIF_PORTABLE int64_t multiply_adds() const {
    return batch * pixels() * (primary * (has_primary ? depth() : 0) + cheap() * kernel * kernel);
  }
  FIF_PORTABLE int64_t in_pixels() const { return in_height * in_width; }
  FIF_PORTABLE int64_t kept_primary() const { return splice ? primary : 0; }
};

// An activation tensor [B, C, H, W] whose pixels lie at one regular step.
//   NCHW: element (n, c, p) at n*batch + c*step + p       (step: channel stride, pixels dense)
//   NHWC: element (n, c, p) at n*batch + p*step + c       (step: pixel stride, channels dense)
template <class Pointer>
struct Map {
  Pointer data = nullptr;
  int64_t batch = 0, step = 0;
};
using Input = Map<const void*>;
using Output = Map<void*>;

// y = (x - mean) * rstd * weight + bias, one value a channel, in the compute type. A null pointer stands for 0 or 1.
struct Affine {
  const void* mean = nullptr;
  const void* rstd = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
};

// at::parallel_for behind a plain function pointer: body(begin, end, thread) over [0, tasks), at least `grain` tasks at
// a time; thread < count as long as there are no more than `count` grains.
struct Threads {
  int count;
  void (*run)(int64_t tasks, int64_t grain, void (*body)(void* state, int64_t begin, int64_t end, int thread),
              void* state);
};

struct InferArgs {
  Input x;
  const void* primary_weight;  // [M, C, k, k]; null without a product, here and below
  const void* cheap_weight;    // [M*S, K, K]
  Affine primary, cheap;
  Output out;
  const void* packed = nullptr;            // what pack made of all the others, or null
  Input add{};                             // of out's shape and format, added to the result; or null
  const void* depthwise_weight = nullptr;  // [out_channels, d, d]
  Affine depthwise{};
};

struct TrainArgs {
  Input x;
  const void* primary_weight;
  const void* cheap_weight;
  const void* primary_bias;         // [M] compute type or null; part of raw, so that a large mean that it takes away
                                    // costs no digits there
  Affine primary, cheap;            // mean and rstd are ignored where batch statistics are asked for
  bool primary_batch, cheap_batch;  // normalise with batch statistics
  double primary_eps, cheap_eps;
  Output out;
  Output raw;              // [B, M, H, W]: the primary maps before normalisation, kept for backward
  void* primary_stats;     // [2, M] compute type: mean, rstd
  void* cheap_stats;       // [2, M*S]
  void* primary_variance;  // [M] unbiased, or null; written where batch statistics are asked for
  void* cheap_variance;    // [M*S]
};

struct BackwardArgs {
  Input grad, x, raw;
  const void* primary_weight;
  const void* cheap_weight;
  Affine primary, cheap;            // as normalised in forward: mean and rstd of the batch, or frozen ones
  bool primary_batch, cheap_batch;  // whether the statistics depend on the input
  Output grad_x;                    // data null: not wanted
  void* grad_primary_weight;        // [M, C] or null
  void* grad_cheap_weight;          // [M*S, K, K]
  void* grad_primary_affine;        // [2, M] compute type: of weight (gamma), of bias (beta)
  void* grad_cheap_affine;          // [2, M*S]
};

// A depthwise convolution and its batch normalisation in training, of `primary` maps, in_height x in_width before and
// height x width after. Forward fills out, raw, stats and variance, backward grad_x, grad_weight and grad_affine.
struct StridedArgs {
  Input x;
  const void* weight;  // [M, K, K]
  Affine norm;         // forward: mean and rstd are ignored
  double eps = 0;
  Output out{}, raw{};       // raw: before normalisation, kept for backward
  void* stats = nullptr;     // [2, M] compute type: mean, rstd
  void* variance = nullptr;  // [M] unbiased
  Input grad{}, kept_raw{};  // of out; and raw again
  Output grad_x{};           // data null: not wanted
  void* grad_weight = nullptr;
  void* grad_affine = nullptr;  // [2, M] compute type: of weight (gamma), of bias (beta)
};

// What one instruction-set variant offers; csrc/dispatch.cpp picks one at load.
struct Kernels {
  const char* name;
  void (*infer)(const Problem&, const InferArgs&, const Threads&);
  void (*train)(const Problem&, const TrainArgs&, const Threads&);
  void (*backward)(const Problem&, const BackwardArgs&, const Threads&);
  int64_t (*packed_bytes)(const Problem&);
  void (*pack)(const Problem&, const InferArgs&, void* to);
  void (*pool)(const Problem&, const InferArgs&, const Threads&);
  uint64_t (*fingerprint)(const void* const* parts, const int64_t* bytes, int64_t count);
  void (*strided_train)(const Problem&, const StridedArgs&, const Threads&);
  void (*strided_backward)(const Problem&, const StridedArgs&, const Threads&);
};

}  // namespace fif
