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
Dtype dtype_of(const Tensor& x, const char* name);

// torch's own rule for the results of convolutions; fif_ops.reference.memory_format_of is its twin.
bool is_channels_last(const Tensor& x);

// x itself if its pixels lie at one regular step in the layout asked for, else a copy that does.
Tensor regular(const Tensor& x, bool channels_last);
Input input(const Tensor& x, bool channels_last);
Output output(const Tensor& x, bool channels_last);

// Uninitialised, on the device of `like`, of its dtype where none is given; a map has the problem's batch and size.
Tensor new_map(const Tensor& like, const Problem& p, int64_t channels);
Tensor new_input(const Tensor& like, const Problem& p);
Tensor new_tensor(const Tensor& like, std::vector<int64_t> size, ScalarType dtype);

// t must be on x's device and have its dtype.
void check_like(const Tensor& t, const Tensor& x, const char* name);
// t must be like x and be `channels` maps of the problem.
void check_map(const Tensor& t, const Tensor& x, const Problem& p, int64_t channels, const char* name);
// t must be [mean, rstd] of so many channels, as fif_ops::train returns them.
void check_statistics(const Tensor& t, const Tensor& x, int64_t channels, const char* name);

// Sizes and options, after the checks that all operators need. Without a primary_weight x holds the primary maps; with
// any_kernel that weight may be k x k, padded by k / 2.
Problem problem_of(const Tensor& x, const OptionalTensor& primary_weight, const Tensor& cheap_weight,
                   int64_t out_channels, int64_t activation, bool splice, int64_t stride, int64_t groups, bool tf32,
                   bool any_kernel = false);

// The CPU's kernels (csrc/ops.cpp). Raises if FIF_OPS_CPU_ISA names no variant.
const Kernels& cpu_kernels();
// Torch's threads to run them on: one for every `share` multiply-adds, since to wake one takes microseconds.
Threads cpu_threads(const Problem& p, int64_t share = 100'000);

// Runs a program of stages with constants that were packed for it (csrc/frozen.cpp).
Tensor run(const Tensor& x, const Tensor& program, const Tensor& packed, int64_t out_channels, int64_t stride);

// The operators' schemas. Without a primary_weight x holds the primary maps before normalisation, made by another
// convolution.
template <class Library>
void define_operators(Library& m) {
  m.def(
      "infer(Tensor x, Tensor? primary_weight, Tensor cheap_weight, Tensor? primary_bias, Tensor? cheap_bias, "
      "Tensor? weight1, Tensor? bias1, Tensor? mean1, Tensor? var1, Tensor? weight2, Tensor? bias2, Tensor? mean2, "
      "Tensor? var2, float eps1, float eps2, int out_channels, int activation, bool splice, "
      "*, int stride=1, int groups=1, bool tf32=False) -> Tensor");
  m.def(
      "train(Tensor x, Tensor? primary_weight, Tensor cheap_weight, Tensor? primary_bias, Tensor? cheap_bias, "
      "Tensor? weight1, Tensor? bias1, Tensor(a!)? mean1, Tensor(b!)? var1, Tensor? weight2, Tensor? bias2, "
      "Tensor(c!)? mean2, Tensor(d!)? var2, float eps1, float eps2, int out_channels, int activation, bool splice, "
      "bool batch1, bool batch2, float momentum1, float momentum2, "
      "*, int stride=1, int groups=1, bool tf32=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward(Tensor grad, Tensor x, Tensor? primary_weight, Tensor cheap_weight, Tensor raw, Tensor stats1, "
      "Tensor stats2, Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, int activation, bool splice, "
      "bool batch1, bool batch2, bool need_x, bool need_primary_weight, "
      "*, int stride=1, int groups=1, bool tf32=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace fif
