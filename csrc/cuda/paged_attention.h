// Attention of single queries over a paged cache of keys and values: what a launch is made of. No
// device code, no torch.
//
// A block takes one row of q, the heads that share a KV head, and every num_parts-th split of
// kKeysPerSplit positions, counted from position 0. Each split has a softmax of its own. Splits are
// merged one after another: by the block if it has all of them, else, from scratch memory, by the
// last of the blocks to come. Both do the same operations in the same order, so a row's bits depend
// on its query and its keys alone, not on the batch or on how the work was shared.
#pragma once

#include <cmath>
#include <cstdint>

#include "layout.h"

namespace fssa::cuda {

constexpr int kMaxQueries = 256;
constexpr int kMaxGroup = 16;
constexpr int kKeysPerSplit = 128;
constexpr int kAttentionWarps = 4;

struct AttentionShape {
  int num_tokens;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int max_keys;  // that the block tables have room for
};

// Where everything lies in a block's shared memory, in bytes.
struct AttentionLayout {
  int key_bytes;    // of a row of keys
  int value_pitch;  // bytes from value to value, whose lanes lie in different banks
  int values, weights, weights_pitch, scores, scores_pitch, places, state, total;
};

struct AttentionPlan {
  int group;       // heads that share a KV head
  int head_tiles;  // of eight
  int num_splits;
  int num_parts;
  int threads;
  AttentionLayout shared;
  int64_t num_partials;  // of D + 2 floats
};

// Throws std::invalid_argument naming the limit that the shape or the device does not keep.
AttentionPlan plan_attention(const DeviceLimits& device, const AttentionShape& shape);

// A softmax over some keys: its largest score (a power of two), the sum of its weights.
struct SoftmaxState {
  float peak;
  float total;
};

// How much sums so far and those of one more split count in both together. Of a split of which the
// row sees nothing that is exactly 1 and 0.
struct MergeFactors {
  float before;
  float more;
};

FSSA_HOST_DEVICE MergeFactors merge(SoftmaxState& state, float peak, float total) {
  const float top = fmaxf(state.peak, peak);
  const float base = top == -INFINITY ? 0.0f : top;
  const MergeFactors factors{exp2f(state.peak - base), exp2f(peak - base)};
  state.total = fmaf(state.total, factors.before, total * factors.more);
  state.peak = top;
  return factors;
}

FSSA_HOST_DEVICE float merged(float before, float more, const MergeFactors& factors) {
  return fmaf(before, factors.before, more * factors.more);
}

// Strides count elements.
struct AttentionArguments {
  void* out;  // [T, H, D]
  float* partial;  // [num_partials, D], then their peaks, then their totals
  int* counters;   // zero, one for each row and KV head, and left zero
  const void* q;
  const void* k_cache;
  const void* v_cache;
  const int32_t* block_tables;
  const int32_t* kv_lens;
  const int32_t* q_indptr;
  int64_t stride_q, stride_q_head;
  int64_t stride_k_page, stride_k, stride_k_head;
  int64_t stride_v_page, stride_v, stride_v_head;
  int64_t stride_table;
  int num_tokens, batch, num_heads, num_kv_heads, num_pages, page_size, max_keys;
  int window;  // positions a query sees
  float log2_scale;
  AttentionPlan plan;
};

void launch_attention(const AttentionArguments& arguments, int head_dim, DType dtype,
                      uintptr_t stream);

}  // namespace fssa::cuda
