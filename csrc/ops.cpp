// The schemas of fif_ops, and its operators on the CPU, on top of the kernels that csrc/dispatch.cpp picked.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "dispatch.h"
#include "operators.h"
#include "pages.h"

namespace fif {

const Kernels& cpu_kernels() {
  const char* error = nullptr;
  const Kernels* found = chosen_kernels(&error);
  STD_TORCH_CHECK(found != nullptr, error);
  return *found;
}

Threads cpu_threads(const Problem& p, int64_t share) {
  const int64_t most = torch::stable::get_num_threads(), useful = std::max<int64_t>(1, p.multiply_adds() / share);
  return {static_cast<int>(std::min(most, useful)),
          [](int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t, int), void* state) {
            torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
              // All tasks in one call is also what happens inside somebody else's parallel region, whose index means
              // nothing here.
              uint32_t thread = 0;
              if (begin != 0 || end != tasks) torch_get_thread_idx(&thread);
              body(state, begin, end, static_cast<int>(thread));
            });
          }};
}

namespace {

// Multiply-adds that pay for another thread in training, whose passes meet several times; a backward pass has twice as
// many as its unit.
constexpr int64_t kTrainingShare = 1'750'000;

// ---- parameters

// x itself where it is dense: to ask costs a tenth of what calling the operator does.
Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

OptionalTensor dense(const OptionalTensor& x) { return x ? OptionalTensor(dense(*x)) : std::nullopt; }

// Tensors of one value a channel as dense arrays of the compute type; keeps what it converted alive.
class Parameters {
 public:
  Parameters(ScalarType type) : type_(type) {}

  const void* get(const OptionalTensor& t, int64_t channels, const char* norm, const char* name) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->is_cpu(), norm, name, " must be on x's device");
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, norm, name, " must have ", channels, " values");
    const ScalarType given = t->scalar_type();
    STD_TORCH_CHECK(given == ScalarType::Float || given == ScalarType::Double || given == ScalarType::BFloat16 ||
                        given == ScalarType::Half,
                    norm, name, " must be float32, float64, bfloat16 or float16");
    if (given == type_ && t->is_contiguous()) return t->const_data_ptr();
    kept_.push_back(dense(given == type_ ? *t : torch::stable::to(*t, type_)));
    return kept_.back().const_data_ptr();
  }

  // 1 / sqrt(variance + eps)
  const void* rstd(const void* variance, int64_t channels, double eps) {
    if (!variance) return nullptr;
    return computed(channels, [&](auto* out, int64_t i) {
      using A = std::remove_pointer_t<decltype(out)>;
      out[i] = A(1) / std::sqrt(static_cast<const A*>(variance)[i] + A(eps));
    });
  }

  // mean - bias: normalising a convolution without its bias needs the mean without it too
  const void* less(const void* mean, const void* bias, int64_t channels) {
    if (!mean || !bias) return mean;
    return computed(channels, [&](auto* out, int64_t i) {
      using A = std::remove_pointer_t<decltype(out)>;
      out[i] = static_cast<const A*>(mean)[i] - static_cast<const A*>(bias)[i];
    });
  }

 private:
  template <class F>
  const void* computed(int64_t channels, F f) {
    computed_.push_back(std::make_unique_for_overwrite<double[]>(channels));  // room for either type
    void* data = computed_.back().get();
    if (type_ == ScalarType::Double)
      for (int64_t i = 0; i < channels; ++i) f(static_cast<double*>(data), i);
    else
      for (int64_t i = 0; i < channels; ++i) f(static_cast<float*>(data), i);
    return data;
  }

  ScalarType type_;
  std::vector<Tensor> kept_;
  std::vector<std::unique_ptr<double[]>> computed_;
};

// One normalisation as the operators take it. Without mean and var (and batch statistics) there is none, and the
// convolution's bias is all that is added.
struct NormArgs {
  const OptionalTensor &conv_bias, &weight, &bias, &mean, &var;
  double eps;
};

Affine affine(Parameters& parameters, const NormArgs& n, int64_t channels, bool batch, const char* name) {
  const void* conv_bias = parameters.get(n.conv_bias, channels, name, "_bias");
  const void* weight = parameters.get(n.weight, channels, name, "_norm weight");
  const void* bias = parameters.get(n.bias, channels, name, "_norm bias");
  STD_TORCH_CHECK(n.mean.has_value() == n.var.has_value(), name,
                  "_norm needs both running_mean and running_var, or neither");
  const void* mean = parameters.get(n.mean, channels, name, "_norm running_mean");
  const void* variance = parameters.get(n.var, channels, name, "_norm running_var");
  if (batch) return {nullptr, nullptr, weight, bias};  // a bias before batch statistics changes nothing
  if (!n.mean) {
    STD_TORCH_CHECK(!n.weight && !n.bias, name, "_norm without statistics must have no weight and no bias");
    return {nullptr, nullptr, nullptr, conv_bias};
  }
  return {parameters.less(mean, conv_bias, channels), parameters.rstd(variance, channels, n.eps), weight, bias};
}

// What follows the products in inference: factors and addends in the compute type, worked out in double, as
// fif_ops/chain.py does, so that a unit gives the same bits whichever way it takes.
class Folded {
 public:
  Folded(const NormArgs& n, int64_t channels, ScalarType type, const char* name) {
    STD_TORCH_CHECK(n.mean.has_value() == n.var.has_value(), name,
                    "_norm needs both running_mean and running_var, or neither");
    STD_TORCH_CHECK(n.mean || (!n.weight && !n.bias), name, "_norm without statistics must have no weight and no bias");
    const Values conv_bias(n.conv_bias, channels, 0, name, "_bias"),
        mean(n.mean, channels, 0, name, "_norm running_mean"), variance(n.var, channels, 1, name, "_norm running_var"),
        weight(n.weight, channels, 1, name, "_norm weight"), bias(n.bias, channels, 0, name, "_norm bias");
    memory_ = std::make_unique_for_overwrite<double[]>(2 * channels);  // room for either type
    auto fold = [&](auto* scale) {
      auto* shift = scale + channels;
      for (int64_t i = 0; i < channels; ++i) {
        const double factor = n.var ? 1 / std::sqrt(variance[i] + n.eps) * weight[i] : 1;
        scale[i] = factor;
        shift[i] = (conv_bias[i] - mean[i]) * factor + bias[i];
      }
      affine_ = {nullptr, nullptr, scale, shift};
    };
    if (type == ScalarType::Double)
      fold(memory_.get());
    else
      fold(reinterpret_cast<float*>(memory_.get()));
  }
  const Affine& affine() const { return affine_; }

 private:
  // A tensor of one value a channel, of any floating dtype, or one value for all.
  class Values {
   public:
    Values(const OptionalTensor& t, int64_t channels, double otherwise, const char* norm, const char* name)
        : otherwise_(otherwise) {
      if (!t) return;
      STD_TORCH_CHECK(t->is_cpu(), norm, name, " must be on x's device");
      STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, norm, name, " must have ", channels, " values");
      dtype_ = dtype_of(*t, name);
      data_ = t->const_data_ptr();
      step_ = t->stride(0);
    }
    double operator[](int64_t i) const {
      if (!data_) return otherwise_;
      i *= step_;
      switch (dtype_) {
        case Dtype::f32: return static_cast<const float*>(data_)[i];
        case Dtype::f64: return static_cast<const double*>(data_)[i];
        case Dtype::bf16: return static_cast<const c10::BFloat16*>(data_)[i];
        default: return static_cast<const c10::Half*>(data_)[i];
      }
    }

   private:
    double otherwise_;
    Dtype dtype_{};
    const void* data_ = nullptr;
    int64_t step_ = 0;
  };

  std::unique_ptr<double[]> memory_;
  Affine affine_;
};

Problem cpu_problem(Problem p, bool training) {
  STD_TORCH_CHECK(p.groups == 1 && (p.stride == 1 || !training),
                  "the primary convolution must have one group on the CPU",
                  training ? ", and stride 1 in training" : "");
  return p;
}

Tensor infer(const Tensor& x, const OptionalTensor& primary_weight, const Tensor& cheap_weight,
             const OptionalTensor& primary_bias, const OptionalTensor& cheap_bias, const OptionalTensor& weight1,
             const OptionalTensor& bias1, const OptionalTensor& mean1, const OptionalTensor& var1,
             const OptionalTensor& weight2, const OptionalTensor& bias2, const OptionalTensor& mean2,
             const OptionalTensor& var2, double eps1, double eps2, int64_t out_channels, int64_t activation,
             bool splice, int64_t stride, int64_t groups, bool tf32) {
  const Problem p = cpu_problem(
      problem_of(x, primary_weight, cheap_weight, out_channels, activation, splice, stride, groups, tf32, true), false);
  const Folded primary({primary_bias, weight1, bias1, mean1, var1, eps1}, p.primary, compute_type(x), "primary");
  const Folded cheap({cheap_bias, weight2, bias2, mean2, var2, eps2}, p.cheap(), compute_type(x), "cheap");
  const Tensor input_map = regular(x, p.channels_last);
  const OptionalTensor w1 = dense(primary_weight);
  const Tensor w2 = dense(cheap_weight);
  const Tensor out = new_map(x, p, out_channels);
  const InferArgs args{input(input_map, p.channels_last),
                       w1 ? w1->const_data_ptr() : nullptr,
                       w2.const_data_ptr(),
                       primary.affine(),
                       cheap.affine(),
                       output(out, p.channels_last)};
  if (p.batch > 0) cpu_kernels().infer(p, args, cpu_threads(p));
  return out;
}

// running = (1 - momentum) * running + momentum * (batch + bias), in the running statistic's own dtype; `batch` is of
// the compute type of x.
void update_running(const Tensor& x, const OptionalTensor& running, const void* batch, const OptionalTensor& bias,
                    double momentum) {
  if (!running || momentum == 0.0) return;
  const ScalarType type = compute_type(x);
  auto as_batch = [&](const Tensor& t) { return dense(t.scalar_type() == type ? t : torch::stable::to(t, type)); };
  const Tensor before = as_batch(*running), offset = bias ? as_batch(*bias) : before;
  const int64_t channels = before.numel();
  const Tensor fresh = new_tensor(before, {channels}, type);
  auto update = [&](auto* to) {
    using A = std::remove_pointer_t<decltype(to)>;
    const A *old = static_cast<const A*>(before.const_data_ptr()), *from = static_cast<const A*>(batch),
            *plus = static_cast<const A*>(offset.const_data_ptr());
    for (int64_t i = 0; i < channels; ++i)
      to[i] = (1 - momentum) * old[i] + momentum * (from[i] + (bias ? plus[i] : 0));
  };
  if (type == ScalarType::Double)
    update(static_cast<double*>(fresh.mutable_data_ptr()));
  else
    update(static_cast<float*>(fresh.mutable_data_ptr()));
  Tensor target = *running;
  torch::stable::copy_(target, fresh);  // and not in place, so that autograd notices the change
}

// A map that is about to be written as a whole.
Tensor in_large_pages(Tensor map) {
  prefer_large_pages(map.mutable_data_ptr(), map.numel() * map.element_size());
  return map;
}

// Where another convolution made the raw maps, nothing is written to them.
Output read_only(const Tensor& x, bool channels_last) {
  const Input map = input(x, channels_last);
  return {const_cast<void*>(map.data), map.batch, map.step};
}

// Returns the output, the primary maps before normalisation (empty if those are x), and [mean, rstd] of both
// normalisations.
std::tuple<Tensor, Tensor, Tensor, Tensor> train(
    const Tensor& x, const OptionalTensor& primary_weight, const Tensor& cheap_weight,
    const OptionalTensor& primary_bias, const OptionalTensor& cheap_bias, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& mean1, const OptionalTensor& var1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const OptionalTensor& mean2, const OptionalTensor& var2, double eps1, double eps2,
    int64_t out_channels, int64_t activation, bool splice, bool batch1, bool batch2, double momentum1, double momentum2,
    int64_t stride, int64_t groups, bool tf32) {
  const Problem p = cpu_problem(
      problem_of(x, primary_weight, cheap_weight, out_channels, activation, splice, stride, groups, tf32), true);
  const ScalarType type = compute_type(x);
  Parameters parameters(type);
  const Tensor input_map = regular(x, p.channels_last);
  const OptionalTensor w1 = dense(primary_weight);
  const Tensor w2 = dense(cheap_weight);
  const Tensor out = in_large_pages(new_map(x, p, out_channels)),
               raw = p.has_primary ? in_large_pages(new_map(x, p, p.primary)) : new_tensor(x, {0}, x.scalar_type());
  const Tensor stats1 = new_tensor(x, {2, p.primary}, type), stats2 = new_tensor(x, {2, p.cheap()}, type);
  const Tensor fresh1 = new_tensor(x, {p.primary}, type), fresh2 = new_tensor(x, {p.cheap()}, type);
  const TrainArgs args{
      .x = input(input_map, p.channels_last),
      .primary_weight = w1 ? w1->const_data_ptr() : nullptr,
      .cheap_weight = w2.const_data_ptr(),
      .primary_bias = parameters.get(primary_bias, p.primary, "primary_bias", ""),
      .primary = affine(parameters, {std::nullopt, weight1, bias1, mean1, var1, eps1}, p.primary, batch1, "primary"),
      .cheap = affine(parameters, {cheap_bias, weight2, bias2, mean2, var2, eps2}, p.cheap(), batch2, "cheap"),
      .primary_batch = batch1,
      .cheap_batch = batch2,
      .primary_eps = eps1,
      .cheap_eps = eps2,
      .out = output(out, p.channels_last),
      .raw = p.has_primary ? output(raw, p.channels_last) : read_only(input_map, p.channels_last),
      .primary_stats = stats1.mutable_data_ptr(),
      .cheap_stats = stats2.mutable_data_ptr(),
      .primary_variance = fresh1.mutable_data_ptr(),
      .cheap_variance = fresh2.mutable_data_ptr()};
  if (p.batch == 0) {
    Tensor s1 = stats1, s2 = stats2;
    torch::stable::zero_(s1);
    torch::stable::zero_(s2);
    return {out, raw, stats1, stats2};
  }
  cpu_kernels().train(p, args, cpu_threads(p, kTrainingShare));
  if (batch1) {
    update_running(x, mean1, args.primary_stats, std::nullopt, momentum1);
    update_running(x, var1, args.primary_variance, std::nullopt, momentum1);
  }
  if (batch2) {
    update_running(x, mean2, args.cheap_stats, cheap_bias, momentum2);
    update_running(x, var2, args.cheap_variance, std::nullopt, momentum2);
  }
  return {out, raw, stats1, stats2};
}

// Gradients of x, primary_weight, cheap_weight (empty where not wanted) and of [weight, bias] of both normalisations.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& primary_weight, const Tensor& cheap_weight,
    const Tensor& raw, const Tensor& stats1, const Tensor& stats2, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& weight2, const OptionalTensor& bias2, int64_t activation,
    bool splice, bool batch1, bool batch2, bool need_x, bool need_primary_weight, int64_t stride, int64_t groups,
    bool tf32) {
  const Problem p = cpu_problem(problem_of(x, primary_weight, cheap_weight, grad.dim() == 4 ? grad.size(1) : 0,
                                           activation, splice, stride, groups, tf32),
                                true);
  const ScalarType type = compute_type(x);
  const bool need_weight = need_primary_weight && p.has_primary;
  check_map(grad, x, p, p.out_channels, "grad");
  check_map(raw, x, p, p.primary, "raw");
  auto statistics = [&](const Tensor& t, int64_t channels, const char* name) {
    check_statistics(t, x, channels, name);
    const char* data = static_cast<const char*>(t.const_data_ptr());
    return std::pair<const void*, const void*>(data, data + channels * (type == ScalarType::Double ? 8 : 4));
  };
  const auto [mean1, rstd1] = statistics(stats1, p.primary, "stats1");
  const auto [mean2, rstd2] = statistics(stats2, p.cheap(), "stats2");
  Parameters parameters(type);
  const bool last = p.channels_last;
  const Tensor input_map = regular(x, last), dense_grad = regular(grad, last), dense_raw = regular(raw, last);
  const OptionalTensor w1 = dense(primary_weight);
  const Tensor w2 = dense(cheap_weight);
  const ScalarType dtype = x.scalar_type();
  Tensor grad_x = need_x ? in_large_pages(new_input(x, p)) : new_tensor(x, {0}, dtype);
  Tensor grad_w1 = new_tensor(
      x, need_weight ? std::vector<int64_t>{p.primary, p.in_channels, 1, 1} : std::vector<int64_t>{0}, dtype);
  Tensor grad_w2 = new_tensor(x, {p.cheap(), 1, p.kernel, p.kernel}, dtype);
  Tensor grad_norm1 = new_tensor(x, {2, p.primary}, type), grad_norm2 = new_tensor(x, {2, p.cheap()}, type);
  if (p.batch == 0) {
    for (Tensor* t : {&grad_x, &grad_w1, &grad_w2, &grad_norm1, &grad_norm2}) torch::stable::zero_(*t);
    return {grad_x, grad_w1, grad_w2, grad_norm1, grad_norm2};
  }
  const BackwardArgs args{.grad = input(dense_grad, last),
                          .x = input(input_map, last),
                          .raw = input(dense_raw, last),
                          .primary_weight = w1 ? w1->const_data_ptr() : nullptr,
                          .cheap_weight = w2.const_data_ptr(),
                          .primary = {mean1, rstd1, parameters.get(weight1, p.primary, "weight1", ""),
                                      parameters.get(bias1, p.primary, "bias1", "")},
                          .cheap = {mean2, rstd2, parameters.get(weight2, p.cheap(), "weight2", ""),
                                    parameters.get(bias2, p.cheap(), "bias2", "")},
                          .primary_batch = batch1,
                          .cheap_batch = batch2,
                          .grad_x = need_x ? output(grad_x, last) : Output{},
                          .grad_primary_weight = need_weight ? grad_w1.mutable_data_ptr() : nullptr,
                          .grad_cheap_weight = grad_w2.mutable_data_ptr(),
                          .grad_primary_affine = grad_norm1.mutable_data_ptr(),
                          .grad_cheap_affine = grad_norm2.mutable_data_ptr()};
  cpu_kernels().backward(p, args, cpu_threads(p, kTrainingShare / 2));
  return {grad_x, grad_w1, grad_w2, grad_norm1, grad_norm2};
}

// Sizes of a depthwise convolution [C, 1, k, k] of x, padded by k / 2.
Problem strided_problem(const Tensor& x, const Tensor& weight, int64_t stride) {
  Problem p = problem_of(x, std::nullopt, weight, x.size(1), 0, true, 1, 1, false);
  STD_TORCH_CHECK(weight.size(0) == x.size(1), "weight must be (", x.size(1), ", 1, k, k)");
  STD_TORCH_CHECK(0 < stride && stride < (1 << 30), "stride is ", stride, ": must be positive");
  p.stride = stride;
  p.height = (p.in_height - 1) / stride + 1;
  p.width = (p.in_width - 1) / stride + 1;
  return p;
}

// A depthwise convolution, then batch normalisation with the batch's statistics: the result, the maps before
// normalisation and [mean, rstd].
std::tuple<Tensor, Tensor, Tensor> strided_train(const Tensor& x, const Tensor& weight,
                                                 const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                                 const OptionalTensor& mean, const OptionalTensor& var, double eps,
                                                 double momentum, int64_t stride) {
  const Problem p = strided_problem(x, weight, stride);
  const ScalarType type = compute_type(x);
  Parameters parameters(type);
  const Affine norm = affine(parameters, {std::nullopt, norm_weight, norm_bias, mean, var, eps}, p.primary, true, "");
  const Tensor input_map = regular(x, p.channels_last), w = dense(weight);
  const Tensor out = in_large_pages(new_map(x, p, p.primary)), raw = in_large_pages(new_map(x, p, p.primary));
  Tensor stats = new_tensor(x, {2, p.primary}, type);
  const Tensor variance = new_tensor(x, {p.primary}, type);
  if (p.batch == 0) {
    torch::stable::zero_(stats);
    return {out, raw, stats};
  }
  const StridedArgs args{.x = input(input_map, p.channels_last),
                         .weight = w.const_data_ptr(),
                         .norm = norm,
                         .eps = eps,
                         .out = output(out, p.channels_last),
                         .raw = output(raw, p.channels_last),
                         .stats = stats.mutable_data_ptr(),
                         .variance = variance.mutable_data_ptr()};
  cpu_kernels().strided_train(p, args, cpu_threads(p, kTrainingShare / 4));
  update_running(x, mean, args.stats, std::nullopt, momentum);
  update_running(x, var, args.variance, std::nullopt, momentum);
  return {out, raw, stats};
}

// Gradients of x (empty if not wanted), weight and [weight, bias] of the normalisation.
std::tuple<Tensor, Tensor, Tensor> strided_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                    const Tensor& raw, const Tensor& stats,
                                                    const OptionalTensor& norm_weight, bool need_x, int64_t stride) {
  const Problem p = strided_problem(x, weight, stride);
  const ScalarType type = compute_type(x);
  const bool last = p.channels_last;
  check_map(grad, x, p, p.primary, "grad");
  check_map(raw, x, p, p.primary, "raw");
  check_statistics(stats, x, p.primary, "stats");
  Parameters parameters(type);
  const Tensor input_map = regular(x, last), dense_grad = regular(grad, last), dense_raw = regular(raw, last);
  const Tensor w = dense(weight);
  Tensor grad_x = need_x ? in_large_pages(new_input(x, p)) : new_tensor(x, {0}, x.scalar_type());
  Tensor grad_weight = new_tensor(x, {p.primary, 1, p.kernel, p.kernel}, x.scalar_type());
  Tensor grad_norm = new_tensor(x, {2, p.primary}, type);
  if (p.batch == 0) {
    for (Tensor* t : {&grad_weight, &grad_norm}) torch::stable::zero_(*t);
    return {grad_x, grad_weight, grad_norm};
  }
  const char* mean = static_cast<const char*>(stats.const_data_ptr());
  const StridedArgs args{.x = input(input_map, last),
                         .weight = w.const_data_ptr(),
                         .norm = {mean, mean + p.primary * (type == ScalarType::Double ? 8 : 4),
                                  parameters.get(norm_weight, p.primary, "norm_weight", ""), nullptr},
                         .grad = input(dense_grad, last),
                         .kept_raw = input(dense_raw, last),
                         .grad_x = need_x ? output(grad_x, last) : Output{},
                         .grad_weight = grad_weight.mutable_data_ptr(),
                         .grad_affine = grad_norm.mutable_data_ptr()};
  cpu_kernels().strided_backward(p, args, cpu_threads(p, kTrainingShare / 8));
  return {grad_x, grad_weight, grad_norm};
}

}  // namespace
}  // namespace fif

// What Python asks about the library itself, by plain C calls.
extern "C" {
__attribute__((visibility("default"))) const char* fif_ops_cpu_isa() {
  const char* error = nullptr;
  const fif::Kernels* k = fif::chosen_kernels(&error);
  return k ? k->name : error;
}
__attribute__((visibility("default"))) const char* fif_ops_cpu_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const fif::Kernels* const* k = fif::available_kernels(); *k; ++k)
      joined += (joined.empty() ? "" : " ") + std::string((*k)->name);
    return joined;
  }();
  return names.c_str();
}
}

STABLE_TORCH_LIBRARY(fif_ops, m) {
  fif::define_operators(m);
  m.def(
      "strided_train(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor(a!)? mean, "
      "Tensor(b!)? var, float eps, float momentum, int stride) -> (Tensor, Tensor, Tensor)");
  m.def(
      "strided_backward(Tensor grad, Tensor x, Tensor weight, Tensor raw, Tensor stats, Tensor? norm_weight, "
      "bool need_x, int stride) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fif_ops, CPU, m) {
  m.impl("infer", TORCH_BOX(&fif::infer));
  m.impl("train", TORCH_BOX(&fif::train));
  m.impl("backward", TORCH_BOX(&fif::backward));
  m.impl("strided_train", TORCH_BOX(&fif::strided_train));
  m.impl("strided_backward", TORCH_BOX(&fif::strided_backward));
}
