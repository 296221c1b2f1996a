// What the kernels of the unit share: activations and their slopes, normalisation constants, four elements at a time,
// and sums and moments that are the same from run to run.
#pragma once

#include "../problem.h"
#include "calls.h"
#include "device.h"
#include "plan.h"

namespace fif::gpu {

constexpr int kWarps = kThreads / 32;
constexpr int kQuad = 4;  // elements that a thread of the depthwise part works on together

FIF_DEVICE float activate(float v, Activation a) {
  switch (a) {
    case Activation::none: return v;
    case Activation::relu: return v < 0.f ? 0.f : v;  // keeps NaN, as fmaxf would not
    case Activation::relu6: return v < 0.f ? 0.f : v > 6.f ? 6.f : v;
    case Activation::hardswish: {
      const float gate = v + 3.f;
      return v * (gate < 0.f ? 0.f : gate > 6.f ? 6.f : gate) * (1.f / 6.f);
    }
    case Activation::silu: return v / (1.f + expf(-v));
    default: return 0.5f * v * (1.f + erff(v * 0.70710678f));
  }
}

// g times the slope of the activation at u; on a kink the slope that torch takes.
FIF_DEVICE float activation_gradient(float g, float u, Activation a) {
  switch (a) {
    case Activation::none: return g;
    case Activation::relu: return u <= 0.f ? 0.f : g;
    case Activation::relu6: return u <= 0.f || u >= 6.f ? 0.f : g;
    case Activation::hardswish: return u <= -3.f ? 0.f : u < 3.f ? g * (u * (1.f / 3.f) + 0.5f) : g;
    case Activation::silu: {
      const float s = 1.f / (1.f + expf(-u));
      return g * s * (1.f + u * (1.f - s));
    }
    default: {
      const float cdf = 0.5f * (1.f + erff(u * 0.70710678f));
      return g * (cdf + u * 0.39894228f * expf(-0.5f * u * u));
    }
  }
}

template <class T>
FIF_DEVICE float value_at(const void* values, int64_t i, bool is_float, float otherwise) {
  if (values == nullptr) return otherwise;
  return is_float ? static_cast<const float*>(values)[i] : to_float(static_cast<const T*>(values)[i]);
}

// A channel's normalisation as v * scale + shift.
template <class T>
FIF_DEVICE float2 scale_shift(const NormPointers& n, int64_t channel, float mean, float rstd) {
  const float scale = rstd * value_at<T>(n.weight, channel, n.is_float, 1.f);
  return {scale, value_at<T>(n.bias, channel, n.is_float, 0.f) - mean * scale};
}

// The same with running statistics, the convolution's bias among them; without any, the bias alone.
template <class T>
FIF_DEVICE float2 frozen_scale_shift(const NormPointers& n, int64_t channel) {
  if (n.mean == nullptr) return {1.f, value_at<T>(n.bias, channel, n.is_float, 0.f)};
  const float bias = value_at<T>(n.conv_bias, channel, n.is_float, 0.f);
  const float rstd = rsqrtf(value_at<T>(n.variance, channel, n.is_float, 1.f) + n.eps);
  return scale_shift<T>(n, channel, value_at<T>(n.mean, channel, n.is_float, 0.f) - bias, rstd);
}

// ---- four elements

template <class T>
FIF_DEVICE bool aligned_quad(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kQuad * sizeof(T)) == 0;
}

// Shared memory, aligned.
template <class T>
FIF_DEVICE void load_quad(const T* from, float (&v)[kQuad]) {
  const Vec<T, kQuad> raw = vec_load<kQuad>(from);
  FIF_UNROLL
  for (int q = 0; q < kQuad; ++q) v[q] = to_float(raw[q]);
}

template <class T>
FIF_DEVICE void store_quad(T* to, const float (&v)[kQuad]) {
  Vec<T, kQuad> raw;
  FIF_UNROLL
  for (int q = 0; q < kQuad; ++q) raw[q] = from_float<T>(v[q]);
  vec_store(to, raw);
}

// Global memory that nothing writes meanwhile: the first `count` of four elements `stride` apart, zeros for the rest.
template <class T>
FIF_DEVICE void get_quad(const T* from, int64_t stride, int64_t count, float (&v)[kQuad]) {
  if (stride == 1 && count >= kQuad && aligned_quad(from)) {
    const Vec<T, kQuad> raw = vec_load_const<kQuad>(from);
    FIF_UNROLL
    for (int q = 0; q < kQuad; ++q) v[q] = to_float(raw[q]);
  } else {
    FIF_UNROLL
    for (int q = 0; q < kQuad; ++q) v[q] = q < count ? to_float(load_const(from + q * stride)) : 0.f;
  }
}

template <class T>
FIF_DEVICE void put_quad(T* to, int64_t stride, int64_t count, const Vec<T, kQuad>& v) {
  if (stride == 1 && count >= kQuad && aligned_quad(to)) return vec_store(to, v);
  FIF_UNROLL
  for (int q = 0; q < kQuad; ++q)
    if (q < count) to[q * stride] = v[q];
}

template <class T>
FIF_DEVICE void put_quad(T* to, int64_t stride, int64_t count, const float (&v)[kQuad]) {
  Vec<T, kQuad> raw;
  FIF_UNROLL
  for (int q = 0; q < kQuad; ++q) raw[q] = from_float<T>(v[q]);
  put_quad(to, stride, count, raw);
}

// ---- moments

// Count, mean, and sum of squared deviations from it. Never a difference of large sums, so a large mean costs nothing.
struct Moments {
  float count = 0.f, mean = 0.f, m2 = 0.f;

  FIF_DEVICE void merge(const Moments& other) {
    const float total = count + other.count;
    if (total == 0.f) return;
    const float delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

// Running moments of S channels that a thread sees the same number of values of.
template <int S>
struct Tally {
  float count = 0.f, mean[S] = {}, m2[S] = {};

  FIF_DEVICE void add(const float (&v)[S]) {
    count += 1.f;
    const float share = 1.f / count;
    FIF_UNROLL
    for (int s = 0; s < S; ++s) {
      const float delta = v[s] - mean[s];
      mean[s] += delta * share;
      m2[s] += delta * (v[s] - mean[s]);
    }
  }
  FIF_DEVICE Moments moments(int s) const { return {count, mean[s], m2[s]}; }
};

// ---- sums over blocks, in two stages: a block leaves its part of each channel's, the kernel after it adds them up

// Value `item` of a channel from this block.
FIF_DEVICE float* partial(const Partials& p, int64_t channel, int items, int item, int block) {
  return p.data + (channel * items + item) * p.count + block;
}

// By a whole warp; all lanes get the result.
FIF_DEVICE Moments merged_moments(const Partials& p, int64_t channel) {
  Moments m;
  for (int i = lane_id(); i < p.count; i += 32)
    m.merge({*partial(p, channel, 3, 0, i), *partial(p, channel, 3, 1, i), *partial(p, channel, 3, 2, i)});
  FIF_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    const Moments other{__shfl_xor_sync(kFullWarp, m.count, step), __shfl_xor_sync(kFullWarp, m.mean, step),
                        __shfl_xor_sync(kFullWarp, m.m2, step)};
    m.merge(other);
  }
  // Merging is not symmetric to the last bit: what one lane says holds for all.
  return {m.count, __shfl_sync(kFullWarp, m.mean, 0), __shfl_sync(kFullWarp, m.m2, 0)};
}

FIF_DEVICE float merged_sum(const Partials& p, int64_t channel, int items, int item) {
  float sum = 0.f;
  for (int i = lane_id(); i < p.count; i += 32) sum += *partial(p, channel, items, item, i);
  return warp_sum(sum);
}

FIF_DEVICE void update_running(float* running, int64_t channel, float fresh, float momentum) {
  if (running != nullptr) running[channel] = (1.f - momentum) * running[channel] + momentum * fresh;
}

// mean and rstd of one channel in training, by a whole warp: batch statistics from the partials, or the frozen ones.
// The warp whose `writes` is set stores them for the kernels that follow, and updates the running ones.
template <class T>
FIF_DEVICE float2 statistics(const TrainNorm& n, int64_t channel, bool writes) {
  float mean = 0.f, rstd = 1.f;
  if (n.ready) {
    mean = n.stats[channel];
    rstd = n.stats[n.channels + channel];
  } else if (n.batch) {
    const Moments m = merged_moments(n.partials, channel);
    const float variance = m.m2 / m.count;
    mean = m.mean;
    rstd = 1.f / sqrtf(variance + n.norm.eps);
    if (writes && lane_id() == 0) {
      const float bias = value_at<T>(n.norm.conv_bias, channel, n.norm.is_float, 0.f);
      update_running(n.running_mean, channel, mean + bias, n.momentum);
      update_running(n.running_variance, channel, m.m2 / (m.count - 1.f), n.momentum);
    }
  } else if (n.norm.mean != nullptr) {
    const float bias = value_at<T>(n.norm.conv_bias, channel, n.norm.is_float, 0.f);
    mean = value_at<T>(n.norm.mean, channel, n.norm.is_float, 0.f) - bias;
    rstd = 1.f / sqrtf(value_at<T>(n.norm.variance, channel, n.norm.is_float, 1.f) + n.norm.eps);
  }
  if (writes && !n.ready && n.stats != nullptr && lane_id() == 0) {
    n.stats[channel] = mean;
    n.stats[n.channels + channel] = rstd;
  }
  return {mean, rstd};
}

}  // namespace fif::gpu
