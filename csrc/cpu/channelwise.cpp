// Inference with lanes along channels: channels_last maps, planes of few pixels (where rows would waste lanes), and
// every stage of a frozen network. See infer.cpp for the unit and its other form.
//
// A task takes one image and one block of channels and walks down the map in tiles of rows. The primary maps of a tile
// and its halo lie dense, in the compute type, in scratch that stays in cache; the cheap maps go from registers to
// their place in the output. A primary convolution that is not 1x1 is a product over patches, gathered some pixels at a
// time. Where a depthwise convolution follows, the cheap maps stay in scratch too, and only its result is written.
#include "primary.h"

namespace fif::FIF_ISA {
namespace {

// Rows [from, to) of the depthwise convolution behind a unit, for a vector of its maps; their places are `apart`.
template <class T, int K>
__attribute__((noinline)) void strided_vector(const Problem& p, const Compute<T>* maps, int64_t maps_step, int64_t from,
                                              int64_t to, int64_t width, const Compute<T>* taps, T* out, int64_t step,
                                              int64_t apart, Mask lanes) {
  using A = Compute<T>;
  depthwise_strided<K, A>(maps, maps_step, p.height, p.width, p.depthwise_stride, from, to, width, taps,
                          [=](int64_t pixel) {
                            return Along(out + pixel * step, step, [=](T* at, Vec<A> v, auto, LaneMask&) {
                              if (apart == 1)
                                store(at, v, lanes);
                              else
                                store_strided(at, apart, v, lanes);
                            });
                          });
}

template <class T, int K>
class ChannelWise {
  using A = Compute<T>;
  static constexpr int L = kLanes<A>, P = K / 2;
  static constexpr bool kEveryForm = K == 3;  // for other sizes, forms that save a little are not worth their code
  const Problem& p;
  const InferArgs& a;
  const Blocks<A> blocks;
  const Constants<T> constants;
  const Primary<T> primary;
  const int64_t halo;  // rows above a tile that it needs of earlier tiles
  const int64_t rows;  // of a tile
  const int64_t out_height, out_width;

 public:
  ChannelWise(const Problem& problem, const InferArgs& args, int64_t threads)
      : p(problem), a(args), blocks(p, threads), constants(p, a.packed),
        primary(p, a, constants, direct() && sizeof(T) == sizeof(A)),
        halo(max_of<int64_t>(P, p.depthwise_kernel / 2 * 2)), rows(tile()),
        out_height((p.height - 1) / p.depthwise_stride + 1), out_width((p.width - 1) / p.depthwise_stride + 1) {}

  void run(const Threads& threads) const {
    // Several blocks together where threads would meet in lines of the output, which costs more than rows computed
    // twice.
    const int64_t together =
        p.batch < threads.count && out_height >= 6 * threads.count && !whole_lines() ? blocks.count : 1;
    const int64_t groups = blocks.count / together, pairs = p.batch * groups;
    const int64_t cuts = pairs >= threads.count ? 1 : min_of(out_height, ceil_div(threads.count, pairs));
    const int64_t y_size = (rows + halo + P) * p.width * blocks.most();
    const int64_t each = y_size + z_count() * z_size() + primary.buffer();
    const Scratch<A> memory(threads.count * each);
    parallel(threads, pairs * cuts, [&](int64_t begin, int64_t end, int thread) {
      A *y = memory.get() + thread * each, *z = y + y_size + primary.buffer();
      Workspace<A> work{.wide = y + y_size};
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pair = task / cuts, cut = task % cuts, from = cut * out_height / cuts;
        for (int64_t b = pair % groups * together, i = 0; i < together; ++i)
          segment(pair / groups, blocks[b + i], from, (cut + 1) * out_height / cuts, y, z, work);
      }
    });
  }

 private:
  // Whether no cache line of the output holds channels of two blocks.
  bool whole_lines() const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (!p.channels_last) return true;
    if (a.out.step % kLine != 0 || p.kept_primary() % kLine != 0) return false;
    for (int64_t i = 0; i < blocks.count; ++i)
      if (blocks[i].m % kLine != 0) return false;
    return true;
  }

  // Of the cheap maps of a tile and of what it needs of earlier ones, one for each primary map; and how many of those.
  int64_t z_count() const { return direct() || !p.multiplier ? 0 : p.depthwise_kernel || mixes() ? p.multiplier : 1; }
  int64_t z_size() const { return (rows + halo) * p.width * blocks.most(); }

  int64_t tile() const {
    constexpr int64_t kBytes = 64 * 1024;
    const int64_t least = p.depthwise_kernel ? 8 : P == 0 ? 1 : 4 * P;
    const int64_t fit = kBytes / (p.width * blocks.most() * int64_t(sizeof(A)));
    return fit + 2 * P >= p.height ? p.height : min_of(p.height, max_of(fit, least));
  }

  // A block of channels in rows [out_begin, out_end) of the result of image n. y holds the primary maps of a tile and
  // its halo, dense, in the compute type; what the next tile needs of them moves to the front. The same of z, which
  // holds cheap maps, where a depthwise convolution follows.
  void segment(int64_t n, ChannelBlock b, int64_t out_begin, int64_t out_end, A* y, A* z, Workspace<A>& work) const {
    const int64_t line = p.width * b.width, reach2 = p.depthwise_kernel / 2, stride = p.depthwise_stride;
    if constexpr (sizeof(T) == sizeof(A))
      if (primary.straight())
        return primary.rows(n, b, out_begin, out_end,
                            static_cast<T*>(a.out.data) + n * a.out.batch + out_begin * p.width * a.out.step + b.m,
                            work);
    const int64_t begin = max_of<int64_t>(0, out_begin * stride - reach2);
    const int64_t end = min_of(p.height, (out_end - 1) * stride + reach2 + 1);
    int64_t done = max_of<int64_t>(0, begin - P), out_row = out_begin;
    for (int64_t r = begin; r < end; r += rows) {
      const int64_t stop = min_of(end, r + rows), first = r - halo, reach = min_of(p.height, stop + P);
      if (done < reach) primary.rows(n, b, done, reach, y + (done - first) * line, work);
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
        A* const map = z + s * z_size();
        memmove(map, map + (next - first) * line, halo * line * sizeof(A));
      }
    }
  }

  // Whether cheap maps go from registers to their place; else they make a stop in z, so that one kernel serves all.
  bool direct() const {
    return p.channels_last && p.multiplier == 1 && is_clamp(p.activation) && !p.depthwise_kernel &&
        (kEveryForm || !a.add.data);
  }

  // Whether the cheap maps of one primary map, neighbours in the output, are stored together.
  bool mixes() const {
    return p.channels_last && !p.depthwise_kernel && p.multiplier > 1 && p.multiplier <= Interleaved<A>::kMost;
  }

  // y and z point to where row 0 of the map would be.
  void cheap(int64_t n, ChannelBlock b, int64_t r, int64_t stop, const A* y, A* z) const {
    const int64_t m0 = b.m, step = b.width, channels = min_of(step, p.primary - m0);
    const int64_t first = r * p.width, count = stop * p.width - first;
    if (p.splice && !direct() && !p.depthwise_kernel) place(y + first * step, step, count, channels, n, m0, 1, first);
    for (int64_t s = 0; s < p.multiplier; ++s) {
      const int64_t channel = p.kept_primary() + m0 * p.multiplier + s;
      const int64_t kept = min_of(channels, ceil_div(max_of<int64_t>(0, p.out_channels - channel), p.multiplier));
      if (direct()) {
        for (int64_t m = 0; m < channels; m += L) {
          auto first_of = [&](int64_t count) { return first_lanes(max_of<int64_t>(0, min_of<int64_t>(L, count - m))); };
          auto run = [&](auto half) {
            constexpr bool kHalf = decltype(half)::value;
            with_clamp<A, kEveryForm>(p.activation, [&](auto clamp) {
              if (kEveryForm && a.add.data)
                cheap_direct<kEveryForm, kHalf>(y + m, step, m0 + m, r, stop, first_of(channels), first_of(kept), n,
                                                clamp);
              else
                cheap_direct<false, kHalf>(y + m, step, m0 + m, r, stop, first_of(channels), first_of(kept), n, clamp);
            });
          };
          if constexpr (kHalves && sizeof(T) == 4 && kEveryForm)
            if (half_wanted<A>(channels - m)) {
              run(Constant<1>{});
              continue;
            }
          run(Constant<0>{});
        }
        continue;
      }
      A* const map = z + (z_count() > 1 ? s * z_size() : 0);
      with_clamp<A, kEveryForm>(p.activation, [&](auto clamp) {
        for (int64_t m = 0; m < kept; m += L)
          cheap_vector(
              y + m, step, m0 + m, s, r, stop,
              [=, to = map + m](int64_t pixel) {
                return Along(to + pixel * step, step, [=](A* at, Vec<A> v, auto, LaneMask&) { store(at, clamp(v)); });
              },
              [](int64_t) { return Nowhere{}; });
      });
      if (!is_clamp(p.activation) && kept > 0)
        for (int64_t i = first; i < first + count; ++i)
          for (int64_t m = 0; m < kept; m += L)
            store(map + i * step + m, smooth_value<A>(load(map + i * step + m), p.activation));
      if (!p.depthwise_kernel && !mixes() && kept > 0)
        place(map + first * step, step, count, kept, n, channel, p.multiplier, first);
    }
    if (mixes()) mix(z + first * step, step, count, channels, n, m0, first);
  }

  // Cheap maps from z to their place: those of primary maps m, m + 1, ... in pixels [first, first + count).
  void mix(const A* z, int64_t step, int64_t count, int64_t channels, int64_t n, int64_t m, int64_t first) const {
    const int64_t channel = p.kept_primary() + m * p.multiplier, z_step = z_size();
    const int64_t kept = min_of(channels * p.multiplier, p.out_channels - channel), most = L * p.multiplier;
    T* to = static_cast<T*>(a.out.data) + n * a.out.batch + first * a.out.step + channel;
    const T* add = static_cast<const T*>(a.add.data);
    if (add) add += n * a.add.batch + first * a.add.step + channel;
    const Interleaved<A> interleaved(static_cast<int>(p.multiplier));
    for (int64_t i = 0; i < count; ++i, z += step, to += a.out.step) {
      for (int64_t k = 0; k < kept; k += most)
        interleaved.each(z + k / p.multiplier, z_step, [&](int64_t at, Vec<A> v) {
          if (k + at >= kept) return;
          const Mask lanes = first_lanes(min_of<int64_t>(L, kept - k - at));
          if (add) v += load(add + k + at, lanes);
          store(to + k + at, v, lanes);
        });
      if (add) add += a.add.step;
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

  // The cheap maps of a vector of channels from registers to their place, and with a splice the primary ones as they
  // pass.
  template <bool Adds, bool Half, class Clamps>
  void cheap_direct(const A* y, int64_t y_step, int64_t m, int64_t r, int64_t stop, Mask lanes, Mask kept, int64_t n,
                    Clamps clamp) const {
    using V = Part<A, Half>;
    const int64_t step = a.out.step, add_step = a.add.step;
    T* const image = static_cast<T*>(a.out.data) + n * a.out.batch + m;
    const T* const add = Adds ? static_cast<const T*>(a.add.data) + n * a.add.batch + m : nullptr;
    // Lambdas hold copies: what a store might change would be read again after each.
    auto to_map = [=](int64_t channel, Mask mask, auto value) {
      return [=, to = image + channel, add = add + channel](int64_t pixel) {
        return Along(to + pixel * step, step,
                     [=, add = add + pixel * add_step](T* at, V v, auto exact, LaneMask& small) mutable {
                       __builtin_prefetch(at + 32 * step, 1);
                       v = value(v);
                       if constexpr (Adds && Half) v += lower_half(load(add, mask));
                       if constexpr (Adds && !Half) v += load(add, mask);
                       store_quickly(at, v, mask, exact, small);
                       if constexpr (Adds) add += add_step;
                     });
      };
    };
    auto emit = to_map(p.kept_primary(), kept, clamp);
    if (p.splice)
      cheap_vector<Half>(y, y_step, m, 0, r, stop, emit, to_map(0, lanes, [](V v) { return v; }));
    else if (kept)
      cheap_vector<Half>(y, y_step, m, 0, r, stop, emit, [](int64_t) { return Nowhere{}; });
  }

  template <bool Half = false, class Emit, class Tee>
  void cheap_vector(const A* y, int64_t step, int64_t m, int64_t s, int64_t r, int64_t stop, Emit emit, Tee tee) const {
    using V = PartOf<A, Half>;
    const A* packed = constants.cheap(m, s);
    typename V::type taps[K * K];
    FIF_UNROLL for (int t = 0; t < K * K; ++t) taps[t] = V::load(packed + t * L);
    depthwise_channels<K, A, Half, kEveryForm && kRoundsQuickly<T>>(y, step, p.height, p.width, r, stop, taps,
                                                                    V::load(packed + K * K * L), tee, emit);
  }

  // Rows [from, to) of the depthwise convolution that follows, of the primary maps and of the cheap ones.
  void depthwise(int64_t n, ChannelBlock b, int64_t from, int64_t to, const A* y, const A* z) const {
    const int64_t m0 = b.m, channels = min_of(b.width, p.primary - m0), step = a.out.step;
    for (int64_t part = p.splice ? 0 : 1; part <= p.multiplier; ++part) {
      const A* maps = part ? z + (part - 1) * z_size() : y;
      const int64_t apart = part ? p.multiplier : 1;
      for (int64_t m = 0; m < channels; m += L) {
        const int64_t channel = part ? p.kept_primary() + (m0 + m) * apart + part - 1 : m0 + m;
        const int64_t kept = min_of(channels - m, ceil_div(max_of<int64_t>(0, p.out_channels - channel), apart));
        if (kept <= 0) break;
        T* const image = static_cast<T*>(a.out.data) + n * a.out.batch + channel;
        with_kernel_size(p.depthwise_kernel, [&](auto k) {
          strided_vector<T, decltype(k)::value>(p, maps + m, b.width, from, to, out_width,
                                                constants.depthwise(m0 + m, part), image, step, apart,
                                                first_lanes(kept));
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
    with_kernel_size(p.kernel, [&](auto k) {
      ChannelWise<typename decltype(format)::type, decltype(k)::value>(p, a, threads.count).run(threads);
    });
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
