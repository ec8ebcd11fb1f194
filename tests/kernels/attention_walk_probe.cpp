// Prints the pieces of work that csrc/cpu/paged_attention.h hands out to every thread. On standard
// input: threads, heads, KV heads, window, then tokens and keys of every request.
#include <cstdio>
#include <cstdlib>

#include "kernels.h"
#include "paged_attention.h"

namespace fssa::cpu {
const Kernels& kernels() { std::abort(); }  // nothing is computed here
}  // namespace fssa::cpu

int main() {
  using namespace fssa::cpu;
  AttentionCall call;
  long threads, heads, kv_heads, window, tokens, keys;
  if (std::scanf("%ld %ld %ld %ld", &threads, &heads, &kv_heads, &window) != 4) return 1;
  std::vector<int32_t> lengths, starts{0};
  while (std::scanf("%ld %ld", &tokens, &keys) == 2) {
    starts.push_back(starts.back() + static_cast<int32_t>(tokens));
    lengths.push_back(static_cast<int32_t>(keys));
  }
  call.num_heads = heads;
  call.num_kv_heads = kv_heads;
  call.window = window;
  call.kv_lens = lengths.data();
  call.q_indptr = starts.data();
  call.num_sequences.fixed = static_cast<int64_t>(lengths.size());
  for (int thread = 0; thread < threads; ++thread) {
    AttentionWalk walk(call, Team(thread, static_cast<int>(threads), nullptr, nullptr));
    AttentionPiece p;
    while (walk.next(p)) {
      std::printf("%d %ld %ld %ld %ld %ld %ld %ld %ld\n", thread, long(p.sequence),
                  long(p.first_token), long(p.num_tokens), long(p.first_head), long(p.heads),
                  long(p.first_key), long(p.stop_key), long(p.divided));
    }
  }
  return 0;
}
