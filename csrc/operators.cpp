#include "operators.h"

namespace fif {
namespace {

int64_t step_of(const Tensor& x, bool channels_last) {
  if (!channels_last) return x.stride(1);
  return x.size(3) > 1 ? x.stride(3) : x.size(2) > 1 ? x.stride(2) : x.size(1);
}

Tensor new_activation(const Tensor& like, std::vector<int64_t> size, bool channels_last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace

Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

bool is_channels_last(const Tensor& x) {
  if (x.stride(1) == 0) return false;
  int64_t smallest = 0;
  for (int dim : {1, 3, 2, 0}) {
    if (x.size(dim) == 0 || x.stride(dim) < smallest || (dim == 0 && smallest == x.stride(1))) return false;
    smallest = x.stride(dim) * x.size(dim);
  }
  return true;
}

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor regular(const Tensor& x, bool channels_last) {
  const int64_t height = x.size(2), width = x.size(3);
  if (channels_last) {
    const bool rows = height == 1 || width == 1 || x.stride(2) == width * x.stride(3);
    if ((x.size(1) == 1 || x.stride(1) == 1) && rows) return x;
    return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  }
  if ((width == 1 || x.stride(3) == 1) && (height == 1 || x.stride(2) == width)) return x;
  return torch::stable::contiguous(x);
}

Input input(const Tensor& x, bool channels_last) {
  return {x.const_data_ptr(), x.stride(0), step_of(x, channels_last)};
}
Output output(const Tensor& x, bool channels_last) {
  return {x.mutable_data_ptr(), x.stride(0), step_of(x, channels_last)};
}

Tensor new_map(const Tensor& like, const Problem& p, int64_t channels) {
  return new_activation(like, {p.batch, channels, p.height, p.width}, p.channels_last);
}

Tensor new_input(const Tensor& like, const Problem& p) {
  return new_activation(like, {p.batch, p.in_channels, p.in_height, p.in_width}, p.channels_last);
}

Tensor new_tensor(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::empty(size, dtype, std::nullopt, like.device());
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name,
                  " must be on x's device");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have x's dtype");
}

void check_map(const Tensor& t, const Tensor& x, const Problem& p, int64_t channels, const char* name) {
  check_like(t, x, name);
  STD_TORCH_CHECK(
      t.dim() == 4 && t.size(0) == p.batch && t.size(1) == channels && t.size(2) == p.height && t.size(3) == p.width,
      name, " must be (", p.batch, ", ", channels, ", ", p.height, ", ", p.width, ")");
}

void check_statistics(const Tensor& t, const Tensor& x, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == 2 && t.size(1) == channels && t.is_contiguous() &&
                      t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index() &&
                      t.scalar_type() == compute_type(x),
                  name, " must be what fif_ops::train returned");
}

Problem problem_of(const Tensor& x, const OptionalTensor& primary_weight, const Tensor& cheap_weight,
                   int64_t out_channels, int64_t activation, bool splice, int64_t stride, int64_t groups, bool tf32,
                   bool any_kernel) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (B, C, H, W), got ", x.dim());
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "x must have channels and pixels");
  STD_TORCH_CHECK(x.size(2) < (1 << 30) && x.size(3) < (1 << 30), "x's height and width must be below 2^30");
  STD_TORCH_CHECK(0 < stride && stride < (1 << 30), "stride is ", stride, ": must be positive");
  STD_TORCH_CHECK(0 < groups && x.size(1) % groups == 0, "groups is ", groups, ": must divide x's ", x.size(1),
                  " channels");
  int primary_kernel = 1;
  if (primary_weight) {
    const Tensor& w = *primary_weight;
    check_like(w, x, "primary_weight");
    const int64_t k = w.dim() == 4 && any_kernel ? w.size(2) : 1;
    STD_TORCH_CHECK(w.dim() == 4 && w.size(0) > 0 && w.size(0) % groups == 0 && w.size(1) == x.size(1) / groups &&
                        w.size(2) == k && w.size(3) == k && (k == 1 || k == 3 || k == 5 || k == 7),
                    "primary_weight must be (M, ", x.size(1) / groups,
                    any_kernel ? ", k, k), k 1, 3, 5 or 7, M a multiple of " : ", 1, 1), M a multiple of ", groups);
    primary_kernel = static_cast<int>(k);
  } else {
    STD_TORCH_CHECK(stride == 1 && groups == 1, "stride and groups must be 1 without a primary_weight");
  }
  const int64_t maps = primary_weight ? primary_weight->size(0) : x.size(1);
  check_like(cheap_weight, x, "cheap_weight");
  const Tensor& w2 = cheap_weight;
  STD_TORCH_CHECK(
      w2.dim() == 4 && w2.size(0) > 0 && w2.size(0) % maps == 0 && w2.size(1) == 1 && w2.size(2) == w2.size(3),
      "cheap_weight must be (S * ", maps, ", 1, d, d)");
  const int64_t kernel = w2.size(2);
  STD_TORCH_CHECK(kernel == 1 || kernel == 3 || kernel == 5 || kernel == 7,
                  "cheap_weight's d must be 1, 3, 5 or 7, got ", kernel);
  STD_TORCH_CHECK(0 <= activation && activation <= static_cast<int>(Activation::gelu),
                  "activation must be a code from 0 to 5");
  Problem p{.batch = x.size(0),
            .in_channels = x.size(1),
            .in_height = x.size(2),
            .in_width = x.size(3),
            .height = (x.size(2) - 1) / stride + 1,
            .width = (x.size(3) - 1) / stride + 1,
            .stride = stride,
            .groups = groups,
            .primary = maps,
            .multiplier = w2.size(0) / maps,
            .out_channels = out_channels,
            .kernel = static_cast<int>(kernel),
            .activation = static_cast<Activation>(activation),
            .splice = splice,
            .channels_last = is_channels_last(x),
            .has_primary = primary_weight.has_value(),
            .tf32 = tf32,
            .dtype = dtype_of(x, "x"),
            .primary_kernel = primary_kernel};
  STD_TORCH_CHECK(p.kept_primary() <= out_channels && 0 < out_channels && out_channels <= p.kept_primary() + p.cheap(),
                  "out_channels is ", out_channels, ": must be from ", splice ? p.primary : 1, " to ",
                  p.kept_primary() + p.cheap());
  return p;
}

}  // namespace fif
