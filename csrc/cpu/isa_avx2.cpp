// The kernels for x86-64 with AVX2 and FMA.
#include "isa_prologue.h"

#ifdef FSSA_X86_KERNELS
FSSA_TARGET("avx2,fma,prfchw")

#define FSSA_ISA isa_avx2

namespace fssa::cpu {
#include "vec_avx2.h"
#include "isa.inl"
FSSA_KERNELS(avx2)
}  // namespace fssa::cpu

FSSA_TARGET_END
#endif
