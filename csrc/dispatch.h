// Picks one instruction-set variant of the CPU kernels for this processor.
#pragma once

#include "problem.h"

namespace fif {

// The variants that were built and that this processor runs, best last; null-terminated.
const Kernels* const* available_kernels();

// The variant in use: the one that FIF_OPS_CPU_ISA names, or the best. Decided at the first call. Null, with a reason
// in `error`, if the variable names one that is not available.
const Kernels* chosen_kernels(const char** error);

}  // namespace fif
