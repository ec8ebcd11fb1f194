// The next token of every row of logits, and its log-probability.
#pragma once

#include <cstdint>

#include "call.h"

namespace fssa::cpu {

constexpr int64_t kSampleChunk = 4096;  // logits that one thread reduces at a time

// Of one chunk of logits: the largest, and sum exp(l - largest).
struct ChunkStats {
  float largest;
  float total;
};

struct SampleCall final : Call {
  int32_t* tokens = nullptr;  // [B]
  float* logprobs = nullptr;  // [B]
  const void* logits = nullptr;  // [B,V]
  int64_t stride = 0;
  DType dtype = DType::kFloat32;
  int64_t vocab_size = 0;
  const float* temperature = nullptr;  // [B], 0: the largest logit
  const int32_t* top_k = nullptr;      // [B], 0: off
  const float* top_p = nullptr;        // [B], 1: off
  const float* min_p = nullptr;        // [B], 0: off
  const float* uniform = nullptr;      // [B] in [0, 1)
  const int32_t* forced = nullptr;     // [B], -1: choose
  ChunkStats* stats = nullptr;         // [B, chunks] scratch
  float* weights = nullptr;            // [threads, V] scratch
  int32_t* kept = nullptr;             // [threads, V] scratch
  RowCount count;

  int64_t num_chunks() const { return (vocab_size + kSampleChunk - 1) / kSampleChunk; }
  void check() const override;
  std::vector<int64_t> check_key() const override;
  void run(Team& team) const override;
};

}  // namespace fssa::cpu
