// The operators on NVIDIA GPUs. Compiled by the host compiler, where nvcc is found, into the same library as the CPU
// operators; it loads on a torch without CUDA, which then never calls it.
#include <array>
#include <tuple>

#include "calls.h"
#include "cuda/runtime.h"
#include "predict.h"

namespace fif {
namespace {

using gpu::NormPointers;

void check(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, "fif_ops::", name, ": ", cudaGetErrorString(error));
}

gpu::Device device_of(int32_t device) {
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "device");
    return value;
  };
  return {get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          get(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

// Sizes, after the checks that belong to GPUs.
Problem gpu_problem(const Problem& p) {
  STD_TORCH_CHECK(p.dtype != Dtype::f64, "x must be float32, bfloat16 or float16 on a GPU");
  STD_TORCH_CHECK(p.kernel == 3 || p.kernel == 5, "cheap_weight's d must be 3 or 5 on a GPU, got ", p.kernel);
  STD_TORCH_CHECK(p.in_pixels() < (int64_t(1) << 31) && p.in_channels < (1 << 30) && p.cheap() < (1 << 24),
                  "x's maps are too large for a GPU");
  return p;
}

void check_grid(int64_t x, int64_t y) {
  STD_TORCH_CHECK(x < (int64_t(1) << 31) && y < 65536, "x is too large for one launch");
}

struct NormArgs {
  const OptionalTensor &conv_bias, &weight, &bias, &mean, &var;
  double eps;
};

// Tensors of one value a channel as the kernels take them: float, or x's own format.
class Parameters {
 public:
  explicit Parameters(const Tensor& x) : x_(x) {}

  // With batch statistics those given are no part of the normalisation.
  NormPointers norm(const NormArgs& n, int64_t channels, bool batch) {
    STD_TORCH_CHECK(n.mean.has_value() == n.var.has_value(),
                    "a norm needs both running_mean and running_var, or neither");
    bool same = true;  // all in x's format already, as in a model converted whole
    for (const OptionalTensor* t : {&n.conv_bias, &n.weight, &n.bias, &n.mean, &n.var})
      same = same && (!*t || (*t)->scalar_type() == x_.scalar_type());
    const auto get = [&](const OptionalTensor& t) { return t ? dense(*t, same, channels) : nullptr; };
    const bool is_float = !same || x_.scalar_type() == ScalarType::Float, normed = batch || n.mean;
    STD_TORCH_CHECK(normed || (!n.weight && !n.bias), "a norm without statistics must have no weight and no bias");
    const void *mean = batch ? nullptr : get(n.mean), *variance = batch ? nullptr : get(n.var);
    const void *conv_bias = get(n.conv_bias), *bias = normed ? get(n.bias) : conv_bias;
    return {normed ? conv_bias : nullptr, get(n.weight), bias, mean, variance, static_cast<float>(n.eps), is_float};
  }

  // A float array that launches update: the tensor's own memory, or a copy that `write_back` copies from.
  float* running(const OptionalTensor& t, int64_t channels) {
    if (!t) return nullptr;
    checked(*t, channels);
    Tensor copy = *t;
    if (t->scalar_type() != ScalarType::Float) copy = torch::stable::to(*t, ScalarType::Float);
    copy = torch::stable::contiguous(copy);
    kept_.push_back(copy);
    if (copy.const_data_ptr() != t->const_data_ptr()) copies_.emplace_back(*t, copy);
    return static_cast<float*>(copy.mutable_data_ptr());
  }
  void write_back() {
    for (auto& [running, copy] : copies_) torch::stable::copy_(running, copy);
  }

 private:
  void checked(const Tensor& t, int64_t channels) const {
    STD_TORCH_CHECK(t.is_cpu() == x_.is_cpu() && t.get_device_index() == x_.get_device_index(),
                    "norms must be on x's device");
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, "a norm must have ", channels, " values");
  }
  const void* dense(const Tensor& t, bool as_it_is, int64_t channels) {
    checked(t, channels);
    const bool convert = !as_it_is && t.scalar_type() != ScalarType::Float;
    kept_.push_back(torch::stable::contiguous(convert ? torch::stable::to(t, ScalarType::Float) : t));
    return kept_.back().const_data_ptr();
  }

  const Tensor& x_;
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

// Float arrays in one allocation.
template <size_t N>
std::array<float*, N> scratch(const Tensor& x, const std::array<int64_t, N>& sizes, Tensor& memory) {
  int64_t total = 0;
  for (int64_t size : sizes) total += (size + 3) / 4 * 4;
  memory = new_tensor(x, {total}, ScalarType::Float);
  std::array<float*, N> arrays;
  float* next = static_cast<float*>(memory.mutable_data_ptr());
  for (size_t i = 0; i < N; ++i) {
    arrays[i] = next;
    next += (sizes[i] + 3) / 4 * 4;
  }
  return arrays;
}

const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
OptionalTensor dense_weight(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

Output writable(const Input& map) { return {const_cast<void*>(map.data), map.batch, map.step}; }

Tensor infer(const Tensor& x, const OptionalTensor& primary_weight, const Tensor& cheap_weight,
             const OptionalTensor& primary_bias, const OptionalTensor& cheap_bias, const OptionalTensor& weight1,
             const OptionalTensor& bias1, const OptionalTensor& mean1, const OptionalTensor& var1,
             const OptionalTensor& weight2, const OptionalTensor& bias2, const OptionalTensor& mean2,
             const OptionalTensor& var2, double eps1, double eps2, int64_t out_channels, int64_t activation,
             bool splice, int64_t stride, int64_t groups, bool tf32) {
  const DeviceGuard guard(x.get_device_index());
  const Problem p =
      gpu_problem(problem_of(x, primary_weight, cheap_weight, out_channels, activation, splice, stride, groups, tf32));
  Parameters parameters(x);
  const Tensor dense = regular(x, p.channels_last), w2 = torch::stable::contiguous(cheap_weight);
  const OptionalTensor w1 = dense_weight(primary_weight);
  const Tensor out = new_map(x, p, out_channels);
  if (p.batch == 0) return out;
  const NormPointers primary = parameters.norm({primary_bias, weight1, bias1, mean1, var1, eps1}, p.primary, false);
  const NormPointers cheap = parameters.norm({cheap_bias, weight2, bias2, mean2, var2, eps2}, p.cheap(), false);
  const cudaStream_t stream = current_stream(x.get_device_index());
  if (p.has_primary) {
    gpu::InferCall call{.p = p,
                        .plan = {},
                        .x = input(dense, p.channels_last),
                        .primary_weight = data_of(w1),
                        .cheap_weight = w2.const_data_ptr(),
                        .primary = primary,
                        .cheap = cheap,
                        .out = output(out, p.channels_last)};
    STD_TORCH_CHECK(gpu::plan_inference(call, device_of(x.get_device_index())), "no tile fits into shared memory");
    check_grid(call.plan.blocks_x, call.plan.blocks_y);
    check(gpu::launch_inference(call, stream), "infer");
  } else {
    gpu::TrainCall call{};
    call.p = p;
    call.x = input(dense, p.channels_last);
    call.raw = writable(call.x);  // read only
    call.cheap_weight = w2.const_data_ptr();
    call.primary.norm = primary;
    call.cheap.norm = cheap;
    call.out = output(out, p.channels_last);
    STD_TORCH_CHECK(gpu::plan_training(call, device_of(x.get_device_index())), "no tile fits into shared memory");
    check_grid(call.plan.blocks_x, call.plan.blocks_y);
    check(gpu::launch_training(call, stream), "infer");
  }
  return out;
}

// Returns the output, the primary maps before normalisation (empty without a primary convolution), and [mean, rstd] of
// both normalisations.
std::tuple<Tensor, Tensor, Tensor, Tensor> train(
    const Tensor& x, const OptionalTensor& primary_weight, const Tensor& cheap_weight,
    const OptionalTensor& primary_bias, const OptionalTensor& cheap_bias, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& mean1, const OptionalTensor& var1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const OptionalTensor& mean2, const OptionalTensor& var2, double eps1, double eps2,
    int64_t out_channels, int64_t activation, bool splice, bool batch1, bool batch2, double momentum1, double momentum2,
    int64_t stride, int64_t groups, bool tf32) {
  const DeviceGuard guard(x.get_device_index());
  const Problem p =
      gpu_problem(problem_of(x, primary_weight, cheap_weight, out_channels, activation, splice, stride, groups, tf32));
  Parameters parameters(x);
  const bool last = p.channels_last;
  const Tensor dense = regular(x, last), w2 = torch::stable::contiguous(cheap_weight);
  const OptionalTensor w1 = dense_weight(primary_weight);
  const Tensor out = new_map(x, p, out_channels);
  const Tensor raw = p.has_primary ? new_map(x, p, p.primary) : new_tensor(x, {0}, x.scalar_type());
  Tensor stats1 = new_tensor(x, {2, p.primary}, ScalarType::Float);
  Tensor stats2 = new_tensor(x, {2, p.cheap()}, ScalarType::Float);
  if (p.batch == 0) {
    torch::stable::zero_(stats1);
    torch::stable::zero_(stats2);
    return {out, raw, stats1, stats2};
  }
  gpu::TrainCall call{};
  call.p = p;
  call.x = input(dense, last);
  call.raw = p.has_primary ? output(raw, last) : writable(call.x);
  call.out = output(out, last);
  call.primary_weight = data_of(w1);
  call.cheap_weight = w2.const_data_ptr();
  // The primary convolution's bias is part of raw, as that of a convolution of somebody else's is.
  const NormPointers bias =
      parameters.norm({primary_bias, std::nullopt, std::nullopt, std::nullopt, std::nullopt, 0}, p.primary, false);
  call.primary_bias = bias.bias;
  call.bias_is_float = bias.is_float;
  const auto norm = [&](const NormArgs& n, int64_t channels, bool batch, Tensor& stats, double momentum) {
    gpu::TrainNorm result{};
    result.norm = parameters.norm(n, channels, batch);
    result.channels = channels;
    result.batch = batch;
    result.stats = static_cast<float*>(stats.mutable_data_ptr());
    result.momentum = static_cast<float>(momentum);
    if (batch && momentum != 0.0) {
      result.running_mean = parameters.running(n.mean, channels);
      result.running_variance = parameters.running(n.var, channels);
    }
    return result;
  };
  call.primary = norm({std::nullopt, weight1, bias1, mean1, var1, eps1}, p.primary, batch1, stats1, momentum1);
  call.cheap = norm({cheap_bias, weight2, bias2, mean2, var2, eps2}, p.cheap(), batch2, stats2, momentum2);
  STD_TORCH_CHECK(gpu::plan_training(call, device_of(x.get_device_index())), "no tile fits into shared memory");
  check_grid(call.plan.tiles, call.plan.blocks_y * p.multiplier);
  check_grid(call.product.tiles, call.product.blocks_y);
  call.primary.partials.count = p.has_primary ? call.product.blocks_x : call.plan.blocks_x;
  call.cheap.partials.count = call.plan.blocks_x;
  Tensor memory = out;
  const auto partials =
      scratch<2>(x, {3 * p.primary * call.primary.partials.count, 3 * p.cheap() * call.cheap.partials.count}, memory);
  call.primary.partials.data = partials[0];
  call.cheap.partials.data = partials[1];
  check(gpu::launch_training(call, current_stream(x.get_device_index())), "train");
  parameters.write_back();
  return {out, raw, stats1, stats2};
}

// Gradients of x, primary_weight, cheap_weight (empty where not wanted) and of [weight, bias] of both normalisations.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& primary_weight, const Tensor& cheap_weight,
    const Tensor& raw, const Tensor& stats1, const Tensor& stats2, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& weight2, const OptionalTensor& bias2, int64_t activation,
    bool splice, bool batch1, bool batch2, bool need_x, bool need_primary_weight, int64_t stride, int64_t groups,
    bool tf32) {
  const DeviceGuard guard(x.get_device_index());
  const Problem p = gpu_problem(problem_of(x, primary_weight, cheap_weight, grad.dim() == 4 ? grad.size(1) : 0,
                                           activation, splice, stride, groups, tf32));
  const bool last = p.channels_last, need_weight = need_primary_weight && p.has_primary;
  check_map(grad, x, p, p.out_channels, "grad");
  check_map(raw, x, p, p.primary, "raw");
  Parameters parameters(x);
  const Tensor dense = regular(x, last), dense_grad = regular(grad, last);
  // Laid out as `through`, which the kernels read beside it.
  const Tensor dense_raw = p.has_primary
      ? torch::stable::contiguous(raw, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous)
      : regular(raw, last);
  const OptionalTensor w1 = dense_weight(primary_weight);
  const Tensor w2 = torch::stable::contiguous(cheap_weight);
  const ScalarType dtype = x.scalar_type();
  Tensor grad_x = need_x ? new_input(x, p) : new_tensor(x, {0}, dtype);
  const int64_t reduced = p.in_channels / p.groups;
  Tensor grad_w1 =
      new_tensor(x, need_weight ? std::vector<int64_t>{p.primary, reduced, 1, 1} : std::vector<int64_t>{0}, dtype);
  Tensor grad_w2 = new_tensor(x, {p.cheap(), 1, p.kernel, p.kernel}, dtype);
  Tensor grad_norm1 = new_tensor(x, {2, p.primary}, ScalarType::Float);
  Tensor grad_norm2 = new_tensor(x, {2, p.cheap()}, ScalarType::Float);
  if (p.batch == 0) {
    for (Tensor* t : {&grad_x, &grad_w1, &grad_w2, &grad_norm1, &grad_norm2}) torch::stable::zero_(*t);
    return {grad_x, grad_w1, grad_w2, grad_norm1, grad_norm2};
  }
  const Tensor through = new_map(x, p, p.primary);
  gpu::BackwardCall call{};
  call.p = p;
  call.grad = input(dense_grad, last);
  call.x = input(dense, last);
  call.raw = input(dense_raw, last);
  call.primary_weight = data_of(w1);
  call.cheap_weight = w2.const_data_ptr();
  call.through = output(through, last);
  call.grad_x = need_x ? output(grad_x, last) : Output{};
  call.grad_primary_weight = need_weight ? grad_w1.mutable_data_ptr() : nullptr;
  call.grad_cheap_weight = grad_w2.mutable_data_ptr();
  const auto norm = [&](const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& stats, bool batch,
                        Tensor& gradient, int64_t channels, const char* name) {
    check_statistics(stats, x, channels, name);
    gpu::BackwardNorm result{};
    result.norm = parameters.norm({std::nullopt, weight, bias, std::nullopt, std::nullopt, 0}, channels, true);
    result.channels = channels;
    result.batch = batch;
    result.stats = static_cast<const float*>(stats.const_data_ptr());
    result.gradient = static_cast<float*>(gradient.mutable_data_ptr());
    return result;
  };
  call.primary = norm(weight1, bias1, stats1, batch1, grad_norm1, p.primary, "stats1");
  call.cheap = norm(weight2, bias2, stats2, batch2, grad_norm2, p.cheap(), "stats2");
  STD_TORCH_CHECK(gpu::plan_backward(call, device_of(x.get_device_index())), "no tile fits into shared memory");
  check_grid(call.plan.tiles, call.plan.blocks_y + 1);
  check_grid(call.sums_plan.tiles, call.sums_plan.blocks_y * p.multiplier);
  check_grid(call.gradient.input_blocks + call.gradient.sum_blocks,
             int64_t(call.gradient.map_tiles) * call.gradient.channel_tiles * p.groups);
  call.cheap.sums.count = call.sums_plan.blocks_x;
  call.primary.sums.count = call.plan.blocks_x;
  Tensor memory = grad_w2;
  const auto arrays =
      scratch<5>(x,
                 {2 * p.cheap() * call.sums_plan.blocks_x, 2 * p.primary * call.plan.blocks_x, 3 * p.primary,
                  p.cheap() * p.kernel * p.kernel * call.plan.blocks_x, p.primary * reduced * call.gradient.splits},
                 memory);
  call.cheap.sums.data = arrays[0];
  call.primary.sums.data = arrays[1];
  call.coefficients = arrays[2];
  call.cheap_weight_sums = arrays[3];
  call.primary_weight_sums = arrays[4];
  check(gpu::launch_backward(call, current_stream(x.get_device_index())), "backward");
  return {grad_x, grad_w1, grad_w2, grad_norm1, grad_norm2};
}

}  // namespace
}  // namespace fif

#define FIF_TEXT_OF(words) #words
#define FIF_TEXT(words) FIF_TEXT_OF(words)
#if !defined(FIF_CUDA_ARCHS)
#define FIF_CUDA_ARCHS
#endif

// The architectures that the kernels were compiled for, as in "80 90".
extern "C" __attribute__((visibility("default"))) const char* fif_ops_cuda_archs() { return FIF_TEXT(FIF_CUDA_ARCHS); }

// Asked by Python, by a plain C call that needs no GPU. `numbers`: batch, in_channels, in_height, in_width, primary,
// multiplier, out_channels, kernel, stride, groups, splice, channels_last, has_primary, tf32, bytes of an element,
// trains; multiprocessors, and shared memory of a block and of a multiprocessor.
extern "C" __attribute__((visibility("default"))) const char* fif_ops_cuda_plan(const int64_t* numbers) {
  const int64_t* n = numbers;
  const fif::Problem p{.batch = n[0],
                       .in_channels = n[1],
                       .in_height = n[2],
                       .in_width = n[3],
                       .height = (n[2] - 1) / n[8] + 1,
                       .width = (n[3] - 1) / n[8] + 1,
                       .stride = n[8],
                       .groups = n[9],
                       .primary = n[4],
                       .multiplier = n[5],
                       .out_channels = n[6],
                       .kernel = static_cast<int>(n[7]),
                       .activation = fif::Activation::relu,
                       .splice = n[10] != 0,
                       .channels_last = n[11] != 0,
                       .has_primary = n[12] != 0,
                       .tf32 = n[13] != 0,
                       .dtype = n[14] == 4 ? fif::Dtype::f32 : fif::Dtype::f16};
  const fif::gpu::Device device{static_cast<int>(n[16]), static_cast<int>(n[17]), static_cast<int>(n[18])};
  static thread_local std::string text;
  text = fif::gpu::predict_text(p, device, n[15] != 0);
  return text.c_str();
}

FIF_CUDA_OPERATORS(m) {
  m.impl("infer", TORCH_BOX(&fif::infer));
  m.impl("train", TORCH_BOX(&fif::train));
  m.impl("backward", TORCH_BOX(&fif::backward));
}
