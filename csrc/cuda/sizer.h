// Host side of the launches: the size of what a kernel carves, and the choice of its template.
#pragma once

#include "../problem.h"
#include "device.h"

namespace fif::gpu {

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

template <class Carve>
int bytes_of(Carve carve) {
  Sizer sizer;
  carve(sizer);
  return sizer.layout.bytes();
}

template <class T, bool Last>
struct Format {
  using type = T;
  static constexpr bool kLast = Last;
};

// f(Format) with the problem's element type and layout.
template <class F>
auto with_format(const Problem& p, F f) {
  const auto with_layout = [&](auto element) {
    using T = decltype(element);
    return p.channels_last ? f(Format<T, true>{}) : f(Format<T, false>{});
  };
  switch (p.dtype) {
    case Dtype::f32: return with_layout(float{});
    case Dtype::f16: return with_layout(__half{});
    default: return with_layout(__nv_bfloat16{});
  }
}

}  // namespace fif::gpu
