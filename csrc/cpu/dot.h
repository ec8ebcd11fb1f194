// Dot products of one fp32 vector with rows of a stored matrix, in the best instruction set of the
// machine the process runs on.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fssa::cpu {

// out[c] = sum_k x[k] * w[c * stride + k] for c in [0, columns), accumulated in fp32.
//
// The order of the additions depends on k alone, and columns are grouped from the first one on, so
// equal arguments give equal bits whoever else is being computed.
void dot_columns(const float* x, const void* w, DType dtype, int64_t stride, int64_t k,
                 int64_t columns, float* out);

// "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace fssa::cpu
