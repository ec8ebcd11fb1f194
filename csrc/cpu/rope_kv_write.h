// Optional RMS norm of every head of q and k, rotary positions, and the write of k and v into the
// paged cache.
#pragma once

#include <cstdint>

#include "call.h"

namespace fssa::cpu {

// [T, heads, D]: strides in elements, the last dimension contiguous.
struct Heads {
  const void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

constexpr int64_t kMaxNormedHead = 1024;  // D at most where there is a norm

// Weight [D] of a norm over a head, or no data.
struct HeadNorm {
  const void* weight = nullptr;
  DType dtype = DType::kFloat32;
};

struct RopeCall final : Call {
  void* rotated = nullptr;  // [T,H,D] contiguous
  Heads q;                  // [T,H,D]
  Heads k;                  // [T,Hkv,D]
  Heads v;
  void* k_cache = nullptr;  // [num_pages * P, Hkv, D] contiguous
  void* v_cache = nullptr;
  DType dtype = DType::kFloat32;  // of the above
  HeadNorm q_norm;
  HeadNorm k_norm;
  float eps = 0.0f;            // of both norms
  float weight_offset = 0.0f;
  const float* cos_sin = nullptr;  // [max_positions, rotary_dim]
  const int32_t* positions = nullptr;
  const int32_t* kv_slots = nullptr;  // page * P + offset; -1: not stored
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;
  int64_t num_positions = 0;
  int64_t num_kv_slots = 0;
  RowCount count;

  void check() const override;
  std::vector<int64_t> check_key() const override;
  void run(Team& team) const override;
};

}  // namespace fssa::cpu
