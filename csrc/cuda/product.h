// Products of a weight matrix and maps, a block at a time: up to kPositions places by 16, 32 or 64 channels.
//
// Chunks of 32 reduced channels go through two stages of shared memory; tensor cores multiply (f32: plain fused
// multiply-adds, or tf32); sums stay in registers, where the caller takes them place by place, or channel by channel.
// With Turned the weight is stored with the reduced channels as rows, as the gradient of the input wants it.
#pragma once

#include "device.h"
#include "plan.h"

namespace fif::gpu {

// Rows of the arrays in shared memory; each starts 16 bytes further on in the banks than the one before.
template <class T, bool Last, int Channels, bool Turned = false>
struct Rows {
  static constexpr int kSkew = 16 / sizeof(T);
  static constexpr int kInput = (Last ? kChunk : kPositions) + kSkew;   // [places][chunk] or [chunk][places]
  static constexpr int kWeight = (Turned ? Channels : kChunk) + kSkew;  // [channels][chunk] or [chunk][channels]
  static constexpr int kMap = (Last ? Channels : kPositions) + kSkew;   // [places][channels] or [channels][places]
  static constexpr int kInputs = (Last ? kPositions : kChunk) * kInput;
  static constexpr int kWeights = (Turned ? kChunk : Channels) * kWeight;
  static constexpr int kMaps = (Last ? kPositions : Channels) * kMap;
};

template <class T, class R>
struct Stages {
  T *inputs, *weights, *maps;  // two stages of both factors; results

  FIF_DEVICE T* input(int stage) const { return inputs + stage * R::kInputs; }
  FIF_DEVICE T* weight(int stage) const { return weights + stage * R::kWeights; }
};

// The same carving on the host, which wants the size, and in the kernel, which wants the arrays. The maps, for results,
// overlay the stages, which are done with by then.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, class R, class Arena>
FIF_HOST_DEVICE void carve_stages(Arena& arena, Stages<T, R>* stages) {
  const int start = arena.mark();
  stages->inputs = arena.template take<T>(2 * R::kInputs);
  stages->weights = arena.template take<T>(2 * R::kWeights);
  arena.rewind(start);
  stages->maps = arena.template take<T>(R::kMaps);
}

// Copies V elements to shared memory, zeros where not valid; those too few for cp.async at once.
template <int V, class T>
FIF_DEVICE void copy_to_shared(T* to, const T* from, bool valid) {
  if constexpr (V * sizeof(T) >= 4)
    cp_async<V * sizeof(T)>(to, from, valid);
  else
    *to = valid ? *from : from_float<T>(0.f);
}

// Rows of `pieces` times V elements; from(row, column) is where they are, or null for zeros. `any` is a sane address.
template <int V, int Pitch, class T, class From>
FIF_DEVICE void copy_rows(T* to, int rows, int pieces, const T* any, From from) {
  FIF_NO_UNROLL
  for (int i = threadIdx.x; i < rows * pieces; i += kThreads) {
    const int row = i / pieces, column = i % pieces * V;
    const T* source = from(row, column);
    copy_to_shared<V>(to + row * Pitch + column, source != nullptr ? source : any, source != nullptr);
  }
}

// f(std::integral_constant<int, vector>): the widths of a load or store, 16 bytes at most.
template <class T, class F>
FIF_DEVICE void with_vector(int vector, F f) {
  switch (vector) {
    case 8:
      if constexpr (sizeof(T) == 2) return f(std::integral_constant<int, 8>{});
      break;
    case 4: return f(std::integral_constant<int, 4>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, 1>{});
  }
}

// Loads rows of a weight matrix [rows, columns] as wide as its address and row length allow.
template <class T, int Pitch>
FIF_DEVICE void copy_weight(T* to, const T* weight, int64_t row_length, int rows, int columns, int first_row,
                            int end_row, int first_column, int end_column) {
  constexpr int kWide = 16 / sizeof(T);
  const bool aligned = row_length % kWide == 0 && first_column % kWide == 0 && end_column % kWide == 0 &&
      reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  with_vector<T>(aligned ? kWide : 1, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    copy_rows<V, Pitch>(to, rows, columns / V, weight, [&](int row, int column) -> const T* {
      const int r = first_row + row, c = first_column + column;
      return r < end_row && c < end_column ? weight + r * row_length + c : nullptr;
    });
  });
}

// A block's sums in registers: warps lie kAcross side by side along its channels and kAlong along its places, and a
// warp takes every kAlong-th group of 16 places. A thread holds kSlots channels of kValues places each.
template <class T, bool Last, int Channels, bool Turned, bool Tf32>
class Sums {
  using R = Rows<T, Last, Channels, Turned>;
  static_assert(sizeof(T) == 2 || Tf32);
  static constexpr int kAcross = !Last && Channels == 16 ? 1 : 2, kAlong = kThreads / 32 / kAcross;
  static constexpr int kGroups = kPositions / 16 / kAlong;
  static constexpr int kMine = Channels / kAcross;                  // channels of a warp
  static constexpr int kTiles = Last ? kMine / 8 : kMine / 16 * 2;  // matrix tiles of a group of 16 places
  static constexpr int kStep = sizeof(T) == 2 ? 16 : 8;             // reduced channels of one matrix instruction

  float sum_[kGroups][kTiles][4] = {};
  const int places_, g_, t_, along_, channel_;

 public:
  static constexpr int kSlots = Last ? kTiles * 2 : kTiles, kValues = kGroups * (Last ? 2 : 4);
  // Threads that hold the same channel, and this one's number among them.
  static constexpr int kSharers = kAlong * (Last ? 8 : 4);
  FIF_DEVICE int sharer() const { return along_ * (Last ? 8 : 4) + (Last ? g_ : t_); }

  FIF_DEVICE explicit Sums(int places)
      : places_(places), g_(lane_id() / 4), t_(lane_id() % 4), along_(warp_id() / kAcross),
        channel_(warp_id() % kAcross * kMine) {}

  FIF_DEVICE int channel(int slot) const {
    return Last ? channel_ + slot / 2 * 8 + t_ * 2 + slot % 2 : channel_ + slot / 2 * 16 + g_ + slot % 2 * 8;
  }
  // May lie at or behind the places that were asked for.
  FIF_DEVICE int place(int value) const {
    return Last ? (along_ + value / 2 * kAlong) * 16 + g_ + value % 2 * 8
                : (along_ + value / 4 * kAlong) * 16 + value / 2 % 2 * 8 + t_ * 2 + value % 2;
  }
  FIF_DEVICE float& at(int slot, int value) {
    if constexpr (Last)
      return sum_[value / 2][slot / 2][value % 2 * 2 + slot % 2];
    else
      return sum_[value / 4][slot / 2 * 2 + value / 2 % 2][slot % 2 * 2 + value % 2];
  }

  FIF_DEVICE void add(const T* input, const T* weight) {
    FIF_UNROLL
    for (int k = 0; k < kChunk; k += kStep) {
      if constexpr (Last)
        add_channels_last(input, weight, k);
      else
        add_planar(input, weight, k);
    }
  }

 private:
  template <class A, class B>
  FIF_DEVICE static void multiply(float (&d)[4], const A& a, const B& b) {
    if constexpr (Tf32)
      mma_tf32(d, a, b);
    else
      mma<T>(d, a, b);
  }
  FIF_DEVICE uint32_t input_tf32(const T* input, int place, int k) const {
    return to_tf32(input[Last ? place * R::kInput + k : k * R::kInput + place]);
  }
  FIF_DEVICE uint32_t weight_tf32(const T* weight, int channel, int k) const {
    return to_tf32(weight[Turned ? k * R::kWeight + channel : channel * R::kWeight + k]);
  }

  // Rows of the product are places, columns are channels.
  FIF_DEVICE void add_channels_last(const T* input, const T* weight, int k) {
    const int lane = lane_id();
    uint32_t b[kTiles][2];
    if constexpr (Tf32) {
      FIF_UNROLL
      for (int i = 0; i < kTiles; ++i) FIF_UNROLL
      for (int e = 0; e < 2; ++e) b[i][e] = weight_tf32(weight, channel_ + i * 8 + g_, k + t_ + e * 4);
    } else if constexpr (kTiles == 1 && Turned) {
      ldmatrix_x2_trans(b[0], weight + (k + lane % 16) * R::kWeight + channel_);
    } else if constexpr (kTiles == 1) {
      ldmatrix_x2(b[0], weight + (channel_ + lane % 8) * R::kWeight + k + lane / 8 % 2 * 8);
    } else {
      FIF_UNROLL
      for (int i = 0; i < kTiles; i += 2) {
        uint32_t r[4];
        if constexpr (Turned)
          ldmatrix_x4_trans(r, weight + (k + lane % 16) * R::kWeight + channel_ + (i + lane / 16) * 8);
        else
          ldmatrix_x4(r, weight + (channel_ + (i + lane / 16) * 8 + lane % 8) * R::kWeight + k + lane / 8 % 2 * 8);
        b[i][0] = r[0], b[i][1] = r[1], b[i + 1][0] = r[2], b[i + 1][1] = r[3];
      }
    }
    FIF_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      const int place = (along_ + q * kAlong) * 16;
      if (place >= places_) break;
      uint32_t a[4];
      if constexpr (Tf32) {
        FIF_UNROLL
        for (int e = 0; e < 4; ++e) a[e] = input_tf32(input, place + g_ + e % 2 * 8, k + t_ + e / 2 * 4);
      } else {
        ldmatrix_x4(a, input + (place + lane % 16) * R::kInput + k + lane / 16 * 8);
      }
      FIF_UNROLL
      for (int i = 0; i < kTiles; ++i) multiply(sum_[q][i], a, b[i]);
    }
  }

  // Rows of the product are channels, columns are places.
  FIF_DEVICE void add_planar(const T* input, const T* weight, int k) {
    const int lane = lane_id();
    uint32_t a[kTiles / 2][4];
    FIF_UNROLL
    for (int i = 0; i < kTiles / 2; ++i) {
      const int channel = channel_ + i * 16;
      if constexpr (Tf32) {
        FIF_UNROLL
        for (int e = 0; e < 4; ++e) a[i][e] = weight_tf32(weight, channel + g_ + e % 2 * 8, k + t_ + e / 2 * 4);
      } else if constexpr (Turned) {
        ldmatrix_x4_trans(a[i], weight + (k + lane / 16 * 8 + lane % 8) * R::kWeight + channel + lane / 8 % 2 * 8);
      } else {
        ldmatrix_x4(a[i], weight + (channel + lane % 16) * R::kWeight + k + lane / 16 * 8);
      }
    }
    FIF_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      const int place = (along_ + q * kAlong) * 16;
      if (place >= places_) break;
      uint32_t b[2][2];
      if constexpr (Tf32) {
        FIF_UNROLL
        for (int half = 0; half < 2; ++half) FIF_UNROLL
        for (int e = 0; e < 2; ++e) b[half][e] = input_tf32(input, place + half * 8 + g_, k + t_ + e * 4);
      } else {
        uint32_t r[4];
        ldmatrix_x4_trans(r, input + (k + lane % 16) * R::kInput + place + lane / 16 * 8);
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
      }
      FIF_UNROLL
      for (int i = 0; i < kTiles; ++i) multiply(sum_[q][i], a[i / 2], b[i % 2]);
    }
  }
};

// f32, exact: a lane takes every 32nd place, a warp an eighth of the channels.
template <bool Last, int Channels, bool Turned>
class Sums<float, Last, Channels, Turned, false> {
  using R = Rows<float, Last, Channels, Turned>;
  static constexpr int kGroups = kPositions / 32, kMine = Channels / (kThreads / 32);

  float sum_[kGroups][kMine] = {};
  const int places_, lane_, channel_;

 public:
  static constexpr int kSlots = kMine, kValues = kGroups, kSharers = 32;
  FIF_DEVICE int sharer() const { return lane_; }

  FIF_DEVICE explicit Sums(int places) : places_(places), lane_(lane_id()), channel_(warp_id() * kMine) {}

  FIF_DEVICE int channel(int slot) const { return channel_ + slot; }
  FIF_DEVICE int place(int value) const { return value * 32 + lane_; }
  FIF_DEVICE float& at(int slot, int value) { return sum_[value][slot]; }

  FIF_DEVICE void add(const float* input, const float* weight) {
    for (int k = 0; k < kChunk; k += 4) {
      float w[kMine][4];
      FIF_UNROLL
      for (int i = 0; i < kMine; ++i) {
        if constexpr (Turned) {
          FIF_UNROLL
          for (int e = 0; e < 4; ++e) w[i][e] = weight[(k + e) * R::kWeight + channel_ + i];
        } else {
          const Vec<float, 4> v = vec_load<4>(weight + (channel_ + i) * R::kWeight + k);
          FIF_UNROLL
          for (int e = 0; e < 4; ++e) w[i][e] = v[e];
        }
      }
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
};

// Two blocks, except where 128 registers a thread would not hold the sums.
template <class T, int Channels, bool Tf32>
constexpr int blocks_per_multiprocessor() {
  return sizeof(T) == 4 && !Tf32 && Channels == 64 ? 1 : 2;
}

// The whole product: load(stage, first reduced channel) fills a stage, by cp.async or at once. Ends with all stages
// free.
template <class S, class T, class R, class Load>
FIF_DEVICE void multiply_chunks(S& sums, const Stages<T, R>& stages, int reduced, Load load) {
  const int chunks = (reduced + kChunk - 1) / kChunk;
  load(0, 0);
  cp_async_commit();
  FIF_NO_UNROLL
  for (int k = 0; k < chunks; ++k) {
    if (k + 1 < chunks) {
      load((k + 1) % 2, (k + 1) * kChunk);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    sums.add(stages.input(k % 2), stages.weight(k % 2));
    __syncthreads();
  }
}

// use(place, channel, sum) for every sum of this thread at the places that there are, rounded up to 16.
template <class S, class Use>
FIF_DEVICE void each_sum(S& sums, int places, Use use) {
  FIF_UNROLL
  for (int v = 0; v < S::kValues; ++v) {
    const int place = sums.place(v);
    if (place >= ((places + 15) & ~15)) continue;
    FIF_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot) use(place, sums.channel(slot), sums.at(slot, v));
  }
}

}  // namespace fif::gpu
