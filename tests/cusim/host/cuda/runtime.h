// In place of csrc/cuda/runtime.h: the operators of GPUs on CPU tensors, in a namespace of their own.
#pragma once

#include "operators.h"

#define FIF_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(fif_ops_simulated, CPU, m)

namespace fif {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(int32_t) { return nullptr; }

}  // namespace fif
