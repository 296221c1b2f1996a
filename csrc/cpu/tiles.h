// The processor's tile registers (AMX), which multiply bf16 numbers.
//
// Eight registers hold 16 rows of 64 bytes each: sums of 16 rows x 16 lanes, 32 numbers of 16 rows, or 16 pairs along
// the depth of 16 lanes. One instruction adds the product of the last two to the first, 16,384 operations in 16 cycles.
// With FIF_SANITIZED plain C++ does the same, so that sanitizers see every access.
#pragma once

#include "vec.h"

namespace fif::FIF_ISA {

#if defined(__AMX_BF16__)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

constexpr int kTileSide = 16;                        // rows, and columns of sums
constexpr int kTileDepth = 32;                       // numbers of a row
constexpr int kTileBytes = 64;                       // of a row
enum Tile { kSums, kRowTiles = 4, kLaneTiles = 6 };  // four registers of sums, two of either factor

// Of the registers; the layout is the processor's.
struct alignas(64) TileShapes {
  uint8_t palette = 0, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes() = default;
  // For products of `count` rows (16 at most) and `depth` numbers (32 at most, even) at a time.
  TileShapes(int count, int depth) : palette(1) {
    for (int t = 0; t < 8; ++t) {
      bytes[t] = static_cast<uint16_t>(t >= kRowTiles && t < kLaneTiles ? 2 * depth : kTileBytes);
      rows[t] = static_cast<uint8_t>(t < kLaneTiles ? count : depth / 2);
    }
  }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(__AMX_BF16__) && !defined(FIF_SANITIZED)

// Where another thread runs on the same core, tile instructions that follow each other closely take twice as long as
// those with other work between them; for a thread alone these cost nothing.
#define FIF_BREATH "\n.rept 8\nnop\n.endr"

// The registers, for as long as this lives. GCC's own intrinsics take literal numbers alone, and say nothing of memory.
class TileRegisters {
 public:
  TileRegisters() = default;
  ~TileRegisters() {
    if (shapes_.palette) asm volatile("tilerelease");
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // Takes as long as twenty products, where it changes anything.
  void shape(const TileShapes& shapes) {
    if (memcmp(&shapes, &shapes_, sizeof shapes) == 0) return;
    shapes_ = shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes_));
  }

  template <int T>
  FIF_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  FIF_INLINE void load(const void* from, int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" FIF_BREATH ::"r"(from), "r"(step), "i"(T) : "memory");
  }
  template <int T>
  FIF_INLINE void store(void* to, int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(T) : "memory");
  }
  // sums += rows * lanes
  template <int S, int R, int L>
  FIF_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" FIF_BREATH ::"i"(S), "i"(R), "i"(L));
  }

 private:
  TileShapes shapes_;
};

#elif defined(__AMX_BF16__)

class TileRegisters {
 public:
  void shape(const TileShapes& shapes) { shapes_ = shapes; }

  template <int T>
  void zero() {
    memset(data_[T], 0, sizeof data_[T]);
  }
  template <int T>
  void load(const void* from, int64_t step) {
    for (int r = 0; r < shapes_.rows[T]; ++r)
      for (int i = 0; i < shapes_.bytes[T]; ++i) data_[T][r][i] = static_cast<const char*>(from)[r * step + i];
  }
  template <int T>
  void store(void* to, int64_t step) {
    for (int r = 0; r < shapes_.rows[T]; ++r)
      for (int i = 0; i < shapes_.bytes[T]; ++i) static_cast<char*>(to)[r * step + i] = data_[T][r][i];
  }
  template <int S, int R, int L>
  void multiply_add() {
    auto number = [&](int t, int r, int i) {
      bf16 v;
      memcpy(&v, &data_[t][r][2 * i], 2);
      const uint32_t bits = uint32_t(v.bits) << 16;
      float f;
      memcpy(&f, &bits, 4);
      return f;
    };
    for (int r = 0; r < shapes_.rows[S]; ++r)
      for (int j = 0; j < kTileSide; ++j) {
        float sum;
        memcpy(&sum, &data_[S][r][4 * j], 4);
        for (int k = 0; k < shapes_.bytes[R] / 2; ++k) sum += number(R, r, k) * number(L, k / 2, 2 * j + k % 2);
        memcpy(&data_[S][r][4 * j], &sum, 4);
      }
  }

 private:
  TileShapes shapes_;
  char data_[8][kTileSide][kTileBytes];
};

#else

class TileRegisters {};

#endif

}  // namespace fif::FIF_ISA
