// Packed parameters, kept from one inference call to the next and found again by their content.
//
// To pack the weights of a unit on 7x7 maps takes a fifth of its time; to read them through once, a thirtieth. Since
// the content itself is the key, no write to a parameter, by whatever way, can leave a stale copy in use. Units with
// equal parameters share one. Compiled once, not per instruction set.
#pragma once

#include <cstdint>

namespace fif {

struct KeptKey {
  uint64_t content[2];  // of all that was packed
  int64_t numbers[7];   // sizes and options that the packing depends on
};

class Kept {
 public:
  // What was published under the key, or else fresh memory for it, aligned to 64 bytes. Throws std::bad_alloc.
  Kept(const KeptKey& key, int64_t bytes);
  ~Kept();
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;

  // Hands fresh memory, once it is filled, to later calls of any thread. At most 256 MiB are kept.
  void publish();

  void* data;
  bool fresh;

 private:
  struct Entry;
  struct Store;
  Entry* entry_;
};

}  // namespace fif
