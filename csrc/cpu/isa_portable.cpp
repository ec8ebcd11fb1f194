// The kernels for any machine.
#include "isa_prologue.h"

#define FSSA_ISA isa_portable

namespace fssa::cpu {
#include "vec_portable.h"
#include "isa.inl"
FSSA_KERNELS(portable)
}  // namespace fssa::cpu
