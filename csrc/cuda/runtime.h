// Where the operators meet torch's CUDA: the current device and stream, and the dispatcher. The tests put another
// header of this name before it, to run the same operators on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../operators.h"

// Exported by CUDA builds of torch only, hence weak.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

#define FIF_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(fif_ops, CUDA, m)

namespace fif {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fif
