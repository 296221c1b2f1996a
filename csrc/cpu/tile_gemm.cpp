// The products of tile_gemm.h.
//
// Up to two by two tiles of sums are computed at a time, so that four loads serve four products. What the processor
// cannot foresee over so many products happens between them: the sums of the block before go to their place, and the
// factors of the next ones are taken apart. Limit: the tile multiplier.
#include "tile_gemm.h"

#include <type_traits>

namespace fif::FIF_ISA {

// Cut off where rounding would overflow; infinity and NaN stay what they are.
bf16 part_of(float v, int part) {
  bf16 result{};
  for (int i = 0; i <= part; ++i) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t exponent = bits & 0x7f800000u, cut = bits & 0xffff0000u;
    if (exponent == 0x7f800000u) {
      const bool nan = (bits & 0x7fffffu) != 0;
      return i == part ? bf16{static_cast<uint16_t>(bits >> 16 | (nan ? 0x40u : 0u))} : bf16{};
    }
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    if ((rounded & 0x7f800000u) == 0x7f800000u) rounded = cut;
    result.bits = static_cast<uint16_t>(rounded >> 16);
    v -= to_compute(result);
  }
  return result;
}

#if defined(__AMX_BF16__)
namespace {

template <class Product>
constexpr int kPartsOf = kParts;
template <>
constexpr int kPartsOf<TileProduct> = 1;

// Tiles of sums: of rows from row[0], row[1] on, and of lanes from col[0], col[1] on.
struct TileBlock {
  int64_t row[2] = {}, col[2] = {};
  int rows = 0, cols = 0;
};

// The registers of a block's sums: two sets for fewer than four tiles, so that no product waits for the one before it.
template <int Parts, int Rows, int Cols>
struct Registers {
  static constexpr int sets = Parts > 1 && Rows* Cols < 4 ? 2 : 1;
  static constexpr int at(int r, int j, int set) {
    return kSums + (sets == 1 ? 2 * r + j : Rows == 2 ? 2 * r + set : 2 * set + j);
  }
};

// A sum once more, from the numbers themselves: of row i and the lanes from j on.
VecF multiply_add(const PartsProduct& g, int64_t i, int64_t j) {
  VecF sum{};
  const float* from = g.row(i);
  const bf16* b = g.b + j / kTileSide * g.chunks.stream();
  for (int64_t k = 0; k < g.chunks.count(); ++k, b += kParts * kTileNumbers) {
    const float* a = from + k / g.chunks.each * g.a_segment + g.chunks.begin(k);
    for (int64_t n = 0; n < g.chunks.numbers(k); ++n) {
      VecF weight{};
      for (int part = kParts - 1; part >= 0; --part)
        for (int l = 0; l < kTileSide; ++l) weight[l] += to_compute(b[part * kTileNumbers + g.chunks.in_lanes(l, n)]);
      sum += splat<float>(a[n]) * weight;
    }
  }
  return sum;
}

VecF multiply_add(const PlanarPartsProduct& g, int64_t i, int64_t j) {
  VecF sum{};
  const Mask lanes = first_lanes(g.to.cols - j);
  for (int64_t k = 0; k < g.chunks.depth; ++k)
    sum += splat<float>(g.rows[i * g.chunks.depth + k]) * load(g.b + k * g.b_k + j, lanes);
  return sum;
}

constexpr int kSteps = 6;  // of a product in parts, for each chunk
constexpr int kLines = 8;  // of a tile that a task makes, or places

// Work that is done between products, a task at a time, as evenly as may be.
template <class Work>
class Ahead {
 public:
  explicit Ahead(Work& work) : work_(work) {}
  void start(int64_t tasks, int64_t times) {
    left_ = each_ = tasks;
    times_ = credit_ = times;
  }
  FIF_INLINE void operator()() {
    if (left_ <= 0) return;
    for (credit_ -= each_; credit_ <= 0 && left_ > 0; credit_ += times_, --left_) work_.run();
  }
  void finish() {
    for (; left_ > 0; --left_) work_.run();
  }

 private:
  Work& work_;
  int64_t left_ = 0, each_ = 0, times_ = 0, credit_ = 0;
};

// The sums of a block, on their way from the tile registers to their place.
template <class Product>
class TileSums {
  static constexpr int Parts = kPartsOf<Product>;
  static constexpr bool kByRow = std::is_same_v<Product, PlanarPartsProduct>;

 public:
  TileSums(const Product& product, int rows) : g(product), rows_(rows) {}

  template <int Rows, int Cols>
  FIF_INLINE void take(TileRegisters& tiles, const TileBlock& block) {
    using R = Registers<Parts, Rows, Cols>;
    keep<R::at(0, 0, 0)>(tiles, 0);
    if constexpr (Cols == 2) keep<R::at(0, 1, 0)>(tiles, 1);
    if constexpr (Rows == 2) keep<R::at(1, 0, 0)>(tiles, 2);
    if constexpr (Rows == 2 && Cols == 2) keep<R::at(1, 1, 0)>(tiles, 3);
    if constexpr (R::sets == 2) {
      keep<R::at(0, 0, 1)>(tiles, 4);
      if constexpr (Cols == 2) keep<R::at(0, 1, 1)>(tiles, 5);
      if constexpr (Rows == 2) keep<R::at(1, 0, 1)>(tiles, 6);
    }
    block_ = block;
    sets_ = R::sets;
    tile_ = line_ = 0;
  }
  // Tasks until all are at their place.
  int64_t count() const { return block_.rows * block_.cols * ceil_div(rows_, kLines); }
  void finish() {
    for (int64_t i = count(); i > 0; --i) run();
  }
  __attribute__((noinline)) void run() {
    if (is_clamp(g.to.activation))
      with_clamp<float, true>(g.to.activation, [&](auto clamp) __attribute__((always_inline)) {
        place_next([clamp](VecF v) __attribute__((always_inline)) { return clamp(v); });
      });
    else
      place_next([kind = g.to.activation](VecF v) { return smooth_value<float>(v, kind); });
  }

 private:
  template <int T>
  FIF_INLINE void keep(TileRegisters& tiles, int place) {
    tiles.store<T>(sums_[place], kTileBytes);
  }

  // Some rows of a tile.
  template <class Activate>
  FIF_INLINE void place_next(Activate activate) {
    float (*sums)[kTileSide] = sums_[tile_ / block_.cols * 2 + tile_ % block_.cols] + line_;
    const int64_t row = block_.row[tile_ / block_.cols] + line_, col = block_.col[tile_ % block_.cols];
    const int count = static_cast<int>(min_of<int64_t>(min_of(kLines, rows_ - line_), g.to.rows - row));
    if constexpr (Parts > 1)
      if (sets_ == 2) {
        const float (*others)[kTileSide] = sums + 4 * kTileSide;
        for (int i = 0; i < count; ++i) store(sums[i], load(sums[i]) + load(others[i]));
      }
    if (!write(sums, count, row, col, activate)) {
      if constexpr (Parts > 1) once_more(sums, count, row, col);
      write(sums, count, row, col, activate);
    }
    line_ += kLines;
    if (line_ < rows_) return;
    line_ = 0;
    ++tile_;
  }
  // Whether all sums are finite.
  template <class Activate>
  FIF_INLINE bool write(const float (*sums)[kTileSide], int count, int64_t row, int64_t col, Activate activate) const {
    const int64_t step = g.to.c_row;
    const Mask lanes = first_lanes(g.to.cols - col);
    const float *scales = g.to.scale + (kByRow ? row : col), *shifts = g.to.shift + (kByRow ? row : col);
    VecF scale{}, shift{}, zero{};
    if constexpr (!kByRow) {
      scale = load(scales, lanes);
      shift = load(shifts, lanes);
    }
    float* c = g.to.c + row * step + col;
    auto one = [&](int i) __attribute__((always_inline)) {
      const VecF sum = load(sums[i]);
      if constexpr (Parts > 1) zero += sum * 0.0f;  // NaN where the sum is not finite
      if constexpr (kByRow) {
        scale = splat<float>(scales[i]);
        shift = splat<float>(shifts[i]);
      }
      const VecF value = activate(sum * scale + shift);
      if constexpr (Parts > 1)
        store(c, value, lanes);
      else
        store(c, value);
      c += step;
    };
    if (count == kLines) {
      FIF_UNROLL for (int i = 0; i < kLines; ++i) {
        one(i);
        asm("" : "+r"(c));
      }
    } else {
      for (int i = 0; i < count; ++i) one(i);
    }
    return Parts == 1 || not_finite(zero) == 0;
  }
  static FIF_INLINE __mmask16 not_finite(VecF v) {
    constexpr int kInfinityOrNan = 0x99;
    return _mm512_fpclass_ps_mask((__m512)v, kInfinityOrNan);
  }
  __attribute__((noinline)) void once_more(float (*sums)[kTileSide], int count, int64_t row, int64_t col) const {
    for (int i = 0; i < count; ++i) {
      const VecF sum = load(sums[i]);
      if (const __mmask16 bad = not_finite(sum))
        store(sums[i], (VecF)_mm512_mask_mov_ps((__m512)sum, bad, (__m512)multiply_add(g, row + i, col)));
    }
  }

  alignas(64) float sums_[7][kTileSide][kTileSide];
  const Product& g;
  TileBlock block_;
  int tile_ = 0, line_ = 0, sets_ = 1;
  const int rows_;
};

// Two tiles of a factor, from chunk to chunk of the depth; in parts, those of one chunk follow each other.
struct TileStream {
  const bf16* at[2];
  int64_t step;
  const bf16* end = nullptr;  // of a ring
  int64_t ring = 0;

  FIF_INLINE void next() {
    at[0] += step;
    at[1] += step;
    if (at[0] != end) return;
    at[0] -= ring;
    at[1] -= ring;
  }
};

struct Factors {
  TileStream rows;
  int64_t row_bytes;  // from one row of a tile to the next
  TileStream lanes;
};

// `other` is called after every few products.
template <class Product, int Rows, int Cols, class Other>
FIF_INLINE void multiply(TileRegisters& tiles, Factors f, int64_t chunks, const TileBlock& block,
                         TileSums<Product>& sums, Other& other) {
  constexpr int Parts = kPartsOf<Product>;
  using R = Registers<Parts, Rows, Cols>;
  tiles.zero<R::at(0, 0, 0)>();
  if constexpr (Cols == 2) tiles.zero<R::at(0, 1, 0)>();
  if constexpr (Rows == 2) tiles.zero<R::at(1, 0, 0)>();
  if constexpr (Rows == 2 && Cols == 2) tiles.zero<R::at(1, 1, 0)>();
  if constexpr (R::sets == 2) {
    tiles.zero<R::at(0, 0, 1)>();
    if constexpr (Cols == 2) tiles.zero<R::at(0, 1, 1)>();
    if constexpr (Rows == 2) tiles.zero<R::at(1, 0, 1)>();
  }
  const int64_t row_bytes = Parts == 1 ? f.row_bytes : kTileBytes;
  auto load_rows = [&](int part) __attribute__((always_inline)) {
    tiles.load<kRowTiles>(f.rows.at[0] + part * kTileNumbers, row_bytes);
    if constexpr (Rows == 2) tiles.load<kRowTiles + 1>(f.rows.at[1] + part * kTileNumbers, row_bytes);
  };
  auto load_lanes = [&](int part) __attribute__((always_inline)) {
    tiles.load<kLaneTiles>(f.lanes.at[0] + part * kTileNumbers, kTileBytes);
    if constexpr (Cols == 2) tiles.load<kLaneTiles + 1>(f.lanes.at[1] + part * kTileNumbers, kTileBytes);
  };
  Ahead place(sums);
  place.start(sums.count(), (Parts == 1 ? 1 : kSteps) * chunks);
  auto add = [&](auto set) __attribute__((always_inline)) {
    constexpr int S = decltype(set)::value % R::sets;
    tiles.multiply_add<R::at(0, 0, S), kRowTiles, kLaneTiles>();
    if constexpr (Rows == 2) tiles.multiply_add<R::at(1, 0, S), kRowTiles + 1, kLaneTiles>();
    if constexpr (Cols == 2) tiles.multiply_add<R::at(0, 1, S), kRowTiles, kLaneTiles + 1>();
    if constexpr (Rows == 2 && Cols == 2) tiles.multiply_add<R::at(1, 1, S), kRowTiles + 1, kLaneTiles + 1>();
    place();
    other();
  };
  for (int64_t k = 0; k < chunks; ++k) {
    load_rows(0);
    if constexpr (Parts == 1) {
      load_lanes(0);
      add(Constant<0>{});
    } else {
      // Every step exchanges one factor.
      load_lanes(2);
      add(Constant<0>{});
      load_lanes(0);
      add(Constant<1>{});
      load_lanes(1);
      add(Constant<0>{});
      load_rows(1);
      add(Constant<1>{});
      load_lanes(0);
      add(Constant<0>{});
      load_rows(2);
      add(Constant<1>{});
    }
    f.rows.next();
    f.lanes.next();
  }
  place.finish();
  sums.template take<Rows, Cols>(tiles, block);
}

template <class Product, class Other>
void multiply_block(TileRegisters& tiles, const Factors& f, int64_t chunks, const TileBlock& b, TileSums<Product>& sums,
                    Other& other) {
  auto run = [&](auto rows, auto cols) __attribute__((always_inline)) {
    multiply<Product, decltype(rows)::value, decltype(cols)::value>(tiles, f, chunks, b, sums, other);
  };
  if (b.cols == 2)
    b.rows == 2 ? run(Constant<2>{}, Constant<2>{}) : run(Constant<1>{}, Constant<2>{});
  else
    b.rows == 2 ? run(Constant<2>{}, Constant<1>{}) : run(Constant<1>{}, Constant<1>{});
}

// Two tiles, or the last one, of `count` rows in tiles of `size`, where one that would be cut off begins earlier, and
// some sums are computed twice.
FIF_INLINE int pair_of(int64_t i, int64_t size, int64_t count, int64_t (&at)[2]) {
  at[0] = min_of(i, count - size);
  at[1] = min_of(i + size, count - size);
  return i + size < count ? 2 : 1;
}

FIF_INLINE VecF upper_halves(VecF v) { return (VecF)((VecU)v & 0xffff0000u); }

// Pairs in parts, from the numbers that come first in each and those that come second.
FIF_INLINE void store_parts(VecF first, VecF second, bf16* to) {
  FIF_UNROLL for (int q = 0; q < kParts; ++q) {
    const VecF f = upper_halves(first), s = upper_halves(second);
    _mm512_storeu_si512(to + q * kTileNumbers, (__m512i)((VecU)first >> 16 | (VecU)s));
    first -= f;
    second -= s;
  }
}

// Where factors lie that are taken apart as they are needed: slots of two tiles for a chunk each, one more than there
// are chunks. While a chunk is multiplied for the last time, the next block's same chunk goes to the free slot.
class Ring {
 public:
  Ring(bf16* memory, int64_t chunks)
      : begin_(memory), end_(memory + (chunks + 1) * kSlot), now_(memory), free_(memory) {}
  bf16* take() {
    bf16* const slot = free_;
    free_ = after(free_, 1);
    return slot;
  }
  // From chunk 0 of the block that comes next.
  TileStream stream() const { return {{now_, now_ + kTile}, kSlot, end_, end_ - begin_}; }
  void advance(int64_t chunks) { now_ = after(now_, chunks); }

 private:
  static constexpr int64_t kTile = kParts * kTileNumbers, kSlot = 2 * kTile;
  bf16* after(bf16* at, int64_t slots) const {
    at += slots * kSlot;
    return at < end_ ? at : at - (end_ - begin_);
  }
  bf16* const begin_;
  bf16* const end_;
  bf16 *now_, *free_;
};

// Takes rows apart. Tasks go over the chunks, and for each over the lines of two tiles.
class RowParts {
  const PartsProduct& g;
  Ring& ring;
  const int64_t size, half;  // rows of a tile, pairs of a chunk
  const Mask low, high;      // of a segment's last chunk
  const float* row[2 * kTileSide];
  int64_t left = 0, chunk = 0, line = 0, lines = 0, offset = 0;  // chunks left; done of a segment
  bf16* to = nullptr;

 public:
  RowParts(const PartsProduct& product, Ring& ring, int64_t size)
      : g(product), ring(ring), size(size), half(g.chunks.size / 2),
        low(first_lanes(min_of(half, g.chunks.numbers(g.chunks.each - 1)))),
        high(first_lanes(max_of<int64_t>(0, g.chunks.numbers(g.chunks.each - 1) - half))) {}

  // For the rows of a block; the number of tasks.
  int64_t start(const TileBlock& b) {
    for (int t = 0; t < b.rows; ++t) {
      const float* at = g.row(b.row[t]);
      int64_t column = b.row[t] % g.line;
      for (int64_t i = 0; i < size; ++i, at += g.a_row) {
        if (column++ == g.line) {
          column = 1;
          at += g.a_line - g.line * g.a_row;
        }
        row[t * kTileSide + i] = at;
      }
    }
    for (int64_t i = size; i < kTileSide; ++i) row[i] = row[kTileSide + i] = row[0];
    lines = b.rows * kTileSide;
    chunk = line = offset = 0;
    left = g.chunks.count();
    to = ring.take();
    return left * (lines / kLines);
  }
  __attribute__((noinline)) void run() {
    const float* const* from = row + line;
    const int64_t first = offset, second = offset + half;
    bf16* const out = to + line / kTileSide * kParts * kTileNumbers + line % kTileSide * kTileDepth;
    // What lies beyond a chunk's pairs no product reads; beyond a segment it may not be there.
    if (chunk + 1 < g.chunks.each) {
      FIF_UNROLL for (int i = 0; i < kLines; ++i)
          store_parts(load(from[i] + first), load(from[i] + second), out + i * kTileDepth);
    } else {
      const Mask l = low, h = high;
      FIF_UNROLL for (int i = 0; i < kLines; ++i)
          store_parts(load(from[i] + first, l), load(from[i] + second, h), out + i * kTileDepth);
    }
    line += kLines;
    if (line == lines) next_chunk();
  }

 private:
  void next_chunk() {
    line = 0;
    offset += g.chunks.size;
    if (++chunk == g.chunks.each) {
      chunk = 0;
      offset += g.a_segment - g.chunks.each * g.chunks.size;
    }
    if (--left > 0) to = ring.take();
  }
};

// Takes planes apart. Tasks go over the chunks, and for each over the lines of two tiles.
class PlaneParts {
  const PlanarPartsProduct& g;
  Ring& ring;
  const int64_t half;  // pairs of a chunk
  const float* from[2] = {};
  Mask lanes[2] = {};
  int64_t line = 0, lines = 0, left = 0;  // numbers left of the depth
  bf16* to = nullptr;

 public:
  PlaneParts(const PlanarPartsProduct& product, Ring& ring, int64_t)
      : g(product), ring(ring), half(g.chunks.size / 2) {}

  int64_t start(const TileBlock& b) {
    for (int t = 0; t < b.cols; ++t) {
      from[t] = g.b + b.col[t];
      lanes[t] = first_lanes(g.to.cols - b.col[t]);
    }
    line = 0;
    lines = b.cols * kTileSide;
    left = g.chunks.depth;
    to = ring.take();
    return g.chunks.count() * (lines / kLines);
  }
  __attribute__((noinline)) void run() {
    const int64_t tile = line / kTileSide, at = line % kTileSide, step = g.b_k;
    const Mask all = lanes[tile];
    const float *first = from[tile] + at * step, *second = first + half * step;
    bf16* const out = to + tile * kParts * kTileNumbers + at * kTileDepth;
    // Of the pairs from this line on, so many have a first and a second number.
    const int64_t firsts = min_of(half, left) - at, seconds = min_of(half, left - half) - at;
    if (seconds >= kLines) {
      FIF_UNROLL for (int i = 0; i < kLines; ++i)
          store_parts(load(first + i * step, all), load(second + i * step, all), out + i * kTileDepth);
    } else {
      for (int i = 0; i < min_of<int64_t>(kLines, half - at); ++i)
        store_parts(i < firsts ? load(first + i * step, all) : VecF{},
                    i < seconds ? load(second + i * step, all) : VecF{}, out + i * kTileDepth);
    }
    line += kLines;
    if (line < lines) return;
    line = 0;
    left -= g.chunks.size;
    if (left <= 0) return;
    from[0] += g.chunks.size * step;
    from[1] += g.chunks.size * step;
    to = ring.take();
  }
};

}  // namespace

void take_rows_apart(const float* rows, int64_t count, const PartChunks& chunks, int64_t tile_rows, bf16* to) {
  const int64_t half = chunks.size / 2;
  memset(to, 0, ceil_div(count, tile_rows) * chunks.stream() * sizeof *to);
  for (int64_t i = 0; i < count; ++i, rows += chunks.depth)
    for (int64_t k = 0; k < chunks.count(); ++k) {
      const float* from = rows + chunks.begin(k);
      const int64_t numbers = chunks.numbers(k);
      store_parts(load(from, first_lanes(min_of(half, numbers))),
                  load(from + half, first_lanes(max_of<int64_t>(0, numbers - half))),
                  to + i / tile_rows * chunks.stream() + k * kParts * kTileNumbers + i % tile_rows * kTileDepth);
    }
}

void gemm(const TileProduct& g, TileRegisters& tiles) {
  const int64_t size = even_block(g.to.rows, kTileSide), numbers = g.chunk * kTileSide, stream = g.chunks * numbers;
  tiles.shape(TileShapes(static_cast<int>(size), static_cast<int>(g.chunk)));
  TileSums<TileProduct> sums(g, static_cast<int>(size));
  auto nothing = []() __attribute__((always_inline)) {};
  for (int64_t i = 0; i < g.to.rows; i += 2 * size)
    for (int64_t j = 0; j < g.to.cols; j += 2 * kTileSide) {
      TileBlock b{.col = {j, j + kTileSide}, .cols = j + kTileSide < g.to.cols ? 2 : 1};
      b.rows = pair_of(i, size, g.to.rows, b.row);
      const bf16* lanes = g.b + j / kTileSide * stream;
      multiply_block(tiles,
                     Factors{.rows = {{g.a + b.row[0] * g.a_row, g.a + b.row[1] * g.a_row}, g.chunk},
                             .row_bytes = g.a_row * 2,
                             .lanes = {{lanes, lanes + stream}, numbers}},
                     g.chunks, b, sums, nothing);
    }
  sums.finish();
}

namespace {

// Walks over the factor that is taken apart on the way, two tiles at a time, and for each over the constant one. With
// Work = RowParts the former are rows, with PlaneParts lanes.
template <class Work, class Product>
void multiply_in_parts(const Product& g, TileRegisters& tiles, const bf16* constants, int64_t size) {
  constexpr bool kTakesRows = std::is_same_v<Work, RowParts>;
  const int64_t chunks = g.chunks.count(), stream = g.chunks.stream();
  tiles.shape(TileShapes(static_cast<int>(size), static_cast<int>(g.chunks.size)));
  TileSums<Product> sums(g, static_cast<int>(size));
  Ring ring(g.buffer, chunks);
  Work parts(g, ring, size);
  Ahead ahead(parts), nothing(parts);
  auto set_rows = [&](TileBlock& b, int64_t i) {
    if constexpr (kTakesRows) {
      b.rows = pair_of(i, size, g.to.rows, b.row);
    } else {  // the constants' tiles lie where they lie
      b.row[0] = i;
      b.row[1] = i + size;
      b.rows = b.row[1] < g.to.rows ? 2 : 1;
    }
  };
  auto set_lanes = [&](TileBlock& b, int64_t j) {
    b.col[0] = j;
    b.col[1] = j + kTileSide;
    b.cols = b.col[1] < g.to.cols ? 2 : 1;
  };
  auto taken = [&](int64_t i) {
    TileBlock b;
    kTakesRows ? set_rows(b, i) : set_lanes(b, i);
    return b;
  };
  const int64_t row_step = 2 * size, lane_step = 2 * kTileSide;
  const int64_t taken_step = kTakesRows ? row_step : lane_step, taken_count = kTakesRows ? g.to.rows : g.to.cols;
  const int64_t other_step = kTakesRows ? lane_step : row_step, other_count = kTakesRows ? g.to.cols : g.to.rows;
  ahead.start(parts.start(taken(0)), 1);
  for (int64_t i = 0; i < taken_count; i += taken_step) {
    ahead.finish();
    TileBlock b = taken(i);
    const int64_t next = i + taken_step;
    for (int64_t j = 0; j < other_count; j += other_step) {
      kTakesRows ? set_lanes(b, j) : set_rows(b, j);
      const bool last = j + other_step >= other_count;
      if (last && next < taken_count) ahead.start(parts.start(taken(next)), kSteps * chunks);
      const bf16* other = constants + j / (other_step / 2) * stream;
      const TileStream on_the_way = ring.stream(), constant{{other, other + stream}, kParts * kTileNumbers};
      multiply_block(tiles,
                     Factors{.rows = kTakesRows ? on_the_way : constant,
                             .row_bytes = kTileBytes,
                             .lanes = kTakesRows ? constant : on_the_way},
                     chunks, b, sums, last ? ahead : nothing);
    }
    ring.advance(chunks);
  }
  sums.finish();
}

}  // namespace

void gemm(const PartsProduct& g, TileRegisters& tiles) {
  multiply_in_parts<RowParts>(g, tiles, g.b, even_block(g.to.rows, kTileSide));
}

void gemm(const PlanarPartsProduct& g, TileRegisters& tiles) {
  multiply_in_parts<PlaneParts>(g, tiles, g.a, g.tile_rows);
}
#endif

}  // namespace fif::FIF_ISA
