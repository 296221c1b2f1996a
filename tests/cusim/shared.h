// Shared memory of the simulated block: fresh for every block, NaN until it is written, poisoned where there is none.
#pragma once

#include "machine.h"

namespace cusim {

// Fresh memory for a block: NaN in every number format, poisoned wherever the launch has none.
CUSIM_MACHINE inline void prepare_shared(size_t dynamic_bytes) {
  Shared& s = machine.cluster->shared;
  CUSIM_POISON(s.space, Shared::kSpace);
  s.dynamic = s.space + 1024 + 128;  // 128-byte aligned and no more
  s.statics = s.space + (1 << 19);
  s.arena = s.space + (1 << 20);
  s.dynamic_bytes = dynamic_bytes;
  s.arena_used = s.static_used = s.static_bytes = 0;
  s.known_count = 0;
  s.carved.clear();
  CUSIM_UNPOISON(s.dynamic, dynamic_bytes);
  fill(s.dynamic, 0xff, dynamic_bytes);
}

CUSIM_MACHINE inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(machine.cluster->shared.dynamic);
}

// The array at an offset of dynamic shared memory. Under AddressSanitizer each lies alone between poisoned gaps (and
// overlays do not overlap); otherwise at its true place, so that ThreadSanitizer sees overlays collide.
CUSIM_MACHINE inline void* carve_shared(unsigned char* base, int offset, size_t bytes, int align) {
  Shared& s = machine.cluster->shared;
  if (reinterpret_cast<char*>(base) != s.dynamic) fail("SharedArena: the base is not dynamic shared memory");
  if (align > 128 || (align & (align - 1)) != 0)
    fail("SharedArena: alignment %d, must be a power of 2 up to 128", align);
  if (offset + bytes > s.dynamic_bytes)
    fail("SharedArena: %zu bytes at offset %d, but the launch has %zu bytes of dynamic shared memory", bytes, offset,
         s.dynamic_bytes);
#if defined(__SANITIZE_ADDRESS__)
  CUSIM_POISON(s.dynamic, s.dynamic_bytes);
  char*& place = s.carved[{offset, bytes}];
  if (place == nullptr) {
    place = s.arena + s.arena_used + Shared::kGap + offset % 128;  // the banks stay what they are
    s.arena_used += Shared::kGap * 2 + (bytes + 127) / 128 * 128;
    if (s.arena + s.arena_used > s.space + Shared::kSpace) fail("SharedArena: too many different overlays");
    CUSIM_UNPOISON(place, bytes);
    fill(place, 0xff, bytes);
  }
  return place;
#else
  return base + offset;
#endif
}

CUSIM_MACHINE inline void* static_shared(const void* key, size_t bytes, size_t align) {
  Shared& s = machine.cluster->shared;
  for (int i = 0; i < s.known_count; i++)
    if (s.known[i].key == key) return s.known[i].memory;
  if (s.known_count == kMaxStatics) fail("over %d static shared objects", kMaxStatics);
  s.static_bytes = (s.static_bytes + align - 1) / align * align + bytes;
  if (s.static_bytes > 48 << 10) fail("%zu bytes of static shared memory, over 48 KiB", s.static_bytes);
  if (s.static_bytes + s.dynamic_bytes > size_t(machine.settings.device.shared_optin))
    fail("%zu static and %zu dynamic bytes of shared memory, over the device's %d", s.static_bytes, s.dynamic_bytes,
         machine.settings.device.shared_optin);
  char* memory =
      s.statics + s.static_used + Shared::kGap + (align < 16 ? align : 0);  // aligned no better than it must be
  s.static_used += Shared::kGap * 2 + (bytes + 127) / 128 * 128;
  s.known[s.known_count++] = {key, memory};
  CUSIM_UNPOISON(memory, bytes);
  fill(memory, 0xff, bytes);
  return memory;
}

CUSIM_MACHINE inline void check_shared(const void* p, int bytes, int align, const char* what) {
  const Shared& s = machine.cluster->shared;
  const char* c = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % align != 0)
    fail("%s: misaligned address, must be a multiple of %d", what, align);
  if (c < s.space || c >= s.space + Shared::kSpace) fail("%s: not an address in shared memory", what);
  bool inside = c >= s.dynamic && c + bytes <= s.dynamic + s.dynamic_bytes;
  inside |= c >= s.statics && c + bytes <= s.statics + s.static_used;
  inside |= c >= s.arena && c + bytes <= s.arena + s.arena_used;
  if (!inside) fail("%s: out of bounds of shared memory", what);
}

CUSIM_MACHINE inline void check_global(const void* p, int align, const char* what) {
  const Shared& s = machine.cluster->shared;
  const char* c = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % align != 0)
    fail("%s: misaligned address, must be a multiple of %d", what, align);
  if (c >= s.space && c < s.space + Shared::kSpace) fail("%s: a shared address where a global one belongs", what);
}

}  // namespace cusim
