#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fif {

#define FIF_DECLARE(isa)                                                     \
  namespace isa {                                                            \
  void infer(const Problem&, const InferArgs&, const Threads&);              \
  void train(const Problem&, const TrainArgs&, const Threads&);              \
  void backward(const Problem&, const BackwardArgs&, const Threads&);        \
  int64_t packed_bytes(const Problem&);                                      \
  void pack(const Problem&, const InferArgs&, void*);                        \
  void pool(const Problem&, const InferArgs&, const Threads&);               \
  uint64_t fingerprint(const void* const*, const int64_t*, int64_t);         \
  void strided_train(const Problem&, const StridedArgs&, const Threads&);    \
  void strided_backward(const Problem&, const StridedArgs&, const Threads&); \
  }
// One that trains with the kernels of another, which setup.py knows too: it adds nothing to them.
#define FIF_VARIANT(isa, training)                                                         \
  FIF_DECLARE(isa)                                                                         \
  static const Kernels isa##_kernels{                                                      \
      #isa,      isa::infer, training::train,  training::backward,      isa::packed_bytes, \
      isa::pack, isa::pool,  isa::fingerprint, training::strided_train, training::strided_backward};

FIF_VARIANT(baseline, baseline)
#if defined(__x86_64__)
#if defined(FIF_SANITIZED)
FIF_VARIANT(amx, amx)
#else
FIF_VARIANT(avx2, avx2)
FIF_VARIANT(avx512, avx512)
FIF_VARIANT(avx512bf16, avx512)
FIF_VARIANT(amx, avx512)
#endif
#endif
#undef FIF_VARIANT
#undef FIF_DECLARE

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tiles want the system's leave, for a process as a whole: Linux saves their eight kibibytes only for those that ask.
bool has_amx() {
  if (!has_avx512bf16()) return false;
#if defined(FIF_SANITIZED)
  return true;
#else
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; of the states that xsave knows
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

struct Available {
  const Kernels* list[6] = {&baseline_kernels};
  Available() {
#if defined(__x86_64__)
    int n = 1;
#if !defined(FIF_SANITIZED)
    if (has_avx2()) list[n++] = &avx2_kernels;
    if (has_avx512()) list[n++] = &avx512_kernels;
    if (has_avx512bf16()) list[n++] = &avx512bf16_kernels;
#endif
    if (has_amx()) list[n++] = &amx_kernels;
#endif
  }
};

struct Choice {
  const Kernels* kernels = nullptr;
  std::string error;
  Choice() {
    const char* wanted = std::getenv("FIF_OPS_CPU_ISA");
    std::string names;
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
      if (!wanted || !*wanted || std::strcmp(wanted, (*k)->name) == 0) kernels = *k;
      names += (names.empty() ? "" : ", ") + std::string((*k)->name);
    }
    if (!kernels)
      error =
          "FIF_OPS_CPU_ISA is '" + std::string(wanted) + "': must be one of " + names + " on this processor, or unset";
  }
};

}  // namespace

const Kernels* const* available_kernels() {
  static const Available available;
  return available.list;
}

const Kernels* chosen_kernels(const char** error) {
  static const Choice choice;
  *error = choice.error.c_str();
  return choice.kernels;
}

}  // namespace fif
