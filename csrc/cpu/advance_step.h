// From one decode step to the next: what was chosen becomes what is computed, with no one asked.
#pragma once

#include <cstdint>

#include "call.h"

namespace fssa::cpu {

// [B, width], rows apart by `stride` elements.
template <typename T>
struct PerRow {
  T* data = nullptr;
  int64_t stride = 0;
  int64_t width = 0;

  T* row(int64_t b) const { return data + b * stride; }
};

struct AdvanceCall final : Call {
  const int32_t* chosen = nullptr;  // [B]
  const float* logprobs = nullptr;  // [B]
  int32_t* tokens = nullptr;        // [B], as the step reads them
  int32_t* positions = nullptr;     // [B]
  int32_t* kv_slots = nullptr;      // [B], page * P + offset; -1: not stored
  int32_t* kv_lens = nullptr;       // [B]
  float* uniform = nullptr;         // [B]
  PerRow<const int32_t> block_tables;  // pages
  PerRow<const float> draws;           // by step
  PerRow<const int32_t> stop_tokens;   // -1: none
  int32_t* num_done = nullptr;         // [B], steps
  PerRow<int32_t> log_tokens;          // by step
  PerRow<float> log_logprobs;          // by step
  int32_t* ended = nullptr;            // [B]
  int64_t page_size = 0;
  RowCount count;

  // Rows whose numbers make no sense are left as they are.
  void check() const override {}
  std::vector<int64_t> check_key() const override { return {}; }
  void run(Team& team) const override;

 private:
  void advance(int64_t b) const;
};

}  // namespace fssa::cpu
