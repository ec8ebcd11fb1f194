// h = gamma * (residual + x) + beta, normed = h / rms(h) * (weight + offset).
#pragma once

#include <cstdint>

#include "call.h"

namespace fssa::cpu {

struct NormCall final : Call {
  void* normed = nullptr;    // [T,C]
  void* h = nullptr;         // [T,C]
  int64_t out_stride = 0;    // of both
  const void* x = nullptr;   // [T,C]
  int64_t x_stride = 0;
  const void* residual = nullptr;  // [T,C] or null
  int64_t residual_stride = 0;
  DType dtype = DType::kFloat32;   // of the above
  const void* weight = nullptr;    // [C]
  DType weight_dtype = DType::kFloat32;
  const void* film = nullptr;  // [U,2,C] or null, gamma then beta, a user's part contiguous
  DType film_dtype = DType::kFloat32;
  int64_t film_stride = 0;
  const int32_t* slots = nullptr;
  int64_t num_users = 0;
  int64_t channels = 0;
  float eps = 0.0f;
  float weight_offset = 0.0f;
  RowCount count;

  void check() const override;
  std::vector<int64_t> check_key() const override;
  void run(Team& team) const override;
};

}  // namespace fssa::cpu
