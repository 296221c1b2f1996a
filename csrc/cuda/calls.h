// What the host hands to the kernels: sizes, plans and plain pointers.
#pragma once

#include <cuda_runtime.h>

#include "../problem.h"
#include "plan.h"

namespace fif::gpu {

// One value a channel, float or the activations' format; null pointers stand for none. Without a mean there is no
// normalisation, and `bias` is the convolution's; with one, `conv_bias` is.
struct NormPointers {
  const void *conv_bias, *weight, *bias, *mean, *variance;
  float eps;
  bool is_float;
};

struct InferCall {
  Problem p;
  Plan plan;
  Input x;
  const void *primary_weight, *cheap_weight;
  NormPointers primary, cheap;
  Output out;
};

// [channels][items][count]: what each of `count` blocks found of each channel.
struct Partials {
  float* data = nullptr;
  int count = 0;
};

// One normalisation in training.
struct TrainNorm {
  NormPointers norm;
  int64_t channels;
  bool batch;                              // batch statistics, from `partials`: count, mean and squared deviations
  bool ready;                              // `stats` is filled in already
  Partials partials;                       // [channels][3][blocks]
  float* stats;                            // [2, channels]: mean, rstd
  float *running_mean, *running_variance;  // null: not to be updated
  float momentum;
};

struct TrainCall {
  Problem p;
  ProductPlan product;
  CheapPlan plan;
  Input x;
  const void *primary_weight, *cheap_weight, *primary_bias;
  bool bias_is_float;
  TrainNorm primary, cheap;
  Output out;
  Output raw;  // the primary maps before normalisation: written by the product, read by the rest
};

// One normalisation as it was in forward, and the sums that its gradient needs.
struct BackwardNorm {
  NormPointers norm;  // weight and bias
  int64_t channels;
  bool batch;
  const float* stats;  // [2, channels]
  Partials sums;       // [channels][2][blocks]: of the gradient before the activation, and of it times x hat
  float* gradient;     // [2, channels]: of weight, of bias
};

struct BackwardCall {
  Problem p;
  CheapPlan sums_plan, plan;
  GradientPlan gradient;
  Input grad, x, raw;
  const void *primary_weight, *cheap_weight;
  BackwardNorm primary, cheap;
  Output through;              // [B, M, H, W]: gradient of the normalised primary maps
  float* coefficients;         // [3, M]: gradient of raw = [0] * through + [1] * raw + [2]
  float* cheap_weight_sums;    // [plan.blocks_x][M*S, K, K]
  float* primary_weight_sums;  // [gradient.splits][M, C / groups]
  Output grad_x;               // data null: not wanted
  void* grad_primary_weight;   // [M, C / groups] or null
  void* grad_cheap_weight;     // [M*S, K, K]
};

// Fill in the plans. False: no tile of these maps fits into shared memory.
bool plan_inference(InferCall& call, const Device& device);
bool plan_training(TrainCall& call, const Device& device);
bool plan_backward(BackwardCall& call, const Device& device);

// Dynamic shared memory of a block of the depthwise part, whose fields reach so many kernel radii beyond the tile;
// reach_z -1: there is none.
int64_t cheap_shared_bytes(const Problem& p, const CheapPlan& plan, int reach_y, int reach_z);

// Launch what the call needs on the stream, in order. Return cudaSuccess or what a launch reported.
cudaError_t launch_inference(const InferCall& call, cudaStream_t stream);    // 1 launch
cudaError_t launch_training(const TrainCall& call, cudaStream_t stream);     // at most 3
cudaError_t launch_backward(const BackwardCall& call, cudaStream_t stream);  // at most 4, with those of
cudaError_t launch_primary_gradients(const BackwardCall& call, cudaStream_t stream);

}  // namespace fif::gpu
