#include <algorithm>
#include <stdexcept>
#include <string>

#include "paged_attention.h"

namespace fssa::cuda {
namespace {

// Blocks wanted for each multiprocessor before splits stay within a block, and the scratch memory
// that sharing them out may take. Not measured.
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int64_t kMaxScratchBytes = int64_t{256} << 20;

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("paged_attention: " + what);
}

AttentionLayout lay_out(const AttentionShape& shape, int head_tiles) {
  AttentionLayout shared{};
  shared.key_bytes = round_up(2 * shape.head_dim, 128);
  // Sixteen bytes more than a multiple of 128: eight rows of a matrix lie in different banks.
  shared.value_pitch = 2 * shape.head_dim + 16;
  shared.weights_pitch = 2 * kKeysPerSplit + 16;
  shared.scores_pitch = kKeysPerSplit + 4;
  shared.values = rows_bytes(kKeysPerSplit, shared.key_bytes);
  shared.weights = shared.values + kKeysPerSplit * shared.value_pitch;
  shared.scores = shared.weights + 16 * shared.weights_pitch;
  shared.places = shared.scores + 4 * 8 * head_tiles * shared.scores_pitch;
  shared.state = shared.places + 16 * kKeysPerSplit;
  // The states of sixteen heads, and four words.
  shared.total = shared.state + 8 * 16 + 16;
  return shared;
}

}  // namespace

AttentionPlan plan_attention(const DeviceLimits& device, const AttentionShape& shape) {
  if (shape.num_tokens > kMaxQueries) {
    refuse("expected at most " + std::to_string(kMaxQueries) + " rows of q, got " +
           std::to_string(shape.num_tokens));
  }
  if (shape.head_dim != 64 && shape.head_dim != 128 && shape.head_dim != 256) {
    refuse("expected heads 64, 128 or 256 wide, got " + std::to_string(shape.head_dim));
  }
  AttentionPlan plan{};
  plan.group = shape.num_heads / shape.num_kv_heads;
  if (plan.group > kMaxGroup) {
    refuse("expected at most " + std::to_string(kMaxGroup) + " heads that share a KV head, got " +
           std::to_string(plan.group));
  }
  if (device.capability < 80) {
    refuse("expected a device of capability 8.0 or more, got sm_" +
           std::to_string(device.capability));
  }
  plan.head_tiles = divide_up(plan.group, 8);
  plan.threads = 32 * kAttentionWarps;
  plan.shared = lay_out(shape, plan.head_tiles);
  if (plan.shared.total > device.shared_bytes) {
    refuse("expected a device with " + std::to_string(plan.shared.total) +
           " bytes of shared memory for a block, got " + std::to_string(device.shared_bytes));
  }
  plan.num_splits = std::max(1, divide_up(shape.max_keys, kKeysPerSplit));
  const int64_t blocks = std::max<int64_t>(1, int64_t{shape.num_tokens} * shape.num_kv_heads);
  const int64_t wanted = (int64_t{kBlocksPerMultiprocessor} * device.num_sms + blocks - 1) / blocks;
  plan.num_parts =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, plan.num_splits)));
  plan.num_partials = int64_t{shape.num_tokens} * shape.num_heads * plan.num_splits;
  if (plan.num_partials * (shape.head_dim + 2) * 4 > kMaxScratchBytes) plan.num_parts = 1;
  if (plan.num_parts == 1) plan.num_partials = 0;
  return plan;
}

}  // namespace fssa::cuda
