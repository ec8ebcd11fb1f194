#include "paged_attention.h"

#include <algorithm>

#include "kernels.h"

namespace fssa::cpu {
namespace {

// What a thread asks for ahead at most: from there on it would drive out of the caches what came
// first.
constexpr int64_t kBytesAhead = 1280 * 1024;

}  // namespace

int64_t AttentionCall::thread_scratch(int64_t num_heads, int64_t head_dim, int64_t max_keys) {
  // Sums of the split at hand and of those before, a block of keys turned round, its weights,
  // queries; and the splits of a token that are another thread's to put together. Multiples of 16
  // floats, so that threads do not share cache lines.
  const int64_t padded = padded_dim(head_dim);
  return 2 * RowSums::floats(kQueryRows, padded) + kKeyBlock * padded +
         kQueryRows * (kKeyBlock + padded) +
         num_splits(max_keys) * RowSums::floats(num_heads, padded);
}

float* AttentionCall::memory_of(int64_t thread) const {
  return scratch + thread * thread_scratch(num_heads, head_dim, max_pages * page_size);
}

RowSums AttentionCall::split_sums(int64_t thread, int64_t split) const {
  // From the end of the thread's scratch on.
  const int64_t padded = padded_dim(head_dim);
  return {memory_of(thread + 1) - (split + 1) * RowSums::floats(num_heads, padded), num_heads,
          padded};
}

int64_t AttentionCall::splits_of(const AttentionPiece& tokens) const {
  return num_splits(num_keys(tokens)) - num_splits(oldest_key(tokens) + 1) + 1;
}

bool AttentionCall::completes(const AttentionPiece& piece) const {
  const int64_t wanted = splits_of(piece) * num_heads;
  // What the others wrote before they added is seen by the one that adds last.
  const bool last =
      done[piece.divided].fetch_add(piece.heads, std::memory_order_acq_rel) + piece.heads == wanted;
  if (last) done[piece.divided].store(0, std::memory_order_relaxed);
  return last;
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
    // A request's first piece is the one with the most keys, unless these are divided.
    if (piece.sequence == sequence && !piece.divided) continue;
    sequence = piece.sequence;
    const int32_t* pages = block_tables + sequence * block_stride;
    const int64_t stop = piece.stop_key;
    for (int64_t key = piece.first_key; key < stop && bytes < kBytesAhead;) {
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
      num_threads_(team.size()),
      groups_(call.num_heads / call.num_kv_heads),
      max_tokens_(std::max<int64_t>(1, std::min<int64_t>(32, kQueryRows / groups_))) {
  while (enter()) {
    at_hand_ = tokens();
    all_ += cost() * call.num_heads;
    end_ = at_hand_.first_token;
  }
  first_cost_ = all_ * team.index() / team.size();
  last_cost_ = all_ * (team.index() + 1) / team.size();
  at_hand_ = {};
  sequence_ = -1;
  start_ = end_ = 0;
}

bool AttentionWalk::next(AttentionPiece& next) {
  while (head_ >= last_head_) {
    passed_ += each_ * call_.num_heads;
    if (passed_ >= last_cost_ || !advance()) return false;
    each_ = cost();
    head_ = heads_before(first_cost_);
    last_head_ = heads_before(last_cost_);
  }
  const int64_t fit = kQueryRows / at_hand_.num_tokens;
  // A KV head's heads stay together.
  const int64_t stop = fit < groups_ ? head_ + fit : (head_ / groups_ + fit / groups_) * groups_;
  next = at_hand_;
  next.first_head = head_;
  next.heads = std::min(stop, last_head_) - head_;
  head_ += next.heads;
  return true;
}

// Takes the next tokens up, or the next split of those whose keys are divided; false at the end.
bool AttentionWalk::advance() {
  const bool within = at_hand_.divided && at_hand_.stop_key < call_.num_keys(at_hand_);
  if (within) {
    at_hand_.first_key = at_hand_.stop_key;
  } else {
    end_ = at_hand_.first_token;
    if (!enter()) return false;
    at_hand_ = tokens();
    at_hand_.divided = divided();
  }
  if (at_hand_.divided) {
    at_hand_.stop_key = std::min(split_stop(at_hand_.first_key), call_.num_keys(at_hand_));
  }
  return true;
}

// The first thread, if any, whose range begins within the token at hand, if that is one by itself
// and has enough keys.
int64_t AttentionWalk::divided() const {
  if (at_hand_.num_tokens > 1 || call_.splits_of(at_hand_) < kMinSplitsDivided) return 0;
  int64_t thread = passed_ * num_threads_ / all_;
  while (all_ * thread / num_threads_ <= passed_) ++thread;
  return all_ * thread / num_threads_ < passed_ + cost() * call_.num_heads ? thread : 0;
}

// How many heads of the piece at hand come before a bound of the whole cost: a head is the thread's
// in whose range its middle lies.
int64_t AttentionWalk::heads_before(int64_t bound) const {
  const int64_t twice = 2 * (bound - passed_) - each_;
  if (twice <= 0) return 0;
  return std::min(call_.num_heads, (twice + 2 * each_ - 1) / (2 * each_));
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

// The last of the tokens left, all heads and keys of them: the longest piece comes first.
AttentionPiece AttentionWalk::tokens() const {
  const int64_t first = std::max(start_, end_ - max_tokens_);
  const int64_t stop = call_.q_indptr[sequence_ + 1];
  const int64_t position = call_.kv_lens[sequence_] - (stop - first);
  AttentionPiece piece{sequence_, first, end_ - first, position, 0, call_.num_heads, 0, 0};
  piece.first_key = call_.oldest_key(piece);
  piece.stop_key = call_.num_keys(piece);
  return piece;
}

// Pairs of a query row and a key of one head of the piece at hand, about.
int64_t AttentionWalk::cost() const {
  return (at_hand_.stop_key - at_hand_.first_key) * at_hand_.num_tokens;
}

void AttentionCall::run(Team& team) const { kernels().attention(*this, team); }

}  // namespace fssa::cpu
