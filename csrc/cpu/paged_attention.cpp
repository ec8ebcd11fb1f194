#include "paged_attention.h"

#include "kernels.h"

namespace fssa::cpu {

int64_t AttentionCall::thread_scratch(int64_t head_dim) {
  // Running outputs, a block of keys turned round, its weights, and a maximum and a sum in 16 lanes
  // for each row; multiples of 16 floats, so that threads do not share cache lines.
  const int64_t padded = (head_dim + 15) / 16 * 16;
  return (kQueryRows + kKeyBlock) * padded + kQueryRows * (kKeyBlock + 1 + 16);
}

void AttentionCall::check() const {
  const int64_t batch = num_sequences.get(), tokens = num_tokens.get();
  const auto fail = [&](const std::string& got) {
    throw std::invalid_argument(
        "paged_attention: q_indptr and kv_lens: expected kv_lens of at most " +
        std::to_string(max_pages * page_size) + ", q_indptr that rises from 0 to at most " +
        std::to_string(tokens) + " by at most kv_lens, got " + got);
  };
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = q_indptr[b], stop = q_indptr[b + 1], kv_len = kv_lens[b];
    if (start < 0 || stop < start || stop - start > kv_len || stop > tokens ||
        kv_len > max_pages * page_size) {
      fail("q_indptr " + std::to_string(start) + " to " + std::to_string(stop) + ", kv_lens " +
           std::to_string(kv_len) + " for request " + std::to_string(b));
    }
    if (stop == start) continue;
    const int64_t first_key = window ? kv_len - (stop - start) - window + 1 : 0;
    const int64_t first_page = first_key > 0 ? first_key / page_size : 0;
    const int64_t last_page = (kv_len + page_size - 1) / page_size;
    IndexCheck{"paged_attention", "block_tables", block_tables + b * block_stride + first_page, 0,
               num_pages}
        .run(last_page - first_page);
  }
}

std::vector<int64_t> AttentionCall::check_key() const {
  return {key(block_tables),
          block_stride,
          key(kv_lens),
          key(q_indptr),
          num_pages,
          page_size,
          max_pages,
          window,
          key(num_tokens.variable),
          num_tokens.fixed,
          key(num_sequences.variable),
          num_sequences.fixed};
}

void AttentionCall::run(Team& team) const { kernels().attention(*this, team); }

}  // namespace fssa::cpu
