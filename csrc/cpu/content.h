// A hash of the content of parameters, which tells whether what was packed from them still holds. See kept.h.
#pragma once

#include "vec.h"

namespace fif::FIF_ISA {

// Every word is mixed into one of four accumulators by xor, rotation and multiplication, each of which can be undone:
// so a single word that changes always shows, and changes of several words do not cancel, as they would in sums (a new
// sign for every weight moves only the highest bits, which no sum and no product carries further).
class ContentHash {
 public:
  void add(const void* values, int64_t bytes) {
    const char* at = static_cast<const char*>(values);
    if (!at) return mix(0, VecU{} + 1u);
    for (; bytes >= kWays * kVectorBytes; bytes -= kWays * kVectorBytes, at += kWays * kVectorBytes)
      FIF_UNROLL for (int i = 0; i < kWays; ++i) mix(i, read(at + i * kVectorBytes));
    for (; bytes >= kVectorBytes; bytes -= kVectorBytes, at += kVectorBytes) mix(0, read(at));
    VecU rest{};
    memcpy(&rest, at, bytes);
    mix(1, rest);
  }
  // Of all that was added, and of the numbers.
  void finish(const int64_t* numbers, int count, uint64_t (&content)[2]) const {
    content[0] = 0x243f6a8885a308d3;
    content[1] = 0x13198a2e03707344;
    auto mix = [&](uint64_t value) {
      content[0] = (content[0] ^ value) * 0x9e3779b97f4a7c15;
      content[0] ^= content[0] >> 29;
      content[1] = (content[1] + value) * 0xc2b2ae3d27d4eb4f;
      content[1] ^= content[1] >> 31;
    };
    for (int way = 0; way < kWays; ++way)
      for (int i = 0; i < kVectorBytes / 4; ++i) mix(state_[way][i]);
    for (int i = 0; i < count; ++i) mix(numbers[i]);
  }

 private:
  static constexpr int kWays = 4;  // in turns, since each waits for its own last step
  static FIF_INLINE VecU read(const char* at) { return *(const VectorOf<uint32_t, kVectorBytes>::unaligned*)at; }
  FIF_INLINE void mix(int way, VecU v) {
    v ^= state_[way];
    state_[way] = (v << 15 | v >> 17) * 0x9e3779b1u;
  }
  VecU state_[kWays]{};
};

}  // namespace fif::FIF_ISA
