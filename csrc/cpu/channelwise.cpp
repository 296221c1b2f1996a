// Inference with lanes along channels: channels_last maps, planes of few pixels (where rows would waste lanes), and
// every stage of a frozen network. See infer.cpp for the unit and its other form.
//
// A task takes one image and one block of channels and walks down the map in tiles of rows. The primary maps of a tile
// and its halo lie dense, in the compute type, in scratch that stays in cache; the cheap maps go from registers to
// their place in the output. A primary convolution that is not 1x1 is a product over patches, gathered some pixels at a
// time. Where a depthwise convolution follows, the cheap maps stay in scratch too, and only its result is written.
#include "pass.h"

namespace fif::FIF_ISA {
namespace {

// Channels m, m + 1, ... m + width - 1 of the primary maps; lanes beyond the last channel included.
struct Block {
  int64_t m, width;
};

// The channels of a unit in blocks of whole vectors, as few and as even as may be.
template <class A>
struct Blocks {
  static constexpr int kVectors = 3, L = kLanes<A>;
  const int64_t vectors, count;

  explicit Blocks(const Problem& p) : vectors(ceil_div(p.primary, L)), count(ceil_div(vectors, kVectors)) {}
  Block operator[](int64_t i) const {
    const int64_t from = i * vectors / count * L;
    return {from, (i + 1) * vectors / count * L - from};
  }
  int64_t most() const { return ceil_div(vectors, count) * L; }  // channels of the widest
};

// Whether the product takes bf16 numbers in pairs, as they lie in x.
bool paired(const Problem& p) { return kBf16Dot && p.dtype == Dtype::bf16 && p.channels_last; }

// The parameters of a unit by blocks of channels; lanes beyond the last channel hold zeros.
template <class T>
class Constants {
  using A = Compute<T>;
  static constexpr int L = kLanes<A>;
  const Problem& p;
  const Blocks<A> blocks;
  const int64_t depth, padded;  // depth: of the product, 0 without one
  const int64_t taps, depthwise_taps;
  A* const data;

 public:
  Constants(const Problem& problem, const void* memory)
      : p(problem), blocks(p), depth(p.has_primary ? p.depth() : 0), padded(blocks.vectors * L),
        taps(int64_t(p.kernel) * p.kernel), depthwise_taps(int64_t(p.depthwise_kernel) * p.depthwise_kernel),
        data(static_cast<A*>(const_cast<void*>(memory))) {}

  int64_t bytes() const { return (depthwise(padded, 0) - primary(0)) * int64_t(sizeof(A)); }
  // [depth, width of the block that begins at channel m]; where they are paired, [ceil(depth / 2), width] pairs
  A* primary(int64_t m) const { return data + m * depth; }
  A* scale(int64_t m) const { return primary(padded) + m; }
  A* shift(int64_t m) const { return scale(m) + padded; }
  // [K * K + 1, L]: taps times scale, then shift, of the cheap maps number s of the vector at channel m
  A* cheap(int64_t m, int64_t s) const { return shift(padded) + (m * p.multiplier + s * L) * (taps + 1); }
  // The same of the depthwise convolution, for the primary maps (part 0) or their cheap maps number part - 1.
  A* depthwise(int64_t m, int64_t part) const {
    return cheap(padded, 0) + (depthwise_taps ? (m * (1 + p.multiplier) + part * L) * (depthwise_taps + 1) : 0);
  }

  void pack(const InferArgs& a) const {
    for (int64_t i = 0; p.has_primary && i < blocks.count; ++i) pack_primary(a, blocks[i]);
    for (int64_t m = 0; m < padded; m += L) {
      const int64_t channels = max_of<int64_t>(0, min_of<int64_t>(L, p.primary - m));
      const Mask lanes = first_lanes(channels);
      affine(a.primary, m, 1, lanes, scale(m), shift(m));
      for (int64_t s = 0; s < p.multiplier; ++s)
        pack_taps(a.cheap_weight, a.cheap, taps, m * p.multiplier + s, p.multiplier, lanes, cheap(m, s));
      for (int64_t part = 0; depthwise_taps && part <= p.multiplier; ++part) {
        const int64_t step = part ? p.multiplier : 1;
        const int64_t channel = part ? p.kept_primary() + m * step + part - 1 : m;
        const int64_t kept = part || p.splice ? ceil_div(max_of<int64_t>(0, p.out_channels - channel), step) : 0;
        pack_taps(a.depthwise_weight, a.depthwise, depthwise_taps, channel, step, first_lanes(min_of(channels, kept)),
                  depthwise(m, part));
      }
    }
  }

 private:
  // Depth runs over rows and columns of the window, then channels, as a patch of a channels_last map lies in memory.
  void pack_primary(const InferArgs& a, Block block) const {
    const auto [m, width] = block;
    const int64_t channels = min_of(width, p.primary - m), window = depth / p.in_channels;
    const T* weight = static_cast<const T*>(a.primary_weight) + m * depth;
    if (channels < width) memset(primary(m), 0, width * depth * sizeof(A));
    if (window == 1)
      transpose(weight, depth, channels, depth, primary(m), width);
    else
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < channels; ++i)
          primary(m)[k * width + i] = to_compute(weight[i * depth + k % p.in_channels * window + k / p.in_channels]);
    if (paired(p)) pair_up(primary(m), width);
  }

  // Rows 2k and 2k + 1 become row k; the values are bf16 ones, whose low halves are empty.
  void pair_up(A* rows, int64_t width) const {
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t i = 0; i < width; i += L) {
        const VecU even = (VecU)load(rows + k * width + i);
        const VecU odd = k + 1 < depth ? (VecU)load(rows + (k + 1) * width + i) : VecU{};
        store(rows + k / 2 * width + i, (Vec<A>)(even >> 16 | odd));
      }
  }

  // Of channels j, j + step, ...
  static void pack_taps(const void* weight, const Affine& norm, int64_t count, int64_t j, int64_t step, Mask lanes,
                        A* to) {
    A factor[L];
    affine(norm, j, step, lanes, factor, to + count * L);
    for (int64_t t = 0; t < count; ++t)
      store(to + t * L,
            load(factor) * load_strided(static_cast<const T*>(weight) + j * count + t, step * count, lanes));
  }
  static void affine(const Affine& norm, int64_t j, int64_t step, Mask lanes, A* scale, A* shift) {
    auto get = [&](const void* values, A otherwise) {
      return values ? load_strided(static_cast<const A*>(values) + j, step, lanes) : splat<A>(otherwise);
    };
    const Vec<A> factor = get(norm.rstd, 1) * get(norm.weight, 1);
    store(scale, factor);
    store(shift, get(norm.bias, 0) - get(norm.mean, 0) * factor);
  }
};

// out[0, count) = in[0, count), from the element type to itself or to the compute type.
template <class T>
FIF_INLINE void copy_run(const T* in, Compute<T>* out, int64_t count) {
  constexpr int L = kLanes<Compute<T>>;
  for (int64_t i = 0; i < count; i += L) {
    const Mask lanes = first_lanes(min_of<int64_t>(L, count - i));
    store(out + i, load(in + i, lanes), lanes);
  }
}
FIF_INLINE void copy_run(const bf16* in, bf16* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Mask lanes = first_lanes(min_of<int64_t>(kLanes<float>, count - i));
    store_bits(&out[i].bits, load_bits(&in[i].bits, lanes), lanes);
  }
}

template <class T, int K>
class ChannelWise {
  using A = Compute<T>;
  static constexpr int L = kLanes<A>, P = K / 2;
  static constexpr int64_t kPixels = 4 * kTileRows;  // that are gathered or widened at a time
  const Problem& p;
  const InferArgs& a;
  const Blocks<A> blocks;
  const Constants<T> constants;
  const int64_t halo;  // rows above a tile that it needs of earlier tiles
  const int64_t rows;  // of a tile
  const int64_t out_height, out_width;
  const int64_t x_pixel, x_channel;

 public:
  ChannelWise(const Problem& problem, const InferArgs& args)
      : p(problem), a(args), blocks(p), constants(p, a.packed), halo(max_of<int64_t>(P, p.depthwise_kernel / 2 * 2)),
        rows(tile()), out_height((p.height - 1) / p.depthwise_stride + 1),
        out_width((p.width - 1) / p.depthwise_stride + 1), x_pixel(p.channels_last ? a.x.step : 1),
        x_channel(p.channels_last ? 1 : a.x.step) {}

  void run(const Threads& threads) const {
    const int64_t pairs = p.batch * blocks.count;
    const int64_t cuts = pairs >= threads.count ? 1 : min_of(out_height, ceil_div(threads.count, pairs));
    const int64_t line = p.width * blocks.most(), z_size = (rows + halo) * line;
    const int64_t y_size = (rows + halo + P) * line;
    const int64_t wide_size = gathers() || sizeof(T) != sizeof(A) ? kPixels * p.depth() : 0;
    const int64_t z_count = direct() || !p.multiplier ? 0 : p.depthwise_kernel ? p.multiplier : 1;
    const int64_t each = y_size + z_count * z_size + wide_size;
    const Scratch<A> memory(threads.count * each);
    parallel(threads, pairs * cuts, [&](int64_t begin, int64_t end, int thread) {
      A *y = memory.get() + thread * each, *wide = y + y_size, *z = wide + wide_size;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pair = task / cuts, cut = task % cuts;
        segment(pair / blocks.count, blocks[pair % blocks.count], cut * out_height / cuts,
                (cut + 1) * out_height / cuts, y, z, wide);
      }
    });
  }

 private:
  int64_t tile() const {
    constexpr int64_t kBytes = 64 * 1024;
    const int64_t least = p.depthwise_kernel ? 8 : P == 0 ? 1 : 4 * P;
    const int64_t fit = kBytes / (p.width * blocks.most() * int64_t(sizeof(A)));
    return fit + 2 * P >= p.height ? p.height : min_of(p.height, max_of(fit, least));
  }

  // A block of channels in rows [out_begin, out_end) of the result of image n. y holds the primary maps of a tile and
  // its halo, dense, in the compute type; what the next tile needs of them moves to the front. The same of z, which
  // holds cheap maps, where a depthwise convolution follows.
  void segment(int64_t n, Block b, int64_t out_begin, int64_t out_end, A* y, A* z, A* wide) const {
    const int64_t line = p.width * b.width, z_size = (rows + halo) * p.width * blocks.most(),
                  reach2 = p.depthwise_kernel / 2, stride = p.depthwise_stride;
    const int64_t begin = max_of<int64_t>(0, out_begin * stride - reach2);
    const int64_t end = min_of(p.height, (out_end - 1) * stride + reach2 + 1);
    int64_t done = max_of<int64_t>(0, begin - P), out_row = out_begin;
    for (int64_t r = begin; r < end; r += rows) {
      const int64_t stop = min_of(end, r + rows), first = r - halo, reach = min_of(p.height, stop + P);
      if (done < reach) primary(n, b, done, reach, y + (done - first) * line, wide);
      done = max_of(done, reach);
      cheap(n, b, r, stop, y - first * line, z - first * line);
      if (p.depthwise_kernel) {
        const int64_t ready = stop == end ? out_end : min_of(out_end, (stop - 1 - reach2 + stride) / stride);
        if (out_row < ready) depthwise(n, b, out_row, ready, y - first * line, z - first * line);
        out_row = max_of(out_row, ready);
      }
      if (stop == end) break;
      const int64_t next = stop - halo;
      if (next < done) memmove(y, y + (next - first) * line, (done - next) * line * sizeof(A));
      for (int64_t s = 0; p.depthwise_kernel && s < p.multiplier; ++s) {
        A* const map = z + s * z_size;
        memmove(map, map + (next - first) * line, halo * line * sizeof(A));
      }
    }
  }

  // The primary maps that another convolution made.
  void normalised(const T* x, Block b, int64_t pixels, A* y) const {
    const int64_t channels = min_of(b.width, p.primary - b.m);
    if (!p.channels_last) transpose(x, x_channel, channels, pixels, y, b.width);
    auto scale = [&](int64_t i, Mask) { return load(constants.scale(b.m) + i); };
    auto shift = [&](int64_t i, Mask) { return load(constants.shift(b.m) + i); };
    for (int64_t i = 0; i < pixels; ++i) {
      A* to = y + i * b.width;
      if (p.channels_last)
        normalise<A>(x + i * x_pixel, to, channels, p.activation, scale, shift);
      else
        normalise<A>(to, to, channels, p.activation, scale, shift);
    }
  }

  // Of a block's channels, for pixels of x.
  template <class X, class Weight>
  Gemm<X, Weight, A> product(const X* x, const Weight* weight, Block b, int64_t pixels, A* y) const {
    return {.a = x,
            .a_row = x_pixel,
            .a_k = x_channel,
            .b = weight,
            .b_k = b.width,
            .c = y,
            .c_row = b.width,
            .rows = pixels,
            .cols = b.width,
            .depth = p.depth(),
            .finish = Finish::by_column,
            .scale = constants.scale(b.m),
            .shift = constants.shift(b.m),
            .activation = p.activation};
  }

  // Whether the product's rows are patches of x rather than its pixels.
  bool gathers() const { return p.has_primary && (p.primary_kernel > 1 || p.stride > 1); }

  void primary(int64_t n, Block b, int64_t row, int64_t stop, A* y, A* wide) const {
    const T* image = static_cast<const T*>(a.x.data) + n * a.x.batch;
    const int64_t pixel = row * p.width, pixels = stop * p.width - pixel;
    if (!p.has_primary) return normalised(image + pixel * x_pixel + b.m * x_channel, b, pixels, y);
#if defined(FIF_BF16_DOT)
    if constexpr (sizeof(T) == 2)
      if (paired(p)) {
        const bf16* x = reinterpret_cast<const bf16*>(image);
        auto g = product(x + pixel * x_pixel, reinterpret_cast<const bf16_pair*>(constants.primary(b.m)), b, pixels, y);
        return gathers() ? gathered(g, x, pixel, pixels, reinterpret_cast<bf16*>(wide)) : gemm(g);
      }
#endif
    Gemm<A, A, A> g = product<A, A>(nullptr, constants.primary(b.m), b, pixels, y);
    if constexpr (sizeof(T) == sizeof(A)) {
      g.a = image + pixel * x_pixel;
      return gathers() ? gathered(g, image, pixel, pixels, wide) : gemm(g);
    } else {
      gathered(g, image, pixel, pixels, wide);  // the broadcast operand must be in the compute type
    }
  }

  // The product over patches around pixels [pixel, pixel + count) of the maps, some at a time through a buffer.
  template <class G, class In, class X>
  void gathered(G g, const In* image, int64_t pixel, int64_t count, X* buffer) const {
    g.a = buffer;
    g.a_row = p.channels_last ? p.depth() : 1;
    g.a_k = p.channels_last ? 1 : kPixels;
    for (int64_t i = 0; i < count; i += kPixels) {
      g.rows = min_of(kPixels, count - i);
      if (!gathers() && p.channels_last)
        for (int64_t q = 0; q < g.rows; ++q)
          copy_run(image + (pixel + i + q) * x_pixel, buffer + q * p.in_channels, p.in_channels);
      else if (!gathers())
        for (int64_t c = 0; c < p.in_channels; ++c)
          copy_run(image + c * x_channel + pixel + i, buffer + c * kPixels, g.rows);
      else if (p.channels_last)
        patches(image, pixel + i, g.rows, buffer);
      else
        planar_patches(image, pixel + i, g.rows, buffer);
      gemm(g);
      g.c += kPixels * g.c_row;
    }
  }

  // [count, depth]: a window's row is a run of memory, cut off at the edges of the map.
  template <class In, class X>
  void patches(const In* image, int64_t pixel, int64_t count, X* to) const {
    const int64_t kernel = p.primary_kernel, reach = kernel / 2, line = kernel * p.in_channels;
    int64_t r = pixel / p.width, c = pixel % p.width;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t column = c * p.stride - reach;
      const int64_t from = max_of<int64_t>(0, -column), stop = min_of(kernel, p.in_width - column);
      for (int64_t dy = 0; dy < kernel; ++dy, to += line) {
        const int64_t row = r * p.stride - reach + dy;
        const bool inside = row >= 0 && row < p.in_height;
        if (!inside || from > 0 || stop < kernel) memset(to, 0, line * sizeof(X));
        if (!inside) continue;
        const In* in = image + (row * p.in_width + column) * x_pixel;
        if (x_pixel == p.in_channels)
          copy_run(in + from * x_pixel, to + from * p.in_channels, (stop - from) * p.in_channels);
        else
          for (int64_t dx = from; dx < stop; ++dx) copy_run(in + dx * x_pixel, to + dx * p.in_channels, p.in_channels);
      }
      if (++c == p.width) {
        c = 0;
        ++r;
      }
    }
  }

  // [depth, kPixels]: pixels of one row of the map come from one row of a plane.
  template <class In, class X>
  void planar_patches(const In* image, int64_t pixel, int64_t count, X* to) const {
    const int64_t reach = p.primary_kernel / 2;
    for (int64_t q = 0; q < count;) {
      const int64_t r = (pixel + q) / p.width, c = (pixel + q) % p.width;
      const int64_t run = min_of(count - q, p.width - c);
      X* line = to + q;
      for (int64_t dy = 0; dy < p.primary_kernel; ++dy)
        for (int64_t dx = 0; dx < p.primary_kernel; ++dx) {
          const int64_t row = r * p.stride - reach + dy, column = c * p.stride - reach + dx;
          const bool inside = row >= 0 && row < p.in_height;
          // Pixels [from, stop) of the run have their column inside the map.
          const int64_t from = inside ? min_of(run, ceil_div(max_of<int64_t>(0, -column), p.stride)) : run;
          const int64_t stop = max_of(from, min_of(run, (p.in_width - 1 - column + p.stride) / p.stride));
          const In* in = image + row * p.in_width + column;
          for (int64_t k = 0; k < p.in_channels; ++k, in += x_channel, line += kPixels) {
            if (from > 0) memset(line, 0, from * sizeof(X));
            if (stop < run) memset(line + stop, 0, (run - stop) * sizeof(X));
            if (p.stride == 1)
              copy_run(in + from, line + from, stop - from);
            else
              for (int64_t i = from; i < stop; ++i) copy_run(in + i * p.stride, line + i, 1);
          }
        }
      q += run;
    }
  }

  // Whether cheap maps go from registers to their place; else they make a stop in z, so that one kernel serves all.
  bool direct() const { return p.channels_last && p.multiplier == 1 && is_clamp(p.activation) && !p.depthwise_kernel; }

  // y and z point to where row 0 of the map would be.
  void cheap(int64_t n, Block b, int64_t r, int64_t stop, const A* y, A* z) const {
    const int64_t m0 = b.m, step = b.width, channels = min_of(step, p.primary - m0);
    const int64_t first = r * p.width, count = stop * p.width - first;
    if (p.splice && !direct() && !p.depthwise_kernel) place(y + first * step, step, count, channels, n, m0, 1, first);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const int64_t channel = p.kept_primary() + m0 * p.multiplier + s;
      const int64_t kept = min_of(channels, ceil_div(max_of<int64_t>(0, p.out_channels - channel), p.multiplier));
      if (direct()) {
        for (int64_t m = 0; m < channels; m += L) {
          auto first_of = [&](int64_t count) { return first_lanes(max_of<int64_t>(0, min_of<int64_t>(L, count - m))); };
          if (a.add.data)
            cheap_direct<true>(y + m, step, m0 + m, r, stop, first_of(channels), first_of(kept), n);
          else
            cheap_direct<false>(y + m, step, m0 + m, r, stop, first_of(channels), first_of(kept), n);
        }
        continue;
      }
      A* const map = z + (p.depthwise_kernel ? s * (rows + halo) * p.width * blocks.most() : 0);
      for (int64_t m = 0; m < kept; m += L)
        cheap_vector(
            y + m, step, m0 + m, s, r, stop,
            [=, to = map + m](int64_t pixel, Vec<A> v) { store(to + pixel * step, v); }, [](int64_t, Vec<A>) {});
      if (p.activation != Activation::none && kept > 0)
        with_activation<A>(p.activation, [&](auto act) {
          for (int64_t i = first; i < first + count; ++i)
            for (int64_t m = 0; m < kept; m += L) store(map + i * step + m, act.value(load(map + i * step + m)));
        });
      if (!p.depthwise_kernel && kept > 0)
        place(map + first * step, step, count, kept, n, channel, p.multiplier, first);
    }
  }

  // Maps of pixels [first, first + count), `step` apart, to channels channel, channel + stride, ... of the output.
  void place(const A* maps, int64_t step, int64_t count, int64_t channels, int64_t n, int64_t channel, int64_t stride,
             int64_t first) const {
    T* const image = static_cast<T*>(a.out.data) + n * a.out.batch;
    if (!p.channels_last)
      return transpose_out(maps, step, count, channels, image + channel * a.out.step + first, a.out.step * stride);
    T* to = image + first * a.out.step + channel;
    const T* add = static_cast<const T*>(a.add.data);
    if (add) add += n * a.add.batch + first * a.add.step + channel;
    for (int64_t i = 0; i < count; ++i, maps += step, to += a.out.step) {
      for (int64_t m = 0; m < channels; m += L) {
        const Mask lanes = first_lanes(min_of<int64_t>(L, channels - m));
        Vec<A> v = load(maps + m);
        if (add) v += stride == 1 ? load(add + m, lanes) : load_strided(add + m * stride, stride, lanes);
        if (stride == 1)
          store(to + m, v, lanes);
        else
          store_strided(to + m * stride, stride, v, lanes);
      }
      if (add) add += a.add.step;
    }
  }

  // Lambdas hold copies: what a store might change would be read again after each.
  template <bool Adds>
  void cheap_direct(const A* y, int64_t y_step, int64_t m, int64_t r, int64_t stop, Mask lanes, Mask kept,
                    int64_t n) const {
    const int64_t step = a.out.step, add_step = a.add.step;
    const Clamp<A> clamp(p.activation);
    T* const image = static_cast<T*>(a.out.data) + n * a.out.batch + m;
    const T* const add = Adds ? static_cast<const T*>(a.add.data) + n * a.add.batch + m : nullptr;
    auto emit = [=, to = image + p.kept_primary(), add = add + p.kept_primary()](int64_t pixel, Vec<A> v) {
      __builtin_prefetch(to + (pixel + 32) * step, 1);
      v = clamp(v);
      if constexpr (Adds) v += load(add + pixel * add_step, kept);
      store(to + pixel * step, v, kept);
    };
    if (p.splice)
      cheap_vector(y, y_step, m, 0, r, stop, emit, [=](int64_t pixel, Vec<A> v) {
        if constexpr (Adds) v += load(add + pixel * add_step, lanes);
        store(image + pixel * step, v, lanes);
      });
    else if (kept)
      cheap_vector(y, y_step, m, 0, r, stop, emit, [](int64_t, Vec<A>) {});
  }

  template <class Emit, class Tee>
  void cheap_vector(const A* y, int64_t step, int64_t m, int64_t s, int64_t r, int64_t stop, Emit emit, Tee tee) const {
    const A* packed = constants.cheap(m, s);
    Vec<A> taps[K * K];
    FIF_UNROLL for (int t = 0; t < K * K; ++t) taps[t] = load(packed + t * L);
    depthwise_channels<K, A>(y, step, p.height, p.width, r, stop, taps, load(packed + K * K * L), tee, emit);
  }

  // Rows [from, to) of the depthwise convolution that follows, of the primary maps and of the cheap ones.
  void depthwise(int64_t n, Block b, int64_t from, int64_t to, const A* y, const A* z) const {
    const int64_t m0 = b.m, channels = min_of(b.width, p.primary - m0), step = a.out.step;
    for (int64_t part = p.splice ? 0 : 1; part <= p.multiplier; ++part) {
      const A* maps = part ? z + (part - 1) * (rows + halo) * p.width * blocks.most() : y;
      const int64_t apart = part ? p.multiplier : 1;
      for (int64_t m = 0; m < channels; m += L) {
        const int64_t channel = part ? p.kept_primary() + (m0 + m) * apart + part - 1 : m0 + m;
        const int64_t kept = min_of(channels - m, ceil_div(max_of<int64_t>(0, p.out_channels - channel), apart));
        if (kept <= 0) break;
        T* const image = static_cast<T*>(a.out.data) + n * a.out.batch + channel;
        auto emit = [=, lanes = first_lanes(kept)](int64_t pixel, Vec<A> v) {
          if (apart == 1)
            store(image + pixel * step, v, lanes);
          else
            store_strided(image + pixel * step, apart, v, lanes);
        };
        with_kernel_size(p.depthwise_kernel, [&](auto k) {
          depthwise_strided<decltype(k)::value, A>(maps + m, b.width, p.height, p.width, p.depthwise_stride, from, to,
                                                   out_width, constants.depthwise(m0 + m, part), emit);
        });
      }
    }
  }
};

}  // namespace

int64_t packed_bytes(const Problem& p) {
  int64_t bytes = 0;
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    bytes = Constants<T>(p, nullptr).bytes();
  });
  return bytes;
}

void pack(const Problem& p, const InferArgs& a, void* to) {
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    Constants<T>(p, to).pack(a);
  });
}

void infer_channels(const Problem& p, const InferArgs& a, const Threads& threads) {
  with_format(p.dtype, [&](auto format) {
    with_kernel_size(
        p.kernel, [&](auto k) { ChannelWise<typename decltype(format)::type, decltype(k)::value>(p, a).run(threads); });
  });
}

// Means over the pixels of channels_last maps: [B, C].
void pool(const Problem& p, const InferArgs& a, const Threads& threads) {
  with_format(p.dtype, [&](auto format) {
    using T = typename decltype(format)::type;
    using A = Compute<T>;
    constexpr int L = kLanes<A>;
    const int64_t vectors = ceil_div(p.in_channels, L);
    parallel(threads, p.batch * vectors, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / vectors, c = task % vectors * L;
        const Mask lanes = first_lanes(min_of<int64_t>(L, p.in_channels - c));
        const T* x = static_cast<const T*>(a.x.data) + n * a.x.batch + c;
        Vec<A> sum{};
        for (int64_t i = 0; i < p.in_pixels(); ++i) sum += load(x + i * a.x.step, lanes);
        store(static_cast<T*>(a.out.data) + n * a.out.batch + c, sum / A(p.in_pixels()), lanes);
      }
    });
  });
}

}  // namespace fif::FIF_ISA
