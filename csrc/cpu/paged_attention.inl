// Kernel of paged attention. Keys are taken in blocks at absolute positions, one key in each lane; a
// query row's softmax runs over the blocks of a split in order, and its splits are put together in
// order. So a row's bits depend on its own keys alone: not on the batch, nor on the threads, nor on
// whether it is computed in decode or in any chunk of a prefill.
namespace FSSA_ISA {

struct AttentionScratch {
  RowSums sums;    // of the split at hand
  RowSums before;  // of the splits before it, put together
  float* keys;     // the block turned round: [D][kKeyBlock], bf16 [D/2][kKeyBlock][2]
  float* weights;  // [kQueryRows, kKeyBlock]
  float* queries;  // [kQueryRows, padded D], for products of bf16 that are taken in fp32

  // The same for the rows from `row` on.
  FSSA_INLINE_MEMBER AttentionScratch from(int64_t row, int64_t padded) const {
    AttentionScratch rest = *this;
    rest.sums.skip(row, padded);
    rest.before.skip(row, padded);
    rest.weights += row * kKeyBlock;
    rest.queries += row * padded;
    return rest;
  }
};

FSSA_INLINE void clear(const RowSums& sums, int64_t rows, int64_t padded) {
  for (int64_t i = 0; i < rows * padded; i += 16) store(sums.out + i, broadcast(0.0f));
  for (int64_t r = 0; r < rows; ++r) {
    sums.maximum[r] = -__builtin_inff();
    store(sums.total + r * 16, broadcast(0.0f));
  }
}

// sums = sums and the split that follows: both are brought to the higher of their maxima.
FSSA_NOINLINE void put_together(RowSums sums, RowSums split, int64_t rows, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    const float before = sums.maximum[r], own = split.maximum[r];
    const float now = own > before ? own : before;
    sums.maximum[r] = now;
    // Without a key yet there is nothing to be scaled.
    const float base = now > -__builtin_inff() ? now : 0.0f;
    const Vec fade = exp(broadcast(before - base)), weight = exp(broadcast(own - base));
    const auto add_up = [&](float* sum, const float* more) {
      store(sum, fma(load(sum), fade, mul(load(more), weight)));
    };
    add_up(sums.total + r * 16, split.total + r * 16);
    for (int64_t d = r * padded; d < (r + 1) * padded; d += 16) add_up(sums.out + d, split.out + d);
  }
}

// Sixteen keys, key j at keys + at[j], turned round: word w of key j at to[w * kKeyBlock + j]; a word is
// one fp32 number or two bf16 numbers, the last of an odd count with a zero.
template <typename T>
FSSA_INLINE void turn_round(float* to, const T* keys, const int64_t* at, int64_t dim,
                            Ahead& ahead) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  const int64_t whole = dim * static_cast<int64_t>(sizeof(T)) / 4;
  int64_t w = 0;
  for (; w + 16 <= whole; w += 16) {
    fetch<512>(ahead);
    const void* rows[16];
    for (int j = 0; j < 16; ++j) rows[j] = reinterpret_cast<const uint32_t*>(keys + at[j]) + w;
    transpose_words(rows, words + w * kKeyBlock, kKeyBlock);
  }
  for (; w < whole; ++w) {
    for (int j = 0; j < 16; ++j) {
      const char* word = reinterpret_cast<const char*>(keys + at[j]) + 4 * w;
      __builtin_memcpy(words + w * kKeyBlock + j, word, 4);
    }
  }
  if (dim * sizeof(T) % 4) {
    for (int j = 0; j < 16; ++j) {
      words[w * kKeyBlock + j] = 0;
      __builtin_memcpy(words + w * kKeyBlock + j, keys + at[j] + dim - 1, sizeof(T));
    }
  }
}

// out[d] += sum_j weight[j] V[j][d] for kRows rows and 16 * kVecs channels; V[j] at values + at[j].
template <int kRows, int kVecs, typename T>
FSSA_INLINE void mix(const T* values, const int64_t* at, int64_t num, const float* weights,
                     float* out, int64_t padded, int64_t d, Ahead& ahead) {
  Vec acc[kRows][kVecs];
  FSSA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FSSA_UNROLL
    for (int c = 0; c < kVecs; ++c) acc[r][c] = load(out + r * padded + d + 16 * c);
  }
  for (int64_t j = 0; j < num; ++j) {
    fetch<16 * kVecs * static_cast<int>(sizeof(T))>(ahead);
    FSSA_UNROLL
    for (int c = 0; c < kVecs; ++c) {
      const Vec value = load(values + at[j] + d + 16 * c);
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
FSSA_INLINE void mix_rows(const T* values, const int64_t* at, int64_t num, const float* weights,
                          float* out, int64_t padded, int64_t dim, Ahead& ahead) {
  constexpr int kVecs = 4 * kRows <= kMaxSums ? 4 : 2 * kRows <= kMaxSums ? 2 : 1;
  int64_t d = 0;
  for (; d + 16 * kVecs <= dim; d += 16 * kVecs) {
    mix<kRows, kVecs>(values, at, num, weights, out, padded, d, ahead);
  }
  for (; d + 16 <= dim; d += 16) mix<kRows, 1>(values, at, num, weights, out, padded, d, ahead);
  if (d < dim) {
    for (int r = 0; r < kRows; ++r) {
      Vec acc = load(out + r * padded + d);
      for (int64_t j = 0; j < num; ++j) {
        const Vec value = load_first(values + at[j] + d, dim - d);
        acc = fma(broadcast(weights[r * kKeyBlock + j]), value, acc);
      }
      store(out + r * padded + d, acc);
    }
  }
}

template <int kRows, typename T>
FSSA_INLINE void mix_rows_of(int64_t rows, const T* values, const int64_t* at, int64_t num,
                             const float* weights, float* out, int64_t padded, int64_t dim,
                             Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      mix_rows_of<kRows - 1>(rows, values, at, num, weights, out, padded, dim, ahead);
      return;
    }
  }
  mix_rows<kRows>(values, at, num, weights, out, padded, dim, ahead);
}

// weights[j] = scale q . k_j for kRows rows from `row` on and the keys from `first` on, 16 * kGroups
// at a time, as far as those of `num_keys` are whole. Returns the first key that is left.
template <int kRows, int kGroups, typename T, typename Rows>
FSSA_INLINE int64_t score_groups(const AttentionCall& a, const Rows& q, const AttentionScratch& s,
                                 int64_t row, int64_t first, int64_t num_keys,
                                 Ahead& ahead) {
  if constexpr (kRows * kGroups <= kMaxSums) {
    for (; first + 16 * (kGroups - 1) < num_keys; first += 16 * kGroups) {
      Vec acc[kRows][kGroups];
      FSSA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSSA_UNROLL
        for (int g = 0; g < kGroups; ++g) acc[r][g] = broadcast(0.0f);
      }
      accumulate<32 * kGroups>(q, reinterpret_cast<const T*>(s.keys + first), a.head_dim, acc,
                               ahead, kKeyBlock);
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
                              const AttentionScratch& s, int64_t row, int64_t num_keys,
                              Ahead& brought) {
  Ahead ahead = brought;
  const auto score = [&](const auto& q) {
    int64_t first = score_groups<kRows, 4, T>(a, q, s, row, 0, num_keys, ahead);
    first = score_groups<kRows, 2, T>(a, q, s, row, first, num_keys, ahead);
    score_groups<kRows, 1, T>(a, q, s, row, first, num_keys, ahead);
  };
  if constexpr (kWidensQueries<T>) {
    const int64_t padded = padded_dim(a.head_dim);
    score(SpacedRows<kRows, float>(s.queries + row * padded, padded));
  } else {
    const T* q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = query<T>(a, piece, row + r);
    score(ScatteredRows<T>{q});
  }
  brought = ahead;
}

template <int kRows, typename T>
FSSA_INLINE void score_rows_of(int64_t rows, const AttentionCall& a, const AttentionPiece& piece,
                               const AttentionScratch& s, int64_t row, int64_t num_keys,
                               Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      score_rows_of<kRows - 1, T>(rows, a, piece, s, row, num_keys, ahead);
      return;
    }
  }
  score_rows<kRows, T>(a, piece, s, row, num_keys, ahead);
}

// One row's softmax takes the block in: scores become weights, and what was summed before fades.
FSSA_INLINE void soften_row(const AttentionCall& a, const AttentionPiece& piece,
                            const AttentionScratch& s, int64_t row, int64_t first_key,
                            int64_t num_keys) {
  const int64_t padded = padded_dim(a.head_dim);
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
  const float before = s.sums.maximum[row], block = largest(highest);
  const float now = block > before ? block : before;
  Vec total = load(s.sums.total + row * 16);
  if (before != now && before > -__builtin_inff()) {
    const Vec fade = exp(broadcast(before - now));
    total = mul(total, fade);
    float* out = s.sums.out + row * padded;
    for (int64_t d = 0; d < padded; d += 16) store(out + d, mul(load(out + d), fade));
  }
  for (int64_t j = 0; j < num_keys; j += 16) {
    const Vec weight = exp(sub(load(weights + j), broadcast(now)));
    const Vec kept = keep_lanes(weight, first - j, last - j, 0.0f);
    store(weights + j, kept);
    total = add(total, kept);
  }
  store(s.sums.total + row * 16, total);
  s.sums.maximum[row] = now;
}

// Calls each(part, scratch of its rows, KV head) for every KV head of a piece.
template <typename Each>
FSSA_INLINE void for_each_part(const AttentionCall& a, const AttentionPiece& piece,
                               const AttentionScratch& s, const Each& each) {
  const int64_t groups = a.num_heads / a.num_kv_heads, padded = padded_dim(a.head_dim);
  const int64_t last = piece.first_head + piece.heads;
  int64_t kv_head = piece.first_head / groups, row = 0;
  AttentionPiece part = piece;
  for (int64_t head = piece.first_head; head < last; head += part.heads, ++kv_head) {
    part.first_head = head;
    part.heads = smaller(last, (kv_head + 1) * groups) - head;
    each(part, s.from(row, padded), kv_head);
    row += part.num_tokens * part.heads;
  }
}

// Where a block's keys and values lie.
struct KeyBlock {
  int64_t first;   // position of the block's first key
  int64_t num;     // keys up to the last one there is
  int64_t oldest;  // of them, the first that a row sees
  int64_t at[kKeyBlock];  // of a key, and of its value: elements from the cache's first one
  // From oldest on, keys that lie side by side: the number of such runs, and where each ends.
  int64_t num_runs;
  uint8_t run_end[kKeyBlock];
};

FSSA_INLINE int64_t first_block(const AttentionPiece& piece) {
  return piece.first_key / kKeyBlock * kKeyBlock;
}

// The block of a piece's keys from `first` on, a multiple of kKeyBlock.
FSSA_INLINE void find_block(const AttentionCall& a, const AttentionPiece& piece, int64_t first,
                            KeyBlock& block) {
  const int32_t* pages = a.block_tables + piece.sequence * a.block_stride;
  const int64_t entry = a.num_kv_heads * a.head_dim;
  block.first = first;
  block.num = smaller(kKeyBlock, piece.stop_key - first);
  block.oldest = larger(first, piece.first_key) - first;
  block.num_runs = 0;
  for (int64_t j = block.oldest; j < block.num;) {
    const int64_t key = first + j, in_page = key % a.page_size;
    const int64_t stop = smaller(block.num, j + a.page_size - in_page);
    int64_t row = (pages[key / a.page_size] * a.page_size + in_page) * entry;
    for (; j < stop; ++j, row += entry) block.at[j] = row;
    block.run_end[block.num_runs++] = static_cast<uint8_t>(stop);
  }
  // Keys before the window lie in pages that nobody promised, and past the end there are none, up to
  // a multiple of 16: the nearest key stands in for them, and its weight there is zero.
  for (int64_t j = 0; j < block.oldest; ++j) block.at[j] = block.at[block.oldest];
  for (int64_t j = block.num; j % 16; ++j) block.at[j] = block.at[block.num - 1];
}

// What of a block's keys, or values, in `cache` is read for a piece, in as few spans of memory as that
// makes: at most kKeyBlock, from `end` on. Returns where they end.
template <typename T>
FSSA_INLINE Span* spans_of(const AttentionCall& a, const void* cache, const AttentionPiece& piece,
                           const KeyBlock& block, Span* end) {
  const int64_t groups = a.num_heads / a.num_kv_heads;
  const int64_t kv_head = piece.first_head / groups;
  const int64_t last = (piece.first_head + piece.heads - 1) / groups;
  const int64_t read = (last - kv_head + 1) * a.head_dim;
  const int64_t bytes = read * static_cast<int64_t>(sizeof(T));
  const bool whole = read == a.num_kv_heads * a.head_dim;
  const T* const rows = static_cast<const T*>(cache) + kv_head * a.head_dim;
  int64_t j = block.oldest;
  for (int64_t run = 0; run < block.num_runs; ++run) {
    const int64_t stop = block.run_end[run];
    if (whole) {
      *end++ = {reinterpret_cast<const char*>(rows + block.at[j]), (stop - j) * bytes};
      j = stop;
    }
    for (; j < stop; ++j) *end++ = {reinterpret_cast<const char*>(rows + block.at[j]), bytes};
  }
  return end;
}

// A piece takes a block in: scores of all its KV heads, then their softmax, then their values, since
// within one head each needs the one before. Meanwhile as many bytes are brought as it reads: its
// values while keys are turned round and scored, the next block's keys during the mixing. Both
// blocks whole would not fit the first-level cache, and a core that asks for more at once waits.
template <typename T>
FSSA_INLINE void attend_block(const AttentionCall& a, const AttentionPiece& piece,
                              const AttentionScratch& s, const KeyBlock& block, Ahead& ahead) {
  constexpr int kScoreRows = kMaxRows < 8 ? kMaxRows : 8, kMixRows = kMaxRows < 8 ? kMaxRows : 4;
  const int64_t padded = padded_dim(a.head_dim);
  for_each_part(a, piece, s, [&](const AttentionPiece& part, const AttentionScratch& own,
                                 int64_t kv_head) {
    const T* const keys = static_cast<const T*>(a.k_cache) + kv_head * a.head_dim;
    for (int64_t j = 0; j < block.num; j += 16) {
      turn_round(own.keys + j, keys, block.at + j, a.head_dim, ahead);
    }
    const int64_t num_rows = part.num_tokens * part.heads;
    for (int64_t row = 0; row < num_rows; row += kScoreRows) {
      score_rows_of<kScoreRows, T>(num_rows - row, a, part, own, row, block.num, ahead);
    }
  });
  for_each_part(a, piece, s, [&](const AttentionPiece& part, const AttentionScratch& own, int64_t) {
    for (int64_t row = 0; row < part.num_tokens * part.heads; ++row) {
      soften_row(a, part, own, row, block.first, block.num);
    }
  });
  for_each_part(a, piece, s, [&](const AttentionPiece& part, const AttentionScratch& own,
                                 int64_t kv_head) {
    const T* const values = static_cast<const T*>(a.v_cache) + kv_head * a.head_dim;
    const int64_t num_rows = part.num_tokens * part.heads;
    for (int64_t row = 0; row < num_rows; row += kMixRows) {
      mix_rows_of<kMixRows>(num_rows - row, values, block.at, block.num,
                            own.weights + row * kKeyBlock, own.sums.out + row * padded, padded,
                            a.head_dim, ahead);
    }
  });
}

// Results of a piece's rows, from what was summed up of all their keys.
template <typename T>
FSSA_INLINE void store_rows(const AttentionCall& a, const AttentionPiece& piece,
                            const AttentionScratch& s, const RowSums& sums,
                            const RowsForOthers& rows) {
  const int64_t padded = padded_dim(a.head_dim);
  AttentionScratch from = s;
  from.sums = sums;
  for_each_part(a, piece, from, [&](const AttentionPiece& part, const AttentionScratch& own, int64_t) {
    for (int64_t r = 0; r < part.num_tokens * part.heads; ++r) {
      T* out = static_cast<T*>(a.out) + (part.first_token + r / part.heads) * a.out_stride +
               (part.first_head + r % part.heads) * a.head_dim;
      const Vec inverse = broadcast(1.0f / sum(load(own.sums.total + r * 16)));
      for (int64_t d = 0; d < a.head_dim; d += 16) {
        rows.store(out + d, mul(load(own.sums.out + r * padded + d), inverse), a.head_dim - d);
      }
    }
  });
}

// Results of the token of a piece, all heads, from the splits that the threads have left.
template <typename T>
FSSA_INLINE void store_divided(const AttentionCall& a, AttentionPiece piece,
                               const AttentionScratch& s, const RowsForOthers& rows) {
  const int64_t padded = padded_dim(a.head_dim);
  const int64_t first = num_splits(a.oldest_key(piece) + 1) - 1, stop = num_splits(a.num_keys(piece));
  for (int64_t head = 0; head < a.num_heads; head += kQueryRows) {
    piece.first_head = head;
    piece.heads = smaller(kQueryRows, a.num_heads - head);
    const auto sums_of = [&](int64_t split) {
      RowSums sums = a.split_sums(piece.divided, split);
      sums.skip(head, padded);
      return sums;
    };
    const RowSums sums = sums_of(first);
    for (int64_t split = first + 1; split < stop; ++split) {
      put_together(sums, sums_of(split), piece.heads, padded);
    }
    store_rows<T>(a, piece, s, sums, rows);
  }
}

// A piece, whose first block is `block`; on return that is the first one of `next`, if there is one.
// Both are memory for a block, which change places.
template <typename T>
FSSA_INLINE void attend(const AttentionCall& a, const AttentionPiece& piece,
                        const AttentionPiece* next, const AttentionScratch& scratch,
                        const RowsForOthers& rows, KeyBlock*& block, KeyBlock*& coming) {
  const int64_t padded = padded_dim(a.head_dim);
  const int64_t num_rows = piece.num_tokens * piece.heads;
  AttentionScratch s = scratch;
  if (piece.divided) {
    s.sums = a.split_sums(piece.divided, num_splits(piece.first_key + 1) - 1);
    s.sums.skip(piece.first_head, padded);
  }
  clear(s.sums, num_rows, padded);
  if constexpr (kWidensQueries<T>) {
    for_each_part(a, piece, s, [&](const AttentionPiece& part, const AttentionScratch& own,
                                   int64_t) {
      for (int64_t r = 0; r < part.num_tokens * part.heads; ++r) {
        const T* q = query<T>(a, part, r);
        for (int64_t d = 0; d < a.head_dim; d += 16) {
          store(own.queries + r * padded + d, load_up_to(q + d, a.head_dim - d));
        }
      }
    });
  }
  int64_t split = split_stop(block->first);
  bool is_first = true;
  const auto end_split = [&] {
    if (is_first) {
      const RowSums free = s.before;
      s.before = s.sums;
      s.sums = free;
    } else {
      put_together(s.before, s.sums, num_rows, padded);
    }
    is_first = false;
  };
  for (int64_t first = block->first; first < piece.stop_key; first += kKeyBlock) {
    if (first == split) {
      end_split();
      clear(s.sums, num_rows, padded);
      split = split_stop(first);
    }
    // This block's values, then the next one's keys come from memory while this one is computed.
    const bool ends = first + kKeyBlock >= piece.stop_key;
    const AttentionPiece* reader = ends ? next : &piece;
    Span spans[2 * kKeyBlock];
    Span* stop = spans_of<T>(a, a.v_cache, piece, *block, spans);
    if (reader != nullptr) {
      find_block(a, *reader, ends ? first_block(*reader) : first + kKeyBlock, *coming);
      stop = spans_of<T>(a, a.k_cache, *reader, *coming, stop);
    }
    Ahead ahead = requests_for(spans, stop);
    attend_block<T>(a, piece, s, *block, ahead);
    fetch_rest(ahead);
    if (reader != nullptr) {
      KeyBlock* const done = block;
      block = coming;
      coming = done;
    }
  }
  if (piece.divided) {
    if (a.completes(piece)) store_divided<T>(a, piece, s, rows);
  } else {
    end_split();
    store_rows<T>(a, piece, s, s.before, rows);
  }
}

FSSA_INLINE AttentionScratch scratch_of(const AttentionCall& a, int64_t thread) {
  const int64_t padded = padded_dim(a.head_dim), sums = RowSums::floats(kQueryRows, padded);
  float* const memory = a.memory_of(thread);
  float* const keys = memory + 2 * sums;
  float* const weights = keys + kKeyBlock * padded;
  return {{memory, kQueryRows, padded},
          {memory + sums, kQueryRows, padded},
          keys,
          weights,
          weights + kQueryRows * kKeyBlock};
}

template <typename T>
void attention(const AttentionCall& a, Team& team) {
  const int64_t batch = a.num_sequences.get(), tokens = a.num_tokens.get();
  const AttentionScratch s = scratch_of(a, team.index());
  const int64_t size = sizeof(T);
  const RowsForOthers rows(team, a.out, a.out_stride * size, a.head_dim * size);
  // A piece is computed when the thread's next is known.
  AttentionWalk walk(a, team);
  AttentionPiece at_hand{}, next{};
  if (walk.next(at_hand)) {
    KeyBlock memory[2];
    KeyBlock *block = memory, *coming = memory + 1;
    find_block(a, at_hand, first_block(at_hand), *block);
    Span spans[kKeyBlock];
    Ahead ahead = requests_for(spans, spans_of<T>(a, a.k_cache, at_hand, *block, spans));
    fetch_rest(ahead);
    while (walk.next(next)) {
      attend<T>(a, at_hand, &next, s, rows, block, coming);
      at_hand = next;
    }
    attend<T>(a, at_hand, nullptr, s, rows, block, coming);
  }
  rows.finish();
  // Rows that belong to no request are zero.
  if (team.index() == 0) {
    const int64_t used = batch ? a.q_indptr[batch] : 0, first = batch ? a.q_indptr[0] : 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (first <= t && t < used) continue;
      T* out = static_cast<T*>(a.out) + t * a.out_stride;
      for (int64_t i = 0; i < a.num_heads * a.head_dim; ++i) out[i] = T{};
    }
  }
}

}  // namespace FSSA_ISA
