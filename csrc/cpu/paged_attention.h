// Causal attention of each request's newest tokens over its cached keys and values.
#pragma once

#include <cstdint>

#include "call.h"

namespace fssa::cpu {

constexpr int64_t kKeyBlock = 64;   // keys whose softmax is taken at once, in four times 16 lanes
constexpr int64_t kQueryRows = 96;  // query tokens x heads of one piece of work at most

struct AttentionCall final : Call {
  void* out = nullptr;     // [T,H,D] contiguous
  const void* q = nullptr;  // [T,H,D]
  int64_t q_token_stride = 0;
  int64_t q_head_stride = 0;
  const void* k_cache = nullptr;  // [num_pages,P,Hkv,D] contiguous
  const void* v_cache = nullptr;
  DType dtype = DType::kFloat32;  // of the above
  const int32_t* block_tables = nullptr;  // [B,max_pages]
  int64_t block_stride = 0;
  const int32_t* kv_lens = nullptr;   // [B]
  const int32_t* q_indptr = nullptr;  // [B+1]
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int64_t max_pages = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;
  int64_t window = 0;      // 0: all
  float* scratch = nullptr;  // thread_scratch() floats for each thread
  RowCount num_tokens;
  RowCount num_sequences;

  static int64_t thread_scratch(int64_t head_dim);
  void check() const override;
  std::vector<int64_t> check_key() const override;
  void run(Team& team) const override;
};

}  // namespace fssa::cpu
