// Device code of u = x A^T as each row's user sees it, where the product itself does not make it.
#pragma once

#include "modulated_linear.h"
#include "numbers.cuh"

namespace fssa::cuda {

// One row of x and one projection.
template <typename T>
FSSA_GLOBAL(kLowRankThreads, 1)
low_rank_kernel(const FSSA_GRID_CONSTANT LowRankArguments args) {
  float* sums = reinterpret_cast<float*>(shared_memory());  // [rank]
  const int token = block_x(), projection = block_y();
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int slot = args.slots == nullptr ? 0 : load(args.slots + token);
  const bool known = args.slots == nullptr || (slot >= 0 && slot < args.num_users);
  const T* x = static_cast<const T*>(args.x) + token * args.stride_x;
  const T* a = static_cast<const T*>(args.lora_a) +
               static_cast<int64_t>(projection) * args.rank * args.stride_a;
  if (args.family == Family::kFactors && known) a += slot * args.stride_a_user;
  for (int r = warp; r < args.rank; r += num_threads() / 32) {
    float total = 0.0f;
    if (known) {
      const T* row = a + r * args.stride_a;
#pragma unroll 4
      for (int k = 8 * lane; k < args.in_features; k += 256) {
        float left[8], right[8];
        unpack<T>(load_words(x + k), left);
        unpack<T>(load_words(row + k), right);
#pragma unroll
        for (int i = 0; i < 8; ++i) total = fmaf(left[i], right[i], total);
      }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    if (lane == 0) sums[r] = known ? total : not_a_number();
  }
  sync_block();
  float* low = args.low + token * args.stride_low + projection * args.rank;
  const int64_t state = slot * args.stride_rows;
  for (int r = thread_index(); r < args.rank; r += num_threads()) {
    float value = sums[r];
    if (args.family == Family::kGated && known) {
      value *= load_number<T>(args.rows, args.rows_is_float, state + projection * args.rank + r);
    } else if (args.family == Family::kCore && known) {
      const int64_t at = state + (static_cast<int64_t>(projection) * args.rank + r) * args.rank;
      value = 0.0f;
      for (int j = 0; j < args.rank; ++j) {
        value = fmaf(load_number<T>(args.rows, args.rows_is_float, at + j), sums[j], value);
      }
    }
    store(low + r, value);
  }
}

}  // namespace fssa::cuda
