// Kernel of paged attention. Keys are taken in blocks at absolute positions, one key in each lane; a
// query row's softmax runs over its blocks in order. So a row's bits depend on its own keys alone:
// not on the batch, nor on whether it is computed in decode or in any chunk of a prefill.
namespace FSSA_ISA {

struct AttentionScratch {
  float* out;      // [kQueryRows, padded D]
  float* keys;     // the block turned round: [D][kKeyBlock], bf16 [D/2][kKeyBlock][2]
  float* weights;  // [kQueryRows, kKeyBlock]
  float* total;    // [kQueryRows, 16]
  float* maximum;  // [kQueryRows]
  float* queries;  // [kQueryRows, padded D], for products of bf16 that are taken in fp32
};

// Sixteen keys turned round: word w of key j at to[w * kKeyBlock + j]; a word is one fp32 number or
// two bf16 numbers, the last of an odd count with a zero.
template <typename T>
FSSA_INLINE void turn_round(float* to, const T* const* keys, int64_t dim) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  const int64_t whole = dim * static_cast<int64_t>(sizeof(T)) / 4;
  int64_t w = 0;
  for (; w + 16 <= whole; w += 16) {
    const void* rows[16];
    for (int j = 0; j < 16; ++j) rows[j] = reinterpret_cast<const uint32_t*>(keys[j]) + w;
    transpose_words(rows, words + w * kKeyBlock, kKeyBlock);
  }
  for (; w < whole; ++w) {
    for (int j = 0; j < 16; ++j) {
      const char* word = reinterpret_cast<const char*>(keys[j]) + 4 * w;
      __builtin_memcpy(words + w * kKeyBlock + j, word, 4);
    }
  }
  if (dim * sizeof(T) % 4) {
    for (int j = 0; j < 16; ++j) {
      words[w * kKeyBlock + j] = 0;
      __builtin_memcpy(words + w * kKeyBlock + j, keys[j] + dim - 1, sizeof(T));
    }
  }
}

// out[d] += sum_j weight[j] V[j][d] for kRows rows and 16 * kVecs channels.
template <int kRows, int kVecs, typename T>
FSSA_INLINE void mix(const T* const* values, int64_t num, const float* weights, float* out,
                     int64_t padded, int64_t d) {
  Vec acc[kRows][kVecs];
  FSSA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FSSA_UNROLL
    for (int c = 0; c < kVecs; ++c) acc[r][c] = load(out + r * padded + d + 16 * c);
  }
  for (int64_t j = 0; j < num; ++j) {
    FSSA_UNROLL
    for (int c = 0; c < kVecs; ++c) {
      const Vec value = load(values[j] + d + 16 * c);
      FSSA_UNROLL
      for (int r = 0; r < kRows; ++r) add_product(acc[r][c], value, weights + r * kKeyBlock + j);
    }
  }
  FSSA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FSSA_UNROLL
    for (int c = 0; c < kVecs; ++c) store(out + r * padded + d + 16 * c, acc[r][c]);
  }
}

template <int kRows, typename T>
FSSA_INLINE void mix_rows(const T* const* values, int64_t num, const float* weights, float* out,
                          int64_t padded, int64_t dim) {
  constexpr int kVecs = 4 * kRows <= kMaxSums ? 4 : 2 * kRows <= kMaxSums ? 2 : 1;
  int64_t d = 0;
  for (; d + 16 * kVecs <= dim; d += 16 * kVecs) {
    mix<kRows, kVecs>(values, num, weights, out, padded, d);
  }
  for (; d + 16 <= dim; d += 16) mix<kRows, 1>(values, num, weights, out, padded, d);
  if (d < dim) {
    for (int r = 0; r < kRows; ++r) {
      Vec acc = load(out + r * padded + d);
      for (int64_t j = 0; j < num; ++j) {
        acc = fma(broadcast(weights[r * kKeyBlock + j]), load_first(values[j] + d, dim - d), acc);
      }
      store(out + r * padded + d, acc);
    }
  }
}

template <int kRows, typename T>
FSSA_INLINE void mix_rows_of(int64_t rows, const T* const* values, int64_t num,
                             const float* weights, float* out, int64_t padded, int64_t dim) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      mix_rows_of<kRows - 1>(rows, values, num, weights, out, padded, dim);
      return;
    }
  }
  mix_rows<kRows>(values, num, weights, out, padded, dim);
}

// weights[j] = scale q . k_j for kRows rows from `row` on and the keys from `first` on, 16 * kGroups
// at a time, as far as those of `num_keys` are whole. Returns the first key that is left.
template <int kRows, int kGroups, typename T, typename Rows>
FSSA_INLINE int64_t score_groups(const AttentionCall& a, const Rows& q, const AttentionScratch& s,
                                 int64_t row, int64_t first, int64_t num_keys) {
  if constexpr (kRows * kGroups <= kMaxSums) {
    for (; first + 16 * (kGroups - 1) < num_keys; first += 16 * kGroups) {
      Vec acc[kRows][kGroups];
      FSSA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSSA_UNROLL
        for (int g = 0; g < kGroups; ++g) acc[r][g] = broadcast(0.0f);
      }
      accumulate(q, reinterpret_cast<const T*>(s.keys + first), a.head_dim, acc, NothingAhead{},
                 kKeyBlock);
      FSSA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float* weights = s.weights + (row + r) * kKeyBlock + first;
        FSSA_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          store(weights + 16 * g, mul(acc[r][g], broadcast(a.scale)));
        }
      }
    }
  }
  return first;
}

// Row `row` of a piece.
template <typename T>
FSSA_INLINE const T* query(const AttentionCall& a, const AttentionPiece& piece, int64_t row) {
  const int64_t token = row / piece.heads, head = row % piece.heads;
  return static_cast<const T*>(a.q) + (piece.first_token + token) * a.q_token_stride +
         (piece.first_head + head) * a.q_head_stride;
}

// Whether a query is read in fp32, widened once and not for every key it meets.
template <typename T>
constexpr bool kWidensQueries = sizeof(T) == 2 && kWidenedRows < INT64_MAX;

// The scores of kRows rows of a piece and every key of the block. Groups of keys go together while
// the registers hold them: each is a chain of additions, which alone would wait for the adder.
template <int kRows, typename T>
FSSA_NOINLINE void score_rows(const AttentionCall& a, const AttentionPiece& piece,
                              const AttentionScratch& s, int64_t row, int64_t num_keys) {
  const auto score = [&](const auto& q) {
    int64_t first = score_groups<kRows, 4, T>(a, q, s, row, 0, num_keys);
    first = score_groups<kRows, 2, T>(a, q, s, row, first, num_keys);
    score_groups<kRows, 1, T>(a, q, s, row, first, num_keys);
  };
  if constexpr (kWidensQueries<T>) {
    const int64_t padded = (a.head_dim + 15) / 16 * 16;
    score(SpacedRows<kRows, float>(s.queries + row * padded, padded));
  } else {
    const T* q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = query<T>(a, piece, row + r);
    score(ScatteredRows<T>{q});
  }
}

template <int kRows, typename T>
FSSA_INLINE void score_rows_of(int64_t rows, const AttentionCall& a, const AttentionPiece& piece,
                               const AttentionScratch& s, int64_t row, int64_t num_keys) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      score_rows_of<kRows - 1, T>(rows, a, piece, s, row, num_keys);
      return;
    }
  }
  score_rows<kRows, T>(a, piece, s, row, num_keys);
}

// One row's softmax takes the block in: scores become weights, and what was summed before fades.
FSSA_INLINE void soften_row(const AttentionCall& a, const AttentionPiece& piece,
                            const AttentionScratch& s, int64_t row, int64_t first_key,
                            int64_t num_keys) {
  const int64_t padded = (a.head_dim + 15) / 16 * 16;
  const int64_t seen = piece.first_position + row / piece.heads + 1;
  const int64_t last = smaller(num_keys, seen - first_key);
  const int64_t first = a.window ? larger(0, seen - a.window - first_key) : 0;
  float* weights = s.weights + row * kKeyBlock;
  if (first >= last) {  // this row sees no key of the block
    for (int64_t j = 0; j < num_keys; j += 16) store(weights + j, broadcast(0.0f));
    return;
  }
  Vec highest = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < num_keys; j += 16) {
    const Vec score = keep_lanes(load(weights + j), first - j, last - j, -__builtin_inff());
    highest = max(score, highest);
  }
  const float before = s.maximum[row], block = largest(highest);
  const float now = block > before ? block : before;
  Vec total = load(s.total + row * 16);
  if (before != now) {
    const Vec fade = exp(broadcast(before - now));
    total = mul(total, fade);
    float* out = s.out + row * padded;
    for (int64_t d = 0; d < padded; d += 16) store(out + d, mul(load(out + d), fade));
  }
  for (int64_t j = 0; j < num_keys; j += 16) {
    const Vec weight = exp(sub(load(weights + j), broadcast(now)));
    const Vec kept = keep_lanes(weight, first - j, last - j, 0.0f);
    store(weights + j, kept);
    total = add(total, kept);
  }
  store(s.total + row * 16, total);
  s.maximum[row] = now;
}

FSSA_INLINE int64_t kv_head(const AttentionCall& a, const AttentionPiece& piece) {
  return piece.first_head / (a.num_heads / a.num_kv_heads);
}

template <typename T>
FSSA_INLINE void fetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) prefetch(row + d);
}

// Brings the keys from `first` to the end of its block into the cache.
template <typename T>
FSSA_INLINE void fetch_keys(const AttentionCall& a, const AttentionPiece& piece, int64_t first) {
  const int64_t entry = a.num_kv_heads * a.head_dim;
  const int32_t* pages = a.block_tables + piece.sequence * a.block_stride;
  const T* cache = static_cast<const T*>(a.k_cache) + kv_head(a, piece) * a.head_dim;
  const int64_t num_keys = a.num_keys(piece);
  const int64_t stop = smaller((first / kKeyBlock + 1) * kKeyBlock, num_keys);
  while (first < stop) {
    const int64_t in_page = first % a.page_size;
    const int64_t num = smaller(a.page_size - in_page, stop - first);
    const T* row = cache + (pages[first / a.page_size] * a.page_size + in_page) * entry;
    for (int64_t j = 0; j < num; ++j, row += entry) fetch_row(row, a.head_dim);
    first += num;
  }
}

template <typename T>
FSSA_INLINE void attend(const AttentionCall& a, const AttentionPiece& piece,
                        const AttentionPiece& next, const AttentionScratch& s) {
  const int64_t padded = (a.head_dim + 15) / 16 * 16;
  const int64_t num_rows = piece.num_tokens * piece.heads;
  for (int64_t i = 0; i < num_rows * padded; i += 16) store(s.out + i, broadcast(0.0f));
  for (int64_t r = 0; r < num_rows; ++r) {
    s.maximum[r] = -__builtin_inff();
    store(s.total + r * 16, broadcast(0.0f));
  }
  if constexpr (kWidensQueries<T>) {
    for (int64_t r = 0; r < num_rows; ++r) {
      const T* q = query<T>(a, piece, r);
      for (int64_t d = 0; d < a.head_dim; d += 16) {
        store(s.queries + r * padded + d, load_up_to(q + d, a.head_dim - d));
      }
    }
  }
  const int32_t* pages = a.block_tables + piece.sequence * a.block_stride;
  const T* k_cache = static_cast<const T*>(a.k_cache) + kv_head(a, piece) * a.head_dim;
  const T* v_cache = static_cast<const T*>(a.v_cache) + kv_head(a, piece) * a.head_dim;
  const int64_t entry = a.num_kv_heads * a.head_dim;
  const int64_t num_keys = a.num_keys(piece);
  const int64_t oldest = a.oldest_key(piece);
  for (int64_t first = oldest / kKeyBlock * kKeyBlock; first < num_keys; first += kKeyBlock) {
    const int64_t num = smaller(kKeyBlock, num_keys - first);
    const T* keys[kKeyBlock];
    const T* values[kKeyBlock];
    const int64_t begin = larger(first, oldest) - first;
    for (int64_t j = begin; j < num;) {
      const int64_t at = first + j, in_page = at % a.page_size;
      const int64_t stop = smaller(num, j + a.page_size - in_page);
      int64_t row = (pages[at / a.page_size] * a.page_size + in_page) * entry;
      for (; j < stop; ++j, row += entry) {
        keys[j] = k_cache + row;
        values[j] = v_cache + row;
      }
    }
    // Keys before the window lie in pages that nobody promised, and past the end there are none:
    // the nearest key stands in for them, and its weight there is zero.
    for (int64_t j = 0; j < begin; ++j) {
      keys[j] = keys[begin];
      values[j] = values[begin];
    }
    for (int64_t j = num; j % 16; ++j) keys[j] = keys[num - 1];
    // Values come from memory while the scores are computed, and the next keys after that.
    for (int64_t j = 0; j < num; ++j) fetch_row(values[j], a.head_dim);
    for (int64_t j = 0; j < num; j += 16) turn_round(s.keys + j, keys + j, a.head_dim);
    constexpr int kScoreRows = kMaxRows < 8 ? kMaxRows : 8, kMixRows = kMaxRows < 8 ? kMaxRows : 4;
    for (int64_t row = 0; row < num_rows; row += kScoreRows) {
      score_rows_of<kScoreRows, T>(num_rows - row, a, piece, s, row, num);
    }
    if (first + kKeyBlock < num_keys) {
      fetch_keys<T>(a, piece, first + kKeyBlock);
    } else {
      fetch_keys<T>(a, next, a.oldest_key(next));
    }
    for (int64_t row = 0; row < num_rows; ++row) soften_row(a, piece, s, row, first, num);
    for (int64_t row = 0; row < num_rows; row += kMixRows) {
      mix_rows_of<kMixRows>(num_rows - row, values, num, s.weights + row * kKeyBlock,
                            s.out + row * padded, padded, a.head_dim);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    T* out = static_cast<T*>(a.out) +
             ((piece.first_token + r / piece.heads) * a.num_heads + piece.first_head +
              r % piece.heads) *
                 a.head_dim;
    const Vec inverse = broadcast(1.0f / sum(load(s.total + r * 16)));
    for (int64_t d = 0; d < a.head_dim; d += 16) {
      store_up_to(out + d, mul(load(s.out + r * padded + d), inverse), a.head_dim - d);
    }
  }
}

template <typename T>
void attention(const AttentionCall& a, Team& team) {
  const int64_t batch = a.num_sequences.get(), tokens = a.num_tokens.get();
  const int64_t padded = (a.head_dim + 15) / 16 * 16;
  AttentionScratch s;
  s.out = a.scratch + team.index() * AttentionCall::thread_scratch(a.head_dim);
  s.keys = s.out + kQueryRows * padded;
  s.weights = s.keys + kKeyBlock * padded;
  s.total = s.weights + kQueryRows * kKeyBlock;
  s.maximum = s.total + kQueryRows * 16;
  s.queries = s.maximum + kQueryRows;
  // A piece is computed when the thread's next is known.
  AttentionWalk walk(a, team);
  AttentionPiece at_hand{}, next{};
  if (walk.next(at_hand)) {
    fetch_keys<T>(a, at_hand, a.oldest_key(at_hand));
    while (walk.next(next)) {
      attend<T>(a, at_hand, next, s);
      at_hand = next;
    }
    attend<T>(a, at_hand, at_hand, s);
  }
  // Rows that belong to no request are zero.
  if (team.index() == 0) {
    const int64_t width = a.num_heads * a.head_dim;
    T* out = static_cast<T*>(a.out);
    const int64_t used = batch ? a.q_indptr[batch] : 0, first = batch ? a.q_indptr[0] : 0;
    for (int64_t i = 0; i < first * width; ++i) out[i] = T{};
    for (int64_t i = used * width; i < tokens * width; ++i) out[i] = T{};
  }
}

}  // namespace FSSA_ISA
