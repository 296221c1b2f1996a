// Large blocks of memory come fresh from the system at every call, since malloc hands them back when they are freed,
// and every page of them costs a fault: in small pages as much time as a training pass takes to fill them.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fif {

// Asks for pages of two mebibytes in what lies wholly inside the block; a refusal changes nothing.
[[maybe_unused]] static void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (bytes < int64_t(2 * kPage)) return;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (from < to) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace fif
