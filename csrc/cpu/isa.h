// The instruction sets the kernels are compiled for, each in a file of its own: isa_<name>.cpp.
#pragma once

#include "kernels.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define FSSA_X86_KERNELS 1
#endif

namespace fssa::cpu {

const Kernels& kernels_portable();
#ifdef FSSA_X86_KERNELS
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();
#endif

}  // namespace fssa::cpu
