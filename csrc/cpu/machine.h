// What the kernels know of the machine, besides its instruction set.
#pragma once

#include <cstdint>

namespace fssa::cpu {

// Bytes of a core's first-level data cache; 32 KB where the system does not say.
int64_t first_cache_bytes();

}  // namespace fssa::cpu
