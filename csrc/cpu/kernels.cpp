#include "kernels.h"

#include <atomic>
#include <stdexcept>

#include "isa.h"

namespace fssa::cpu {
namespace {

#ifdef FSSA_X86_KERNELS
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#ifdef FSSA_EMULATE_AVX512
bool has_avx512() { return true; }
bool has_avx512bf16() { return true; }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#ifdef FSSA_X86_KERNELS
  __builtin_cpu_init();
  if (has_avx512bf16()) found.push_back(&kernels_avx512bf16());
  if (has_avx512()) found.push_back(&kernels_avx512());
  if (has_avx2()) found.push_back(&kernels_avx2());
#endif
  found.push_back(&kernels_portable());
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{supported().front()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* set : supported()) names.push_back(set->name);
  return names;
}

void set_instruction_set(const std::string& name) {
  std::string known;
  for (const Kernels* set : supported()) {
    if (name == set->name) {
      current().store(set);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("instruction set: expected one of " + known + ", got " + name);
}

}  // namespace fssa::cpu
