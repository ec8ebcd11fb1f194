// Causal attention of each request's newest tokens over its cached keys and values.
#pragma once

#include <cstdint>

#include "call.h"

namespace fssa::cpu {

constexpr int64_t kKeyBlock = 64;   // keys whose softmax is taken at once, in four times 16 lanes
constexpr int64_t kQueryRows = 96;  // query tokens x heads of one piece of work at most

// Channels of a head in the scratch, whole vectors of 16.
inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// One piece of work: neighbouring heads of neighbouring tokens of a request, at most kQueryRows. Of
// one KV head's part row r is token first_token + r / heads, head first_head + r % heads, at position
// first_position + r / heads.
struct AttentionPiece {
  int64_t sequence;
  int64_t first_token;
  int64_t num_tokens;
  int64_t first_position;
  int64_t first_head;
  int64_t heads;
};

struct AttentionCall final : Call {
  void* out = nullptr;     // [T,H,D] contiguous
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
  RowCount num_tokens;
  RowCount num_sequences;

  static int64_t thread_scratch(int64_t head_dim);
  // The first key a piece reads, and the one after its last.
  int64_t oldest_key(const AttentionPiece& piece) const {
    const int64_t oldest = piece.first_position + 1 - window;
    return window && oldest > 0 ? oldest : 0;
  }
  int64_t num_keys(const AttentionPiece& piece) const {
    return piece.first_position + piece.num_tokens;
  }
  void scattered_reads(const Team& team, std::vector<Span>& reads) const override;
  bool reads_scattered() const override { return true; }
  void check() const override;
  std::vector<int64_t> check_key() const override;
  void run(Team& team) const override;
};

// One thread's pieces of the work, request after request: about as many pairs of a query and a key
// as another's. All heads of a request's tokens that are the thread's go together, since their keys
// lie side by side. Which rows share a piece does not change them.
class AttentionWalk {
 public:
  AttentionWalk(const AttentionCall& call, const Team& team);

  // False at the end.
  bool next(AttentionPiece& piece);

 private:
  bool enter();
  AttentionPiece tokens() const;
  int64_t cost(const AttentionPiece& tokens) const;
  int64_t heads_before(int64_t bound, int64_t cost) const;

  const AttentionCall& call_;
  int64_t groups_;          // heads of a KV head
  int64_t max_tokens_;      // of a piece
  int64_t first_cost_ = 0;  // this thread's range of what all heads of all tokens cost
  int64_t last_cost_ = 0;
  int64_t passed_ = 0;  // cost of the tokens passed
  int64_t sequence_ = -1;
  int64_t start_ = 0;  // tokens of the request that are left
  int64_t end_ = 0;
  int64_t head_ = 0;        // the next piece's first, of the tokens at hand
  int64_t last_head_ = -1;  // the thread's; -1 where tokens are yet to be taken up
};

}  // namespace fssa::cpu
