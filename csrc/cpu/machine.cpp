#include "machine.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fssa::cpu {

int64_t first_cache_bytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    const long known = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    if (known > 0) return static_cast<int64_t>(known);
#endif
    return int64_t{32 * 1024};
  }();
  return bytes;
}

}  // namespace fssa::cpu
