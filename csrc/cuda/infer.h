// What the host hands to the inference kernel.
#pragma once

#include <cuda_runtime.h>

#include "../problem.h"
#include "plan.h"

namespace fif::gpu {

// One value a channel, float or the activations' format; null pointers stand for none.
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

// Dynamic shared memory of a block.
int64_t inference_shared_bytes(const InferCall& call);

// One launch on the stream. Returns cudaSuccess or what the launch reported.
cudaError_t launch_inference(const InferCall& call, cudaStream_t stream);

}  // namespace fif::gpu
