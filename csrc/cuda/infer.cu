// Inference in one launch: primary product, normalisation, activation, depthwise part, normalisation, activation, both
// halves into the output.
//
// A block computes 16, 32 or 64 primary maps and their cheap ones on one tile of pixels.
//   1. Product over the tile and its halo: chunks of 32 input channels come by cp.async into two stages of shared
//   memory,
//      tensor cores multiply (f32: plain fused multiply-adds), sums stay in registers.
//   2. Normalised and activated maps go to shared memory, over the stages, which are done with; places outside the map
//      are zero there, whatever the normalisation adds.
//   3. Depthwise from shared memory; primary and cheap pixels leave for the output, four channels (NHWC) or a row of
//      pixels (NCHW) at a time.
// Bytes per output pixel: C * (1 + halo share) read, M + N written. Limit: memory for few channels, shared memory
// bandwidth for many.
#include "infer.h"

#include "device.h"

namespace fif::gpu {
namespace {

constexpr int kWarps = kThreads / 32;

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

template <class T>
FIF_DEVICE float value_at(const void* values, int64_t i, bool is_float, float otherwise) {
  if (values == nullptr) return otherwise;
  return is_float ? static_cast<const float*>(values)[i] : to_float(static_cast<const T*>(values)[i]);
}

// Normalisation of one channel as v * scale + shift.
template <class T>
FIF_DEVICE float2 scale_shift(const NormPointers& n, int64_t channel) {
  const float bias = value_at<T>(n.conv_bias, channel, n.is_float, 0.f);
  if (n.mean == nullptr) return {1.f, bias};
  const float scale = rsqrtf(value_at<T>(n.variance, channel, n.is_float, 1.f) + n.eps) *
      value_at<T>(n.weight, channel, n.is_float, 1.f);
  const float mean = value_at<T>(n.mean, channel, n.is_float, 0.f);
  return {scale, value_at<T>(n.bias, channel, n.is_float, 0.f) + (bias - mean) * scale};
}

// Rows of the arrays in shared memory; each starts 16 bytes further on in the banks than the one before.
template <class T, bool Last, int Channels>
struct Rows {
  static constexpr int kSkew = 16 / sizeof(T);
  static constexpr int kInput = (Last ? kChunk : kPositions) + kSkew;  // [places][chunk] or [chunk][places]
  static constexpr int kWeight = kChunk + kSkew;                       // [channels][chunk]
  static constexpr int kMap = (Last ? Channels : kPositions) + kSkew;  // [places][channels] or [channels][places]
  static constexpr int kInputs = (Last ? kPositions : kChunk) * kInput;
  static constexpr int kMaps = (Last ? kPositions : Channels) * kMap;
};

template <class T>
struct Arrays {
  T *input[2], *weight[2], *maps;
  float *norm1, *norm2, *taps;  // [2][channels], [2][S][channels], [taps][S][channels]
  int* where;                   // [places] pixel of the map, -1 outside it
};

// The same carving on the host, which wants the size, and in the kernel, which wants the arrays. The maps overlay the
// stages of the product.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, bool Last, int K, int Channels, class Arena>
FIF_HOST_DEVICE void carve(Arena& arena, int multiplier, Arrays<T>* arrays) {
  using R = Rows<T, Last, Channels>;
  arrays->norm1 = arena.template take<float>(2 * Channels);
  arrays->norm2 = arena.template take<float>(2 * Channels * multiplier);
  arrays->taps = arena.template take<float>(K * K * Channels * multiplier);
  arrays->where = arena.template take<int>(kPositions);
  const int start = arena.mark();
  for (int stage = 0; stage < 2; ++stage) {
    arrays->input[stage] = arena.template take<T>(R::kInputs);
    arrays->weight[stage] = arena.template take<T>(Channels * R::kWeight);
  }
  arena.rewind(start);
  arrays->maps = arena.template take<T>(R::kMaps);
}

// Copies V elements to shared memory, zeros where not valid; those too few for cp.async at once.
template <int V, class T>
FIF_DEVICE void copy_to_shared(T* to, const T* from, bool valid) {
  if constexpr (V * sizeof(T) >= 4)
    cp_async<V * sizeof(T)>(to, from, valid);
  else
    *to = valid ? *from : from_float<T>(0.f);
}

// The block's sums in registers: warps lie kAcross side by side along its channels and kAlong along its places, and a
// warp takes every kAlong-th group of 16 places.
template <class T, bool Last, int Channels>
class Sums {
  using R = Rows<T, Last, Channels>;
  static constexpr int kAcross = !Last && Channels == 16 ? 1 : 2, kAlong = kWarps / kAcross;
  static constexpr int kGroups = kPositions / 16 / kAlong;
  static constexpr int kMine = Channels / kAcross;                  // channels of a warp
  static constexpr int kTiles = Last ? kMine / 8 : kMine / 16 * 2;  // matrix tiles of a group of 16 places

  float sum_[kGroups][kTiles][4] = {};
  const int places_, lane_, along_, channel_;

 public:
  FIF_DEVICE explicit Sums(int places)
      : places_(places), lane_(lane_id()), along_(warp_id() / kAcross), channel_(warp_id() % kAcross * kMine) {}

  FIF_DEVICE void add(const T* input, const T* weight) {
    FIF_UNROLL
    for (int k = 0; k < kChunk; k += 16) {
      if constexpr (Last)
        add_channels_last(input, weight, k);
      else
        add_planar(input, weight, k);
    }
  }

  // use(place, channel, sum) for all that this thread holds
  template <class Use>
  FIF_DEVICE void each(Use use) const {
    const int g = lane_ / 4, t = lane_ % 4 * 2;
    FIF_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      const int place = (along_ + q * kAlong) * 16;
      if (place >= places_) break;
      FIF_UNROLL
      for (int i = 0; i < kTiles; ++i) FIF_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int row = g + e / 2 * 8, column = t + e % 2;
        if constexpr (Last)
          use(place + row, channel_ + i * 8 + column, sum_[q][i][e]);
        else
          use(place + i % 2 * 8 + column, channel_ + i / 2 * 16 + row, sum_[q][i][e]);
      }
    }
  }

 private:
  // Rows of the product are places, columns are channels.
  FIF_DEVICE void add_channels_last(const T* input, const T* weight, int k) {
    uint32_t b[kTiles][2];
    if constexpr (kTiles == 1) {
      ldmatrix_x2(b[0], weight + (channel_ + lane_ % 8) * R::kWeight + k + lane_ / 8 % 2 * 8);
    } else {
      FIF_UNROLL
      for (int i = 0; i < kTiles; i += 2) {
        uint32_t r[4];
        ldmatrix_x4(r, weight + (channel_ + (i + lane_ / 16) * 8 + lane_ % 8) * R::kWeight + k + lane_ / 8 % 2 * 8);
        b[i][0] = r[0], b[i][1] = r[1], b[i + 1][0] = r[2], b[i + 1][1] = r[3];
      }
    }
    FIF_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      const int place = (along_ + q * kAlong) * 16;
      if (place >= places_) break;
      uint32_t a[4];
      ldmatrix_x4(a, input + (place + lane_ % 16) * R::kInput + k + lane_ / 16 * 8);
      FIF_UNROLL
      for (int i = 0; i < kTiles; ++i) mma<T>(sum_[q][i], a, b[i]);
    }
  }

  // Rows of the product are channels, columns are places.
  FIF_DEVICE void add_planar(const T* input, const T* weight, int k) {
    uint32_t a[kTiles / 2][4];
    FIF_UNROLL
    for (int i = 0; i < kTiles / 2; ++i)
      ldmatrix_x4(a[i], weight + (channel_ + i * 16 + lane_ % 16) * R::kWeight + k + lane_ / 16 * 8);
    FIF_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      const int place = (along_ + q * kAlong) * 16;
      if (place >= places_) break;
      uint32_t r[4];
      ldmatrix_x4_trans(r, input + (k + lane_ / 8 % 2 * 8 + lane_ % 8) * R::kInput + place + lane_ / 16 * 8);
      const uint32_t left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
      FIF_UNROLL
      for (int i = 0; i < kTiles; i += 2) {
        mma<T>(sum_[q][i], a[i / 2], left);
        mma<T>(sum_[q][i + 1], a[i / 2], right);
      }
    }
  }
};

// f32, exact: a lane takes every 32nd place, a warp an eighth of the channels.
template <bool Last, int Channels>
class Sums<float, Last, Channels> {
  using R = Rows<float, Last, Channels>;
  static constexpr int kGroups = kPositions / 32, kMine = Channels / kWarps;

  float sum_[kGroups][kMine] = {};
  const int places_, lane_, channel_;

 public:
  FIF_DEVICE explicit Sums(int places) : places_(places), lane_(lane_id()), channel_(warp_id() * kMine) {}

  FIF_DEVICE void add(const float* input, const float* weight) {
    for (int k = 0; k < kChunk; k += 4) {
      Vec<float, 4> w[kMine];
      FIF_UNROLL
      for (int i = 0; i < kMine; ++i) w[i] = vec_load<4>(weight + (channel_ + i) * R::kWeight + k);
      FIF_UNROLL
      for (int q = 0; q < kGroups; ++q) {
        const int place = q * 32 + lane_;
        if (q * 32 >= places_) break;
        Vec<float, 4> v;
        if constexpr (Last) {
          v = vec_load<4>(input + place * R::kInput + k);
        } else {
          FIF_UNROLL
          for (int e = 0; e < 4; ++e) v[e] = input[(k + e) * R::kInput + place];
        }
        FIF_UNROLL
        for (int e = 0; e < 4; ++e) FIF_UNROLL
        for (int i = 0; i < kMine; ++i) sum_[q][i] = fmaf(v[e], w[i][e], sum_[q][i]);
      }
    }
  }

  template <class Use>
  FIF_DEVICE void each(Use use) const {
    FIF_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      if (q * 32 >= places_) break;
      FIF_UNROLL
      for (int i = 0; i < kMine; ++i) use(q * 32 + lane_, channel_ + i, sum_[q][i]);
    }
  }
};

// Four channels of one place in the compute type.
template <class T>
FIF_DEVICE void load_quad(const T* from, float (&v)[4]) {
  const Vec<T, 4> raw = vec_load<4>(from);
  FIF_UNROLL
  for (int q = 0; q < 4; ++q) v[q] = to_float(raw[q]);
}

template <class T>
FIF_DEVICE bool aligned_quad(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0;
}

template <class T, bool Last, int K, int Channels>
struct Block {
  using Row = Rows<T, Last, Channels>;
  static constexpr int R = K / 2;

  const InferCall& call;
  const Problem& p;
  int first_map, row0, column0, columns, places;  // first pixel of the tile's halo, places per row, places in all
  int64_t image;
  Arrays<T> s;

  FIF_DEVICE Block(const InferCall& c, SharedArena& arena) : call(c), p(c.p) {
    const int tiles = c.plan.tiles_h * c.plan.tiles_w;
    const int tile = static_cast<int>(blockIdx.x % tiles);
    image = blockIdx.x / tiles;
    row0 = tile / c.plan.tiles_w * c.plan.tile_h - R;
    column0 = tile % c.plan.tiles_w * c.plan.tile_w - c.plan.pad;
    columns = c.plan.tile_w + 2 * c.plan.pad;
    places = columns * (c.plan.tile_h + 2 * R);
    first_map = blockIdx.y * Channels;
    carve<T, Last, K, Channels>(arena, static_cast<int>(p.multiplier), &s);
  }

  // Constants of this block's channels, and the table of places.
  FIF_DEVICE void prepare() {
    const int multiplier = static_cast<int>(p.multiplier);
    for (int i = threadIdx.x; i < kPositions; i += kThreads) {
      const int h = row0 + i / columns, w = column0 + i % columns;
      const bool inside = i < places && h >= 0 && h < p.height && w >= 0 && w < p.width;
      s.where[i] = inside ? h * static_cast<int>(p.width) + w : -1;
    }
    for (int i = threadIdx.x; i < Channels; i += kThreads) {
      const float2 v = first_map + i < p.primary ? scale_shift<T>(call.primary, first_map + i) : float2{0.f, 0.f};
      s.norm1[i] = v.x;
      s.norm1[Channels + i] = v.y;
    }
    // Cheap map number t of channel i at [t][i].
    for (int i = threadIdx.x; i < Channels * multiplier; i += kThreads) {
      const int map = first_map + i % Channels, t = i / Channels;
      const float2 v = map < p.primary ? scale_shift<T>(call.cheap, int64_t(map) * multiplier + t) : float2{0.f, 0.f};
      s.norm2[i] = v.x;
      s.norm2[Channels * multiplier + i] = v.y;
    }
    for (int i = threadIdx.x; i < Channels * multiplier * K * K; i += kThreads) {
      const int map = first_map + i % Channels, t = i / Channels % multiplier, tap = i / (Channels * multiplier);
      const T* weight = static_cast<const T*>(call.cheap_weight);
      s.taps[i] = map < p.primary ? to_float(weight[(int64_t(map) * multiplier + t) * K * K + tap]) : 0.f;
    }
  }

  // ---- 1. product

  template <int V>
  FIF_DEVICE void load_input(int stage, int chunk) {
    T* to = s.input[stage];
    const T* x = static_cast<const T*>(call.x.data) + image * call.x.batch;
    const int channels = static_cast<int>(p.in_channels);
    if constexpr (Last) {
      constexpr int kPieces = kChunk / V;
      const int rows = (places + 15) & ~15;
      for (int i = threadIdx.x; i < rows * kPieces; i += kThreads) {
        const int place = i / kPieces, c = i % kPieces * V, pixel = s.where[place];
        const bool valid = pixel >= 0 && chunk + c < channels;
        const T* from = valid ? x + pixel * call.x.step + chunk + c : x;
        copy_to_shared<V>(to + place * Row::kInput + c, from, valid);
      }
    } else {
      const int pieces = ((places + 15) & ~15) / V;
      for (int i = threadIdx.x; i < kChunk * pieces; i += kThreads) {
        const int c = i / pieces, place = i % pieces * V, pixel = s.where[place];
        const bool valid = pixel >= 0 && chunk + c < channels;
        const T* from = valid ? x + (chunk + c) * call.x.step + pixel : x;
        copy_to_shared<V>(to + c * Row::kInput + place, from, valid);
      }
    }
  }

  template <int V>
  FIF_DEVICE void load_weight(int stage, int chunk) {
    T* to = s.weight[stage];
    const T* weight = static_cast<const T*>(call.primary_weight);
    const int channels = static_cast<int>(p.in_channels);
    constexpr int kPieces = kChunk / V;
    for (int i = threadIdx.x; i < Channels * kPieces; i += kThreads) {
      const int map = first_map + i / kPieces, c = i % kPieces * V;
      const bool valid = map < p.primary && chunk + c < channels;
      const T* from = valid ? weight + int64_t(map) * channels + chunk + c : weight;
      copy_to_shared<V>(to + i / kPieces * Row::kWeight + c, from, valid);
    }
  }

  FIF_DEVICE void load(int stage, int chunk) {
    switch (call.plan.vector) {
      case 8:
        if constexpr (sizeof(T) == 2) load_input<8>(stage, chunk);
        break;
      case 4: load_input<4>(stage, chunk); break;
      case 2: load_input<2>(stage, chunk); break;
      default: load_input<1>(stage, chunk);
    }
    constexpr int kWide = 16 / sizeof(T);
    const bool aligned = p.in_channels % kWide == 0 && reinterpret_cast<uintptr_t>(call.primary_weight) % 16 == 0;
    if (aligned)
      load_weight<kWide>(stage, chunk);
    else
      load_weight<1>(stage, chunk);
    cp_async_commit();
  }

  // Sums of this thread, and what to do with them: use(place, channel, sum) for each.
  template <class Use>
  FIF_DEVICE void product(Use use) {
    const int chunks = static_cast<int>((p.in_channels + kChunk - 1) / kChunk);
    load(0, 0);
    Sums<T, Last, Channels> sums(places);
    for (int k = 0; k < chunks; ++k) {
      if (k + 1 < chunks) load((k + 1) % 2, (k + 1) * kChunk);
      if (k + 1 < chunks)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
      __syncthreads();
      sums.add(s.input[k % 2], s.weight[k % 2]);
      __syncthreads();
    }
    sums.each(use);
  }

  // ---- 3. depthwise

  // Four channels from c on, column w of the tile, two rows: cheap maps number t of each.
  FIF_DEVICE void store_quads(int c, int w, int strip, int t) {
    constexpr int kRows = 2, Q = 4;
    const int multiplier = static_cast<int>(p.multiplier);
    float tap[K * K][Q], sum[kRows][Q] = {};
    if constexpr (K == 3) {  // larger kernels would not leave registers for anything else
      FIF_UNROLL
      for (int k = 0; k < K * K; ++k) load_quad(s.taps + (k * multiplier + t) * Channels + c, tap[k]);
    }
    FIF_UNROLL
    for (int row = 0; row < kRows + K - 1; ++row) {
      const int r = strip * kRows + row;
      if (r >= call.plan.tile_h + 2 * R) break;
      FIF_UNROLL
      for (int dx = 0; dx < K; ++dx) {
        float v[Q];
        load_quad(s.maps + (r * columns + w + call.plan.pad - R + dx) * Row::kMap + c, v);
        FIF_UNROLL
        for (int dy = 0; dy < K; ++dy) {
          if (row - dy < 0 || row - dy >= kRows) continue;
          if constexpr (K != 3) load_quad(s.taps + ((dy * K + dx) * multiplier + t) * Channels + c, tap[dy * K + dx]);
          FIF_UNROLL
          for (int q = 0; q < Q; ++q) sum[row - dy][q] = fmaf(v[q], tap[dy * K + dx][q], sum[row - dy][q]);
        }
      }
    }
    float scale[Q], shift[Q];
    load_quad(s.norm2 + t * Channels + c, scale);
    load_quad(s.norm2 + (multiplier + t) * Channels + c, shift);
    const int left = static_cast<int>(p.primary) - first_map - c;  // channels from c on that exist
    T* out = static_cast<T*>(call.out.data) + image * call.out.batch;
    FIF_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const int r = strip * kRows + row, place = (r + R) * columns + w + call.plan.pad;
      if (r >= call.plan.tile_h || s.where[place] < 0) break;
      T* to = out + s.where[place] * call.out.step;
      if (t == 0 && p.splice) put_quad(to + first_map + c, 1, left, vec_load<Q>(s.maps + place * Row::kMap + c));
      Vec<T, Q> z;
      FIF_UNROLL
      for (int q = 0; q < Q; ++q) z[q] = from_float<T>(activate(fmaf(sum[row][q], scale[q], shift[q]), p.activation));
      const int64_t first = p.kept_primary() + int64_t(first_map + c) * multiplier + t;
      const int64_t kept = ceil_div(p.out_channels - first, multiplier);
      put_quad(to + first, multiplier, left < kept ? left : static_cast<int>(kept), z);
    }
  }

  // The first `count` of four channels, `stride` apart.
  FIF_DEVICE static void put_quad(T* to, int stride, int count, const Vec<T, 4>& v) {
    if (stride == 1 && count >= 4 && aligned_quad(to)) return vec_store(to, v);
    FIF_UNROLL
    for (int q = 0; q < 4; ++q)
      if (q < count) to[q * stride] = v[q];
  }

  // Channel c, column w of the tile, four rows: cheap map number t.
  FIF_DEVICE void store_rows(int c, int w, int strip, int t) {
    constexpr int kRows = 4;
    const int multiplier = static_cast<int>(p.multiplier);
    const T* map = s.maps + c * Row::kMap;
    float sum[kRows] = {};
    FIF_UNROLL
    for (int row = 0; row < kRows + K - 1; ++row) {
      const int r = strip * kRows + row;
      if (r >= call.plan.tile_h + 2 * R) break;
      FIF_UNROLL
      for (int dx = 0; dx < K; ++dx) {
        const float v = to_float(map[r * columns + w + call.plan.pad - R + dx]);
        FIF_UNROLL
        for (int dy = 0; dy < K; ++dy)
          if (row - dy >= 0 && row - dy < kRows)
            sum[row - dy] = fmaf(v, s.taps[((dy * K + dx) * multiplier + t) * Channels + c], sum[row - dy]);
      }
    }
    const float scale = s.norm2[t * Channels + c], shift = s.norm2[(multiplier + t) * Channels + c];
    const int64_t channel = p.kept_primary() + int64_t(first_map + c) * multiplier + t;
    T* out = static_cast<T*>(call.out.data) + image * call.out.batch;
    FIF_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const int r = strip * kRows + row, place = (r + R) * columns + w + call.plan.pad;
      if (r >= call.plan.tile_h || s.where[place] < 0) break;
      if (t == 0 && p.splice) out[(first_map + c) * call.out.step + s.where[place]] = map[place];
      if (channel < p.out_channels)
        out[channel * call.out.step + s.where[place]] =
            from_float<T>(activate(fmaf(sum[row], scale, shift), p.activation));
    }
  }

  // Neighbouring threads write neighbouring channels (NHWC) or pixels (NCHW).
  FIF_DEVICE void depthwise() {
    const int width = call.plan.tile_w, multiplier = static_cast<int>(p.multiplier);
    const int left = static_cast<int>(p.primary) - first_map, channels = left < Channels ? left : Channels;
    if constexpr (Last) {
      const int quads = (channels + 3) / 4, strips = (call.plan.tile_h + 1) / 2, items = quads * width * strips;
      for (int i = threadIdx.x; i < items * multiplier; i += kThreads) {
        const int item = i % items;
        store_quads(item % quads * 4, item / quads % width, item / (quads * width), i / items);
      }
    } else {
      const int strips = (call.plan.tile_h + 3) / 4, items = channels * width * strips;
      for (int i = threadIdx.x; i < items * multiplier; i += kThreads) {
        const int item = i % items;
        store_rows(item / (width * strips), item % width, item / width % strips, i / items);
      }
    }
  }
};

// Two blocks to a multiprocessor, except where 128 registers a thread would not hold the sums.
template <class T, bool Last, int K, int Channels>
__global__ void __launch_bounds__(kThreads, Last&& Channels == 64 ? 1 : 2)
    infer_kernel(const __grid_constant__ InferCall call) {
  using Row = Rows<T, Last, Channels>;
  FIF_SHARED(shared);
  SharedArena arena(shared);
  Block<T, Last, K, Channels> block(call, arena);
  block.prepare();
  __syncthreads();
  const Arrays<T>& s = block.s;
  block.product([&](int place, int channel, float sum) {
    const float v = activate(fmaf(sum, s.norm1[channel], s.norm1[Channels + channel]), call.p.activation);
    s.maps[Last ? place * Row::kMap + channel : channel * Row::kMap + place] =
        from_float<T>(s.where[place] >= 0 ? v : 0.f);
  });
  __syncthreads();
  block.depthwise();
}

// Stands in for the arena on the host.
struct Sizer {
  SharedLayout layout;
  template <class E>
  E* take(int count) {
    layout.take<E>(count);
    return nullptr;
  }
  int mark() const { return layout.mark(); }
  void rewind(int to) { layout.rewind(to); }
};

// One kernel: its shared memory, and its launch.
template <class T, bool Last, int K, int Channels>
struct Instance {
  static int shared_bytes(const InferCall& call) {
    Sizer sizer;
    Arrays<T> unused;
    carve<T, Last, K, Channels>(sizer, static_cast<int>(call.p.multiplier), &unused);
    return sizer.layout.bytes();
  }
  static cudaError_t run(const InferCall& call, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(call.plan.blocks_x), call.plan.blocks_y);
    return FIF_LAUNCH((infer_kernel<T, Last, K, Channels>), grid, kThreads, shared_bytes(call), stream, call);
  }
};

template <class T, bool Last, int K, class F>
auto with_channels(const InferCall& call, F f) {
  switch (call.plan.channels) {
    case 16: return f(Instance<T, Last, K, 16>{});
    case 32: return f(Instance<T, Last, K, 32>{});
    default: return f(Instance<T, Last, K, 64>{});
  }
}

template <class T, class F>
auto with_layout(const InferCall& call, F f) {
  if (call.p.kernel == 3)
    return call.p.channels_last ? with_channels<T, true, 3>(call, f) : with_channels<T, false, 3>(call, f);
  return call.p.channels_last ? with_channels<T, true, 5>(call, f) : with_channels<T, false, 5>(call, f);
}

template <class F>
auto with_instance(const InferCall& call, F f) {
  switch (call.p.dtype) {
    case Dtype::f32: return with_layout<float>(call, f);
    case Dtype::f16: return with_layout<__half>(call, f);
    default: return with_layout<__nv_bfloat16>(call, f);
  }
}

}  // namespace

int64_t inference_shared_bytes(const InferCall& call) {
  return with_instance(call, [&](auto instance) -> int64_t { return instance.shared_bytes(call); });
}

cudaError_t launch_inference(const InferCall& call, cudaStream_t stream) {
  return with_instance(call, [&](auto instance) { return instance.run(call, stream); });
}

}  // namespace fif::gpu
