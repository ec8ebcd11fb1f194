// How rows in shared memory become the matrix instruction's operands.
//
// A product over k does not depend on the order of k, as long as both sides take the same one. So a
// lane (g = lane / 4, c = lane % 4) reads 16 bytes at once, the numbers k = 8c .. 8c + 7 of 32 in
// row g, and uses them as columns (2c, 2c + 1, 2c + 8, 2c + 9) of two products over 16. That needs
// neither ldmatrix nor a swizzle.
#pragma once

#include "layout.h"
#include "platform.cuh"

namespace fssa::cuda {

// Sixteen rows (a of the instruction) and eight (b), 32 numbers of k each, as one lane holds them.
struct Left {
  Words4 low;   // row g
  Words4 high;  // row g + 8
};

using Right = Words4;

FSSA_DEVICE Words4 read_words(const char* shared) {
  return *reinterpret_cast<const Words4*>(shared);
}

// sum [16 rows of left, 8 rows of right] += left right^T over 32 numbers of k.
template <typename T>
FSSA_DEVICE void multiply_add_rows(float (&sum)[4], const Left& left, const Right& right) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t a[4] = {left.low.word[2 * half], left.high.word[2 * half],
                           left.low.word[2 * half + 1], left.high.word[2 * half + 1]};
    const uint32_t b[2] = {right.word[2 * half], right.word[2 * half + 1]};
    multiply_add<T>(sum, a, b);
  }
}

}  // namespace fssa::cuda
