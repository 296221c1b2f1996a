// What the operators of every device share: layouts, and the checks that keep any call, however odd, from reading or
// writing outside a tensor. LibTorch Stable ABI only.
//
// Users reach the operators through fif_ops.feature_augment, which explains bad input in words.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "problem.h"

namespace fif {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// f64 for f64 tensors, else f32.
ScalarType compute_type(const Tensor& x);

// x itself if its pixels lie at one regular step in the layout asked for, else a copy that does.
Tensor regular(const Tensor& x, bool channels_last);
Input input(const Tensor& x, bool channels_last);
Output output(const Tensor& x, bool channels_last);

// Uninitialised, on the device of `like`; a map has its batch size, height and width.
Tensor new_map(const Tensor& like, int64_t channels, bool channels_last);
Tensor new_tensor(const Tensor& like, std::vector<int64_t> size, ScalarType dtype);

// t must be on x's device and have its dtype.
void check_like(const Tensor& t, const Tensor& x, const char* name);

// Sizes and options, after the checks that all operators need.
Problem problem_of(const Tensor& x, const Tensor& primary_weight, const Tensor& cheap_weight, int64_t out_channels,
                   int64_t activation, bool splice);

}  // namespace fif
