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
  const int64_t padded = (head_dim + 15) / 16 * 16;
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
    // A request's first piece is the one with the most keys; heads lie side by side.
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

AttentionWalk::AttentionWalk(const AttentionCall& call, const Team& team) : call_(call) {
  const int64_t batch = call.num_sequences.get(), groups = call.num_heads / call.num_kv_heads;
  // One KV head's query heads share its keys, unless that would leave a thread with less than its
  // part.
  heads_ = batch * call.num_kv_heads < 2 * team.size() ? 1 : groups;
  while (heads_ > kQueryRows) heads_ = (heads_ + 1) / 2;
  while (groups % heads_) --heads_;
  max_tokens_ = std::max<int64_t>(1, std::min<int64_t>(32, kQueryRows / heads_));
  int64_t all = 0;
  while (enter()) {
    all += cost(piece()) * (call.num_heads / heads_);
    end_ = piece().first_token;
  }
  first_cost_ = all * team.index() / team.size();
  last_cost_ = all * (team.index() + 1) / team.size();
  sequence_ = -1;
}

bool AttentionWalk::next(AttentionPiece& next) {
  while (passed_ < last_cost_ && enter()) {
    next = piece();
    const int64_t middle = passed_ + cost(next) / 2;
    passed_ += cost(next);
    head_ += heads_;
    if (head_ == call_.num_heads) {
      head_ = 0;
      end_ = next.first_token;
    }
    // A piece is the thread's in whose range its middle lies.
    if (first_cost_ <= middle && middle < last_cost_) return true;
  }
  return false;
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

// The last of the tokens left: the longest piece comes first.
AttentionPiece AttentionWalk::piece() const {
  const int64_t first = std::max(start_, end_ - max_tokens_);
  const int64_t stop = call_.q_indptr[sequence_ + 1];
  const int64_t position = call_.kv_lens[sequence_] - (stop - first);
  return {sequence_, first, end_ - first, position, head_, heads_};
}

// Pairs of a query row and a key, about.
int64_t AttentionWalk::cost(const AttentionPiece& piece) const {
  const int64_t num_keys = call_.num_keys(piece) - call_.oldest_key(piece);
  return num_keys * piece.num_tokens * piece.heads;
}

void AttentionCall::run(Team& team) const { kernels().attention(*this, team); }

}  // namespace fssa::cpu
