// A hash of the content of parameters, which tells whether what was packed from them still holds. See kept.h.
#pragma once

#include "vec.h"

namespace fif::FIF_ISA {

// Two sums over everything, of the words and of the sums so far: any one word that changes shows in the first, words
// that change places in the second.
class ContentHash {
 public:
  void add(const void* values, int64_t bytes) {
    const char* at = static_cast<const char*>(values);
    if (!at) {
      add(VecU{} + 1u);
      return;
    }
    for (; bytes >= kVectorBytes; bytes -= kVectorBytes, at += kVectorBytes)
      add(*(const VectorOf<uint32_t, kVectorBytes>::unaligned*)at);
    VecU rest{};
    memcpy(&rest, at, bytes);
    add(rest);
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
    for (int i = 0; i < kVectorBytes / 4; ++i) mix(uint64_t(sums_[i]) << 32 | words_[i]);
    for (int i = 0; i < count; ++i) mix(numbers[i]);
  }

 private:
  FIF_INLINE void add(VecU v) {
    words_ += v;
    sums_ += words_;
  }
  VecU words_{}, sums_{};
};

}  // namespace fif::FIF_ISA
