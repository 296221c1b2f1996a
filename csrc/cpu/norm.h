// Batch normalisation in training: statistics over the batch, and the gradient through them.
#pragma once

#include "unit.h"

namespace fif::FIF_ISA {

// Mean, and sum of squares around it, of one channel (of each lane's channel).
template <class A>
struct Moments {
  Vec<A> mean, squares;
};

// Of so many pixels with value(vector, lanes). Sums are taken around the mean of the first eighth. That is part of the
// population, so its distance from the mean of all is at most sqrt(8) standard deviations, and the squares lose next to
// nothing to cancellation, wherever the mean lies.
template <class A, bool Planar, class Value>
Moments<A> moments(int64_t pixels, Value value) {
  const int64_t some = min_of(pixels, Planar ? ceil_div(pixels, 8 * kLanes<A>) * kLanes<A> : ceil_div(pixels, 8));
  PairSum<A> begin, all;
  each_vector<A, Planar>(some, [&](int64_t i, Mask m) { begin.add(keep_lanes(value(i, m), m), Vec<A>{}); });
  begin.finish();
  const Vec<A> centre = Unit<A, Planar>::total(begin.first) / static_cast<A>(some);
  each_vector<A, Planar>(pixels, [&](int64_t i, Mask m) {
    const Vec<A> d = keep_lanes(value(i, m) - centre, m);
    all.add(d, d * d);
  });
  all.finish();
  const Vec<A> shift = Unit<A, Planar>::total(all.first) / static_cast<A>(pixels);
  return {centre + shift, Unit<A, Planar>::total(all.second) - shift * shift * static_cast<A>(pixels)};
}

// Moments of a chunk's blocks so far: adds those of `count` more pixels.
template <class A, bool Planar>
void add_moments(const ChunkSums& sums, const Unit<A, Planar>& unit, int64_t chunk, int64_t seen, int64_t count,
                 const Moments<A>& block, int64_t stride, int64_t offset) {
  double* mean = sums.at(chunk, 0) + unit.channel * stride + offset;
  double* squares = sums.at(chunk, 1) + unit.channel * stride + offset;
  const double share = static_cast<double>(count) / static_cast<double>(seen + count);
  const double weight = static_cast<double>(seen) * share;
  for (int l = 0; l < unit.count; ++l, mean += stride, squares += stride) {
    const double m = block.mean[l], s = block.squares[l];
    if (seen == 0) {
      *mean = m;
      *squares = s;
    } else {
      const double d = m - *mean;
      *mean += d * share;
      *squares += s + d * d * weight;
    }
  }
}

// Mean, rstd and unbiased variance of every channel from the moments of the chunks.
template <class A>
void finish_moments(const ChunkSums& sums, const Sweep& sweep, double eps, A* mean, A* rstd, A* variance) {
  const Scratch<double> memory(2 * sums.channels);
  double *middle = memory.get(), *total = middle + sums.channels, count = 0;
  for (int64_t i = 0; i < 2 * sums.channels; ++i) middle[i] = 0;
  for (int64_t chunk = 0; chunk < sweep.chunks; ++chunk) {
    const double pixels = static_cast<double>(sweep.pixels(chunk));
    count += pixels;
    for (int64_t i = 0; i < sums.channels; ++i) middle[i] += pixels * sums.at(chunk, 0)[i];
  }
  for (int64_t i = 0; i < sums.channels; ++i) middle[i] /= count;
  for (int64_t chunk = 0; chunk < sweep.chunks; ++chunk) {
    const double pixels = static_cast<double>(sweep.pixels(chunk));
    for (int64_t i = 0; i < sums.channels; ++i) {
      const double d = sums.at(chunk, 0)[i] - middle[i];
      total[i] += sums.at(chunk, 1)[i] + pixels * d * d;
    }
  }
  for (int64_t i = 0; i < sums.channels; ++i) {
    mean[i] = static_cast<A>(middle[i]);
    rstd[i] = A(1) / sqrt(static_cast<A>(total[i] / count) + static_cast<A>(eps));
    variance[i] = static_cast<A>(total[i] / (count - 1));
  }
}

// Mean and rstd to normalise with: the batch's, or the given ones; kept for backward in `stats` [2, channels].
template <class A>
Affine statistics(const Affine& given, bool batch, const ChunkSums& sums, const Sweep& sweep, double eps, void* stats,
                  void* variance, int64_t channels) {
  A *mean = static_cast<A*>(stats), *rstd = mean + channels;
  if (batch) {
    finish_moments(sums, sweep, eps, mean, rstd, static_cast<A*>(variance));
  } else {
    for (int64_t i = 0; i < channels; ++i) {
      mean[i] = value_or<A>(given.mean, i, 0);
      rstd[i] = value_or<A>(given.rstd, i, 1);
    }
  }
  return {mean, rstd, given.weight, given.bias};
}

// One normalisation, and the gradient through it: scale * (g - alpha - beta * (value - mean)).
template <class A>
class Norm {
 public:
  Norm(const Affine& affine, int64_t channels) : memory_(5 * channels), channels_(channels), rstd_(affine.rstd) {
    const ScaleShift<A> both(affine, channels);
    for (int64_t i = 0; i < channels; ++i) {
      at(0)[i] = value_or<A>(affine.mean, i, 0);
      at(1)[i] = both.scale()[i];
      at(2)[i] = both.shift()[i];
      at(3)[i] = at(4)[i] = 0;
    }
  }
  const A* mean() const { return at(0); }
  const A* scale() const { return at(1); }
  const A* shift() const { return at(2); }
  const A* alpha() const { return at(3); }
  const A* beta() const { return at(4); }

  // From the sums of the gradient after it and of that times the centred value: the gradients of bias and, times rstd,
  // weight; and where the statistics are the batch's, alpha and beta.
  void finish(const ChunkSums& sums, int64_t chunks, bool batch, double count, A* grad_weight) {
    const double *plain = sums.total(chunks, 0), *centred = sums.total(chunks, 1);
    A* grad_bias = grad_weight + channels_;
    for (int64_t i = 0; i < channels_; ++i) {
      const A rstd = value_or<A>(rstd_, i, 1);
      grad_weight[i] = static_cast<A>(centred[i]) * rstd;
      grad_bias[i] = static_cast<A>(plain[i]);
      if (!batch) continue;
      at(3)[i] = static_cast<A>(plain[i] / count);
      at(4)[i] = static_cast<A>(centred[i] / count) * rstd * rstd;
    }
  }

 private:
  A* at(int64_t i) const { return memory_.get() + i * channels_; }
  Scratch<A> memory_;
  int64_t channels_;
  const void* rstd_;
};

// The same of one unit.
template <class A, bool Planar>
struct UnitNorm {
  Vec<A> mean, scale, shift, alpha, beta;
  UnitNorm(const Unit<A, Planar>& unit, const Norm<A>& norm, int64_t stride, int64_t offset) {
    mean = unit.parameter(norm.mean(), stride, offset);
    scale = unit.parameter(norm.scale(), stride, offset);
    shift = unit.parameter(norm.shift(), stride, offset);
    alpha = unit.parameter(norm.alpha(), stride, offset);
    beta = unit.parameter(norm.beta(), stride, offset);
  }
  FIF_INLINE Vec<A> normalised(Vec<A> value) const { return value * scale + shift; }
  FIF_INLINE Vec<A> through(Vec<A> g, Vec<A> value) const { return scale * (g - alpha - beta * (value - mean)); }
};

// The gradient [maps, taps] of a depthwise weight from the sums of all chunks, one kind a tap.
template <class T>
void store_weight_gradient(const ChunkSums& sums, int64_t chunks, int64_t taps, T* gradient) {
  using A = Compute<T>;
  for (int64_t t = 0; t < taps; ++t) {
    const double* total = sums.total(chunks, t);
    for (int64_t i = 0; i < sums.channels; ++i)
      store(gradient + i * taps + t, splat(static_cast<A>(total[i])), Mask(1));
  }
}

}  // namespace fif::FIF_ISA
