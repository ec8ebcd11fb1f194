// The kernels for x86-64 with AVX-512 F, BW, VL and DQ.
#define FSSA_USES_AVX512 1
#include "isa_prologue.h"

#ifdef FSSA_X86_KERNELS
FSSA_TARGET_AVX512("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prfchw")

#define FSSA_ISA isa_avx512

namespace fssa::cpu {
#include "vec_avx512.h"
#include "isa.inl"
FSSA_KERNELS(avx512)
}  // namespace fssa::cpu

FSSA_TARGET_END
#endif
