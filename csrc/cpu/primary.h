// The primary maps with lanes along channels: a product over pixels of x, in dense rows of the compute type. Where the
// convolution is k x k, over windows of some rows of x, copied with zeros around: the depth of the product then has k
// segments. Products of f32 numbers in parts copy planes of NCHW like that even where it is 1x1. Products of 16-bit
// numbers take whole patches instead, at the price of k * k copies of a pixel. Limit: the multiply-add units, or tiles.
#pragma once

#include <type_traits>

#include "packed.h"

namespace fif::FIF_ISA {

// The same of bf16 numbers that stay what they are.
FIF_INLINE void copy_run(const bf16* in, bf16* out, int64_t count) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= count; i += L) *(HalfU::unaligned*)(out + i) = *(const HalfU::unaligned*)(in + i);
  if (i == count) return;
  const Mask lanes = first_lanes(count - i);
  store_bits(&out[i].bits, load_bits(&in[i].bits, lanes), lanes);
}

// What one thread works with.
template <class A>
struct Workspace {
  A* wide;  // a buffer as large as `Primary` says
  TileRegisters tiles{};
};

// The primary maps, dense and in the compute type: rows of them, a block of channels at a time.
template <class T>
class Primary {
  using A = Compute<T>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kPixels = 4 * kTileRows;  // that are gathered or widened at a time
  const Problem& p;
  const InferArgs& a;
  const Constants<T>& constants;
  const TileChunks chunks;
  const bool halves_;
  const int64_t x_pixel, x_channel;

 public:
  // `halves`: whether the upper half of a vector, where no channel is left for it, may stay unwritten.
  Primary(const Problem& problem, const InferArgs& args, const Constants<T>& packed, bool halves)
      : p(problem), a(args), constants(packed), chunks(p.depth()), halves_(halves),
        x_pixel(p.channels_last ? a.x.step : 1), x_channel(p.channels_last ? 1 : a.x.step) {}

  // Numbers that `rows` needs for a buffer.
  int64_t buffer() const {
    const int64_t parts = in_parts(p) ? part_chunks(p).buffer() / 2 : 0;
    if (banded()) return band_rows(band()) * line() + parts;
    if (parts) return parts;
    return gathers() || sizeof(T) != sizeof(A) ? kPixels * pitch() : 0;
  }

  // Whether the product goes straight to its place in the output: nothing follows it.
  bool straight() const {
    return p.multiplier == 0 && sizeof(T) == sizeof(A) && p.has_primary && p.channels_last && !p.depthwise_kernel &&
        !a.add.data;
  }

  // Rows [row, stop) of image n, pixels `b.width` apart, or in their place in the output where they go straight there.
  __attribute__((noinline)) void rows(int64_t n, ChannelBlock b, int64_t row, int64_t stop, A* y,
                                      Workspace<A>& w) const {
    const T* image = static_cast<const T*>(a.x.data) + n * a.x.batch;
    const int64_t pixel = row * p.width, pixels = stop * p.width - pixel;
    if (!p.has_primary) return normalised(image + pixel * x_pixel + b.m * x_channel, b, pixels, y);
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<T, bf16>)
      if (tiled(p)) {
        TileProduct g{.to = result(b, pixels, y),
                      .a = image + pixel * x_pixel,
                      .a_row = x_pixel,
                      .b = reinterpret_cast<const bf16*>(constants.primary(b.m)),
                      .chunks = chunks.count,
                      .chunk = chunks.size};
        auto run = [&](const TileProduct& part) { gemm(part, w.tiles); };
        return gathers() ? gathered(g, image, pixel, pixels, reinterpret_cast<bf16*>(w.wide), run) : run(g);
      }
    if constexpr (std::is_same_v<T, float>)
      if (in_parts(p)) {
        PartsProduct g{.to = result(b, pixels, y),
                       .a = image + row * p.stride * p.in_width * x_pixel,
                       .a_row = p.stride * x_pixel,
                       .a_segment = 0,
                       .line = p.width,
                       .a_line = p.stride * p.in_width * x_pixel,
                       .b = reinterpret_cast<const bf16*>(constants.primary(b.m)),
                       .chunks = part_chunks(p),
                       .buffer = reinterpret_cast<bf16*>(w.wide)};
        if (!banded()) return gemm(g, w.tiles);
        float* const copy = w.wide + g.chunks.buffer() / 2;
        g.a = copy;
        g.a_row = p.stride * p.in_channels;
        g.a_segment = line();
        g.a_line = p.stride * line();
        for (int64_t count; row < stop; row += count) {
          count = min_of(band(), stop - row);
          copy_band(image, row * p.stride - p.primary_kernel / 2, band_rows(count), copy);
          g.to.rows = count * p.width;
          gemm(g, w.tiles);
          g.to.c += g.to.rows * g.to.c_row;
        }
        return;
      }
#endif
    auto run = [](const auto& product) { gemm(product); };
#if defined(FIF_BF16_DOT)
    if constexpr (sizeof(T) == 2)
      if (paired(p)) {
        const bf16* x = reinterpret_cast<const bf16*>(image);
        auto g = product(x + pixel * x_pixel, reinterpret_cast<const bf16_pair*>(constants.primary(b.m)), b, pixels, y);
        return gathers() ? gathered(g, x, pixel, pixels, reinterpret_cast<bf16*>(w.wide), run) : run(g);
      }
#endif
    Gemm<A, A, A> g = product<A, A>(nullptr, constants.primary(b.m), b, pixels, y);
    if (windows()) return by_rows(g, image, row, stop, w.wide);
    if constexpr (sizeof(T) == sizeof(A)) {
      g.a = image + pixel * x_pixel;
      run(g);
    } else {
      gathered(g, image, pixel, pixels, w.wide, run);  // the broadcast operand must be in the compute type
    }
  }

 private:
  // Whether the product's rows are patches of x rather than its pixels.
  bool windows() const { return p.has_primary && (p.primary_kernel > 1 || p.stride > 1); }
  // Whether the product takes 16-bit numbers.
  bool narrow() const { return tiled(p) || paired(p); }
  // Whether its rows pass through a buffer although they have x's dtype.
  bool gathers() const { return narrow() && (windows() || (p.has_primary && tiled(p) && chunks.copies)); }
  // Whether some rows of x are copied, with zeros around.
  bool banded() const {
    if (in_parts(p)) return p.primary_kernel > 1 || !p.channels_last;
    return windows() && !narrow() && (p.primary_kernel > 1 || sizeof(T) != sizeof(A));
  }
  int64_t line() const { return (p.in_width + p.primary_kernel - 1) * p.in_channels; }
  // Rows of x that so many rows of the maps are made from, and rows of the maps that are made from one band.
  int64_t band_rows(int64_t rows) const { return (rows - 1) * p.stride + p.primary_kernel; }
  int64_t band() const {
    constexpr int64_t kBytes = 128 * 1024;
    const int64_t fit = kBytes / (line() * int64_t(sizeof(A)));
    return p.stride > p.primary_kernel ? 1
                                       : max_of<int64_t>(1, min_of(p.height, (fit - p.primary_kernel) / p.stride + 1));
  }
  // Numbers of a row in the buffer, zeros behind its last one.
  int64_t pitch() const { return tiled(p) ? chunks.width() : p.depth(); }

  // The primary maps that another convolution made.
  void normalised(const T* x, ChannelBlock b, int64_t pixels, A* y) const {
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

#if defined(__AMX_BF16__)
  // Of a product by tiles.
  TileResult result(ChannelBlock b, int64_t pixels, float* y) const {
    return {.c = y,
            .c_row = straight() ? a.out.step : b.width,
            .rows = pixels,
            .cols = straight() ? min_of(b.width, p.primary - b.m) : b.width,
            .scale = constants.scale(b.m),
            .shift = constants.shift(b.m),
            .activation = p.activation};
  }
#endif

  // Of a block's channels, for pixels of x.
  template <class X, class Weight>
  Gemm<X, Weight, A> product(const X* x, const Weight* weight, ChannelBlock b, int64_t pixels, A* y) const {
    return {.a = x,
            .a_row = x_pixel,
            .a_k = x_channel,
            .b = weight,
            .b_k = b.width,
            .c = y,
            .c_row = straight() ? a.out.step : b.width,
            .rows = pixels,
            .cols = straight() ? min_of(b.width, p.primary - b.m) : b.width,
            .depth = p.depth(),
            .finish = Finish::by_column,
            .scale = constants.scale(b.m),
            .shift = constants.shift(b.m),
            .activation = p.activation,
            .half = halves_ && half_wanted<A>(p.primary - b.m - (b.width - L))};
  }

  // The product over windows, a row of the maps at a time.
  void by_rows(Gemm<A, A, A> g, const T* image, int64_t row, int64_t stop, A* buffer) const {
    g.rows = p.width;
    g.a_row = p.stride * x_pixel;
    if (banded()) {
      g.a_row = p.stride * p.in_channels;
      g.a_k = 1;
      g.segments = p.primary_kernel;
      g.a_segment = line();
      g.depth = p.primary_kernel * p.in_channels;
    }
    const int64_t most = banded() ? band() : stop - row;
    for (int64_t count; row < stop; row += count) {
      count = min_of(most, stop - row);
      if (banded()) copy_band(image, row * p.stride - p.primary_kernel / 2, band_rows(count), buffer);
      for (int64_t i = 0; i < count; ++i, g.c += p.width * g.c_row) {
        if (banded())
          g.a = buffer + i * p.stride * line();
        else if constexpr (sizeof(T) == sizeof(A))
          g.a = image + (row + i) * p.stride * p.in_width * x_pixel;
        gemm(g);
      }
    }
  }

  // Rows [row, row + count) of x in channels_last and in the compute type, zeros around.
  void copy_band(const T* image, int64_t row, int64_t count, A* to) const {
    const int64_t channels = p.in_channels, edge = p.primary_kernel / 2 * channels;
    if (!p.channels_last && p.primary_kernel == 1)  // all at once, so that vectors along a short row are not half empty
      return transpose(image + row * p.in_width, x_channel, channels, count * p.in_width, to, channels);
    for (const int64_t end = row + count; row < end; ++row, to += line()) {
      if (row < 0 || row >= p.in_height) {
        memset(to, 0, line() * sizeof(A));
        continue;
      }
      const T* in = image + row * p.in_width * x_pixel;
      memset(to, 0, edge * sizeof(A));
      memset(to + line() - edge, 0, edge * sizeof(A));
      if (!p.channels_last)
        transpose(in, x_channel, channels, p.in_width, to + edge, channels);
      else if (x_pixel == channels)
        copy_run(in, to + edge, p.in_width * channels);
      else
        widen_lines(in, x_pixel, p.in_width, channels, to + edge, channels);
    }
  }

  // The product over patches around pixels [pixel, pixel + count) of the maps, some at a time through a buffer.
  template <class G, class In, class X, class Run>
  void gathered(G g, const In* image, int64_t pixel, int64_t count, X* buffer, Run run) const {
    g.a = buffer;
    g.a_row = p.channels_last ? pitch() : 1;
    auto& to = [&]() -> auto& {
      if constexpr (requires { g.to; })
        return g.to;
      else
        return g;
    }();
    if constexpr (requires { g.a_k; }) g.a_k = p.channels_last ? 1 : kPixels;
    if (pitch() > p.depth())
      for (int64_t q = 0; q < min_of(kPixels, count); ++q)
        memset(buffer + q * pitch() + p.depth(), 0, (pitch() - p.depth()) * sizeof(X));
    for (int64_t i = 0; i < count; i += kPixels) {
      to.rows = min_of(kPixels, count - i);
      if (!windows() && p.channels_last)
        for (int64_t q = 0; q < to.rows; ++q)
          copy_run(image + (pixel + i + q) * x_pixel, buffer + q * pitch(), p.in_channels);
      else if (!windows())
        for (int64_t c = 0; c < p.in_channels; ++c)
          copy_run(image + c * x_channel + pixel + i, buffer + c * kPixels, to.rows);
      else
        patches(image, pixel + i, to.rows, buffer);
      run(g);
      to.c += kPixels * to.c_row;
    }
  }

  // [count, pitch]: a window's row is a run of memory, cut off at the edges of the map.
  template <class In, class X>
  void patches(const In* image, int64_t pixel, int64_t count, X* to) const {
    const int64_t kernel = p.primary_kernel, reach = kernel / 2, line = kernel * p.in_channels;
    // Columns [whole, cut) have whole windows.
    const int64_t whole = ceil_div(reach, p.stride);
    const int64_t cut = x_pixel == p.in_channels ? (p.in_width - kernel + reach + p.stride) / p.stride : 0;
    for (int64_t run; count > 0; count -= run, pixel += run, to += run * pitch()) {
      const int64_t r = pixel / p.width, c = pixel % p.width;
      run = min_of(count, p.width - c);
      for (int64_t dy = 0; dy < kernel; ++dy) {
        const int64_t row = r * p.stride - reach + dy;
        const bool inside = row >= 0 && row < p.in_height;
        const In* in = image + (row * p.in_width + c * p.stride - reach) * x_pixel;
        X* out = to + dy * line;
        for (int64_t i = c; i < c + run; ++i, in += p.stride * x_pixel, out += pitch()) {
          if (inside && i >= whole && i < cut) {
            // Of whole windows, a loop of their own: all but the addresses stays as it is.
            const int64_t end = min_of(c + run, cut);
            copy_run(in, out, line);
            for (; i + 1 < end; ++i) copy_run(in += p.stride * x_pixel, out += pitch(), line);
            continue;
          }
          memset(out, 0, line * sizeof(X));
          for (int64_t dx = 0; inside && dx < kernel; ++dx) {
            const int64_t column = i * p.stride - reach + dx;
            if (column >= 0 && column < p.in_width)
              copy_run(in + dx * x_pixel, out + dx * p.in_channels, p.in_channels);
          }
        }
      }
    }
  }
};

}  // namespace fif::FIF_ISA
