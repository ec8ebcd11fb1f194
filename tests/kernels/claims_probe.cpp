// Claims the lines that a tile of csrc/cpu stores to. On standard input: rows of the tile, its first row,
// rows of the product, bytes from the beginning of a line to the result, numbers from row to row, bytes of
// a number, whether two halves are multiplied into one, and for both halves the first column and how many
// columns there are. Prints the places that were written, then a dash and those asked for, to write, as
// bytes from the beginning of the result; afterwards all of it is as it was but for zeros.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "isa_prologue.h"
#include "kernels.h"

namespace {

std::vector<uintptr_t> asked;

void ask(const void* p, int writes, int) {
  if (writes) asked.push_back(reinterpret_cast<uintptr_t>(p));
}

}  // namespace

#define __builtin_prefetch ask
#define FSSA_ISA probed
namespace fssa::cpu {
#include "vec_portable.h"
#include "math.inl"
#include "ahead.inl"
#include "exchange.inl"
#include "multiply.inl"
#include "low_rank.inl"
#include "panel_reads.inl"
#include "modulated_linear.inl"

int64_t first_cache_bytes() { return 48 * 1024; }
const Kernels& kernels() { std::abort(); }
void ModulatedLinearCall::check() const {}
std::vector<int64_t> ModulatedLinearCall::check_key() const { return {}; }
void ModulatedLinearCall::run(Team&) const {}
FirstReads ModulatedLinearCall::first_reads(const Team&) const { return {}; }

namespace probed {

template <int kRows>
void own(int64_t rows, const ModulatedLinearCall& call, int64_t first) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return own<kRows - 1>(rows, call, first);
  }
  own_stored<kRows>(call, first, 0);
}

}  // namespace probed
}  // namespace fssa::cpu

int main() {
  using namespace fssa::cpu;
  long rows, first, count, offset, stride, size, is_pair, column[2], valid[2];
  if (std::scanf("%ld %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld", &rows, &first, &count, &offset, &stride,
                 &size, &is_pair, column, valid, column + 1, valid + 1) != 11 ||
      rows > probed::kMaxRows) {
    return 1;
  }
  Half halves[2];
  for (int h = 0; h < 2; ++h) {
    halves[h] = {0, static_cast<int32_t>(column[h]), static_cast<int32_t>(valid[h]), 0};
  }
  const size_t bytes = count * stride * size;
  const size_t whole = (offset + bytes + 127) / 64 * 64;
  char* const memory = static_cast<char*>(std::aligned_alloc(64, whole));
  std::memset(memory, 0xff, whole);
  ModulatedLinearCall call;
  call.y = memory + offset;
  call.y_stride = stride;
  call.y_dtype = size == 4 ? fssa::DType::kFloat32 : fssa::DType::kBFloat16;
  call.halves = halves;
  call.num_halves = 2;
  call.epilogue = is_pair ? Epilogue::kSiluMul : Epilogue::kNone;
  call.count.fixed = count;
  probed::own<probed::kMaxRows>(rows, call, first);
  for (size_t i = 0; i < whole; ++i) {
    if (memory[i] == 0) std::printf("%ld ", static_cast<long>(i) - offset);
    if (memory[i] != 0 && memory[i] != '\xff') return 2;
  }
  std::printf("-");
  for (uintptr_t place : asked) {
    std::printf(" %ld", static_cast<long>(place - reinterpret_cast<uintptr_t>(call.y)));
  }
  std::free(memory);
  return 0;
}
