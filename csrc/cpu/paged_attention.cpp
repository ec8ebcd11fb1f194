#include "paged_attention.h"

#include <algorithm>

#include "kernels.h"

namespace fssa::cpu {
namespace {

// What a thread asks for ahead at most: more would drive out what came first.
constexpr int64_t kBytesAhead = 768 * 1024;

}  // namespace

int64_t AttentionCall::thread_scratch(int64_t head_dim) {
  // Running outputs, queries, a block of keys turned round, its weights, and a maximum and a sum in
  // 16 lanes for each row; multiples of 16 floats, so that threads do not share cache lines.
  const int64_t padded = padded_dim(head_dim);
  return (2 * kQueryRows + kKeyBlock) * padded + kQueryRows * (kKeyBlock + 1 + 16);
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

void AttentionCall::scattered_reads(const Team& team, std::vector<Span>& reads) const {
  const int64_t key_bytes = num_kv_heads * head_dim * size_of(dtype);
  AttentionWalk walk(*this, team);
  AttentionPiece piece{};
  int64_t bytes = 0, sequence = -1;
  while (bytes < kBytesAhead && walk.next(piece)) {
    // A request's first piece is the one with the most keys.
    if (piece.sequence == sequence) continue;
    sequence = piece.sequence;
    const int32_t* pages = block_tables + sequence * block_stride;
    const int64_t stop = num_keys(piece);
    for (int64_t key = oldest_key(piece); key < stop && bytes < kBytesAhead;) {
      if (reads.size() + 2 > reads.capacity()) return;
      const int64_t in_page = key % page_size;
      const int64_t num = std::min(page_size - in_page, stop - key);
      const int64_t at = (pages[key / page_size] * page_size + in_page) * key_bytes;
      for (const void* cache : {k_cache, v_cache}) {
        reads.push_back({static_cast<const char*>(cache) + at, num * key_bytes});
      }
      bytes += 2 * num * key_bytes;
      key += num;
    }
  }
}

AttentionWalk::AttentionWalk(const AttentionCall& call, const Team& team)
    : call_(call),
      groups_(call.num_heads / call.num_kv_heads),
      max_tokens_(std::max<int64_t>(1, std::min<int64_t>(32, kQueryRows / groups_))) {
  int64_t all = 0;
  while (enter()) {
    all += cost(tokens()) * call.num_heads;
    end_ = tokens().first_token;
  }
  first_cost_ = all * team.index() / team.size();
  last_cost_ = all * (team.index() + 1) / team.size();
  sequence_ = -1;
}

bool AttentionWalk::next(AttentionPiece& next) {
  while (passed_ < last_cost_ && enter()) {
    next = tokens();
    const int64_t each = cost(next);
    if (last_head_ < 0) {
      head_ = heads_before(first_cost_, each);
      last_head_ = heads_before(last_cost_, each);
    }
    if (head_ < last_head_) {
      const int64_t fit = kQueryRows / next.num_tokens;
      // A KV head's heads stay together.
      const int64_t stop =
          fit < groups_ ? head_ + fit : (head_ / groups_ + fit / groups_) * groups_;
      next.first_head = head_;
      next.heads = std::min(stop, last_head_) - head_;
      head_ += next.heads;
      return true;
    }
    passed_ += each * call_.num_heads;
    end_ = next.first_token;
    last_head_ = -1;
  }
  return false;
}

// How many heads of the tokens at hand, at such a cost each, come before a bound of the whole cost:
// a head is the thread's in whose range its middle lies.
int64_t AttentionWalk::heads_before(int64_t bound, int64_t cost) const {
  const int64_t twice = 2 * (bound - passed_) - cost;
  if (twice <= 0) return 0;
  return std::min(call_.num_heads, (twice + 2 * cost - 1) / (2 * cost));
}

// Goes on to a request with tokens left; false if there is none.
bool AttentionWalk::enter() {
  while (start_ == end_) {
    if (++sequence_ >= call_.num_sequences.get()) return false;
    start_ = call_.q_indptr[sequence_];
    end_ = call_.q_indptr[sequence_ + 1];
  }
  return true;
}

// The last of the tokens left, all heads of them: the longest piece comes first.
AttentionPiece AttentionWalk::tokens() const {
  const int64_t first = std::max(start_, end_ - max_tokens_);
  const int64_t stop = call_.q_indptr[sequence_ + 1];
  const int64_t position = call_.kv_lens[sequence_] - (stop - first);
  return {sequence_, first, end_ - first, position, 0, call_.num_heads};
}

// Pairs of a query row and a key of one head, about.
int64_t AttentionWalk::cost(const AttentionPiece& tokens) const {
  return (call_.num_keys(tokens) - call_.oldest_key(tokens)) * tokens.num_tokens;
}

void AttentionCall::run(Team& team) const { kernels().attention(*this, team); }

}  // namespace fssa::cpu
