// The operators on NVIDIA GPUs. Compiled by the host compiler, where nvcc is found, into the same library as the CPU
// operators; it loads on a torch without CUDA, which then never calls it.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../operators.h"
#include "infer.h"

// Exported by CUDA builds of torch only, hence weak.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fif {
namespace {

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Tensors of one value a channel as the kernels take them: float, or x's own format.
class Parameters {
 public:
  explicit Parameters(const Tensor& x) : x_(x) {}

  gpu::NormPointers norm(const OptionalTensor& conv_bias, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& mean, const OptionalTensor& variance, double eps, int64_t channels) {
    STD_TORCH_CHECK(mean.has_value() == variance.has_value(),
                    "a norm needs both running_mean and running_var, or neither");
    STD_TORCH_CHECK(mean.has_value() || (!weight && !bias),
                    "a norm without statistics must have no weight and no bias");
    bool same = true;  // all in x's format already, as in a model converted whole
    for (const OptionalTensor* t : {&conv_bias, &weight, &bias, &mean, &variance})
      same = same && (!*t || (*t)->scalar_type() == x_.scalar_type());
    auto get = [&](const OptionalTensor& t) { return t ? dense(*t, same, channels) : nullptr; };
    const bool is_float = !same || x_.scalar_type() == ScalarType::Float;
    return {get(conv_bias), get(weight), get(bias), get(mean), get(variance), static_cast<float>(eps), is_float};
  }

 private:
  const void* dense(const Tensor& t, bool as_it_is, int64_t channels) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x_.get_device_index(), "norms must be on x's device");
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, "a norm must have ", channels, " values");
    const bool convert = !as_it_is && t.scalar_type() != ScalarType::Float;
    kept_.push_back(torch::stable::contiguous(convert ? torch::stable::to(t, ScalarType::Float) : t));
    return kept_.back().const_data_ptr();
  }

  const Tensor& x_;
  std::vector<Tensor> kept_;
};

Tensor infer(const Tensor& x, const Tensor& primary_weight, const Tensor& cheap_weight,
             const OptionalTensor& primary_bias, const OptionalTensor& cheap_bias, const OptionalTensor& weight1,
             const OptionalTensor& bias1, const OptionalTensor& mean1, const OptionalTensor& var1,
             const OptionalTensor& weight2, const OptionalTensor& bias2, const OptionalTensor& mean2,
             const OptionalTensor& var2, double eps1, double eps2, int64_t out_channels, int64_t activation,
             bool splice) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  gpu::InferCall call{};
  call.p = problem_of(x, primary_weight, cheap_weight, out_channels, activation, splice);
  const Problem& p = call.p;
  STD_TORCH_CHECK(p.dtype != Dtype::f64, "x must be float32, bfloat16 or float16 on a GPU");
  STD_TORCH_CHECK(p.kernel == 3 || p.kernel == 5, "cheap_weight's d must be 3 or 5 on a GPU, got ", p.kernel);
  STD_TORCH_CHECK(p.pixels() < (int64_t(1) << 31) && p.in_channels < (1 << 30), "x's maps are too large for a GPU");
  Parameters parameters(x);
  const Tensor dense = regular(x, p.channels_last);
  const Tensor w1 = torch::stable::contiguous(primary_weight), w2 = torch::stable::contiguous(cheap_weight);
  const Tensor out = new_map(x, out_channels, p.channels_last);
  if (p.batch == 0) return out;
  call.x = input(dense, p.channels_last);
  call.primary_weight = w1.const_data_ptr();
  call.cheap_weight = w2.const_data_ptr();
  call.primary = parameters.norm(primary_bias, weight1, bias1, mean1, var1, eps1, p.primary);
  call.cheap = parameters.norm(cheap_bias, weight2, bias2, mean2, var2, eps2, p.cheap());
  call.out = output(out, p.channels_last);
  call.plan = gpu::plan_inference(p, call.x);
  STD_TORCH_CHECK(call.plan.blocks_x < (int64_t(1) << 31) && call.plan.blocks_y < 65536,
                  "x is too large for one launch");
  const cudaError_t error = gpu::launch_inference(call, current_stream(x.get_device_index()));
  STD_TORCH_CHECK(error == cudaSuccess, "fif_ops::infer: ", cudaGetErrorString(error));
  return out;
}

}  // namespace
}  // namespace fif

STABLE_TORCH_LIBRARY_IMPL(fif_ops, CUDA, m) { m.impl("infer", TORCH_BOX(&fif::infer)); }
