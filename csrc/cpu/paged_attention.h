// Causal attention of each request's newest tokens over its cached keys and values.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "call.h"

namespace fssa::cpu {

constexpr int64_t kKeyBlock = 64;   // keys whose softmax is taken at once, in four times 16 lanes
constexpr int64_t kQueryRows = 96;  // query tokens x heads of one piece of work at most
// What it costs to put splits of several threads together pays from so many of them on.
constexpr int64_t kMinSplitsDivided = 3;

// Channels of a head in the scratch, whole vectors of 16.
inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// A row's keys fall into splits, each with a softmax of its own; in the end these are put together
// in order. So threads can divide one row's keys between them, and since splits lie at the same
// positions for every row, that changes no bit. A split has 512 keys, or a quarter of all before it
// where that is more, as powers of two: 28 splits are 128 Ki keys.
inline int64_t split_stop(int64_t key) {
  int64_t keys = 8 * kKeyBlock;
  while (8 * keys <= key) keys *= 2;
  return (key / keys + 1) * keys;
}

inline int64_t num_splits(int64_t num_keys) {
  int64_t splits = 0;
  for (int64_t key = 0; key < num_keys; key = split_stop(key)) ++splits;
  return splits;
}

// What the softmax of some rows has summed up so far.
struct RowSums {
  float* out;      // [rows, padded D]: weighted values
  float* total;    // [rows, 16]: weights, in 16 lanes
  float* maximum;  // [rows]: the score that they are relative to

  RowSums(float* memory, int64_t rows, int64_t padded)
      : out(memory), total(out + rows * padded), maximum(total + rows * 16) {}

  static int64_t floats(int64_t rows, int64_t padded) {
    return rows * (padded + 16) + (rows + 15) / 16 * 16;
  }

  // The same of the rows from `row` on.
  void skip(int64_t row, int64_t padded) {
    out += row * padded;
    total += row * 16;
    maximum += row;
  }
};

// One piece of work: keys of neighbouring heads of neighbouring tokens of a request, at most
// kQueryRows rows. Of one KV head's part row r is token first_token + r / heads, head first_head +
// r % heads, at position first_position + r / heads.
struct AttentionPiece {
  int64_t sequence;
  int64_t first_token;
  int64_t num_tokens;
  int64_t first_position;
  int64_t first_head;
  int64_t heads;
  int64_t first_key;  // the keys of the piece: all that a row sees, or one split of them
  int64_t stop_key;
  int64_t divided = 0;  // the thread that keeps the splits of a token which threads divide, or none
};

struct AttentionCall final : Call {
  void* out = nullptr;     // [T,H,D], a token's heads contiguous
  int64_t out_stride = 0;  // from token to token, elements
  const void* q = nullptr;  // [T,H,D]
  int64_t q_token_stride = 0;
  int64_t q_head_stride = 0;
  const void* k_cache = nullptr;  // [num_pages,P,Hkv,D] contiguous
  const void* v_cache = nullptr;
  DType dtype = DType::kFloat32;  // of the above
  const int32_t* block_tables = nullptr;  // [B,max_pages]
  int64_t block_stride = 0;
  const int32_t* kv_lens = nullptr;   // [B]
  const int32_t* q_indptr = nullptr;  // [B+1]
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int64_t max_pages = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;
  int64_t window = 0;      // 0: all
  float* scratch = nullptr;  // thread_scratch() floats for each thread
  // For each thread, heads times splits that are done of the token that AttentionPiece::divided
  // gives it.
  std::unique_ptr<std::atomic<int64_t>[]> done;
  RowCount num_tokens;
  RowCount num_sequences;

  static int64_t thread_scratch(int64_t num_heads, int64_t head_dim, int64_t max_keys);
  // A thread's scratch, and the sums of all heads of one split in it.
  float* memory_of(int64_t thread) const;
  RowSums split_sums(int64_t thread, int64_t split) const;
  // Whether a piece of divided keys, now done, was the last of its token.
  bool completes(const AttentionPiece& piece) const;
  // Of some tokens, the first key that a row sees, and the one after the last.
  int64_t oldest_key(const AttentionPiece& tokens) const {
    const int64_t oldest = tokens.first_position + 1 - window;
    return window && oldest > 0 ? oldest : 0;
  }
  int64_t num_keys(const AttentionPiece& tokens) const {
    return tokens.first_position + tokens.num_tokens;
  }
  int64_t splits_of(const AttentionPiece& tokens) const;
  void scattered_reads(const Team& team, std::vector<Span>& reads) const override;
  bool reads_scattered() const override { return true; }
  void check() const override;
  std::vector<int64_t> check_key() const override;
  void run(Team& team) const override;

};

// One thread's pieces of the work, request after request: about as many pairs of a query and a key
// as another's. All heads of a request's tokens that are the thread's go together, since their keys
// lie side by side. A token by itself, whose keys make several splits, is handed out split by split
// where threads part within it. Which rows share a piece does not change them.
class AttentionWalk {
 public:
  AttentionWalk(const AttentionCall& call, const Team& team);

  // False at the end.
  bool next(AttentionPiece& piece);

 private:
  bool enter();
  bool advance();
  AttentionPiece tokens() const;
  int64_t divided() const;
  int64_t cost() const;
  int64_t heads_before(int64_t bound) const;

  const AttentionCall& call_;
  int64_t num_threads_;
  int64_t groups_;          // heads of a KV head
  int64_t max_tokens_;      // of a piece
  int64_t all_ = 0;         // what all heads of all tokens cost
  int64_t first_cost_ = 0;  // this thread's range of that
  int64_t last_cost_ = 0;
  int64_t sequence_ = -1;
  int64_t start_ = 0;  // tokens of the request that are left
  int64_t end_ = 0;
  AttentionPiece at_hand_{};  // all heads of it
  int64_t passed_ = 0;        // what came before it cost
  int64_t each_ = 0;          // what one of its heads costs
  int64_t head_ = 0;          // the thread's that are left
  int64_t last_head_ = 0;
};

}  // namespace fssa::cpu
