// y = x W^T + b + low-rank term chosen per row, on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/dtype.h"

namespace fssa::cpu {

enum class Family : int { kNone = 0, kStatic = 1, kGated = 2, kCore = 3, kFactors = 4 };
enum class Epilogue : int { kNone = 0, kSiluMul = 1, kGeluTanhMul = 2 };

// A matrix whose last dimension is contiguous; strides count elements.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;       // from row to row
  int64_t user_stride = 0;  // from user to user: factors only
};

struct ModulatedLinearArgs {
  void* y = nullptr;  // [T,N], or [T,N/2] with an epilogue; contiguous, of x's dtype
  Matrix x;           // [T,K]
  Matrix weight;      // [N,K]
  Matrix bias;        // [N], or no data
  Matrix lora_a;      // [S*R,K], factors [U,S*R,K]
  Matrix lora_b;      // [N,R], factors [U,N,R]
  Matrix rows;        // [U,S*R] or [U,S,R,R], a user's part contiguous
  const int32_t* slots = nullptr;  // [T]
  int64_t num_tokens = 0;
  int64_t in_features = 0;
  int64_t rank = 0;
  int64_t num_users = 0;
  std::vector<int64_t> splits;  // sizes of the stacked projections, sum N
  Family family = Family::kNone;
  Epilogue epilogue = Epilogue::kNone;
  int num_threads = 1;
};

// Accumulates in fp32 and rounds to y's dtype once, after the epilogue. Row t of y depends on row t
// of x, on slots[t] and on the parameters only, to the bit, whatever the number of tokens or
// threads. Throws std::invalid_argument for a slot outside [0, num_users), before writing.
void modulated_linear(const ModulatedLinearArgs& args);

}  // namespace fssa::cpu
