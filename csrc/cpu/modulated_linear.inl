// Kernel of the modulated linear. Every output is one chain of additions over k in order, whatever
// rows share the tile, so a row's bits do not depend on its neighbours.
namespace FSSA_ISA {

// What will be read next, brought into the cache while something else is computed, as much with
// every step of the inner loop as the step reads: one piece of memory, then those in a queue.
struct Ahead {
  const char* at;
  const char* end;
  Span* queue;
  Span* queue_end;
};

struct NothingAhead {};

constexpr int64_t kStepBytes = kPanelColumns * 4;
// How far beyond the next panel may be brought.
constexpr int64_t kLeadBytes = 64 * 1024;

template <int kRows, int kBytes>
FSSA_INLINE void fetch(NothingAhead&) {}

template <int kRows, int kBytes>
FSSA_INLINE void fetch(Ahead& ahead) {
  if (ahead.at >= ahead.end) {
    if (ahead.queue == ahead.queue_end) return;
    ahead.at = ahead.queue->data;
    ahead.end = ahead.at + ahead.queue->bytes;
    ++ahead.queue;
  }
  constexpr int kEvery = kRows < kBothLinesRows ? 2 : 1;
  FSSA_UNROLL
  for (int line = 0; line < kBytes / 64; line += kEvery) prefetch(ahead.at + 64 * line);
  ahead.at += kBytes;
}

// The queue, which began at `queue`, after a loop: what is left of the piece at hand goes back.
FSSA_INLINE Span* unread(const Ahead& ahead, Span* queue) {
  if (ahead.queue == queue || ahead.at >= ahead.end) return ahead.queue;
  *(ahead.queue - 1) = {ahead.at, ahead.end - ahead.at};
  return ahead.queue - 1;
}

// Where the rows of x for the second half of a panel are, seen from those for the first.
struct Same {};

FSSA_INLINE int64_t second(Same) { return 0; }
FSSA_INLINE int64_t second(int64_t distance) { return distance; }

// Rows of x at any places.
template <typename T>
struct ScatteredRows {
  using Value = T;

  const T* const* rows;
  int64_t column = 0;

  FSSA_INLINE_MEMBER const T* at(int r) const { return rows[r] + column; }
  FSSA_INLINE_MEMBER void advance(int64_t columns) { column += columns; }
};

// Rows of x a constant distance apart. A register for every four of them and two for the distance:
// a dozen pointers are more than the machine has registers for, and moving them in and out cost 7 %
// of a product that is bound by its multiplications.
template <int kRows, typename T>
struct SpacedRows {
  using Value = T;

  const T* fours[(kRows + 3) / 4];
  int64_t distance, thrice;

  FSSA_INLINE_MEMBER SpacedRows(const T* first, int64_t stride)
      : distance(stride), thrice(3 * stride) {
    for (int r = 0; r < kRows; r += 4) fours[r / 4] = first + r * stride;
    opaque(distance);
    opaque(thrice);
  }

  FSSA_INLINE_MEMBER const T* at(int r) const {
    const T* four = fours[r / 4];
    return r % 4 == 3 ? four + thrice : four + r % 4 * distance;
  }

  FSSA_INLINE_MEMBER void advance(int64_t columns) {
    FSSA_UNROLL
    for (int i = 0; i < (kRows + 3) / 4; ++i) fours[i] += columns;
  }
};

// The bits of a number that bf16 holds.
FSSA_INLINE uint32_t as_bf16_bits(BFloat16 value) { return value.bits; }
FSSA_INLINE uint32_t as_bf16_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits >> 16;
}

// The products of column kColumn from here on, which lies in the pairs at `w`.
template <int kColumn, int kRows, int kHalves, typename Rows, typename Apart>
FSSA_INLINE void add_column(const Rows& x, const uint32_t* w, Vec (&acc)[kRows][kHalves],
                            Apart apart) {
  const auto half = [&](int h) {
    const Pairs pairs = load_pairs(w + kHalfColumns * h);
    return kColumn % 2 ? high(pairs) : low(pairs);
  };
  if constexpr (kRoomForPanel) {
    Vec columns[kHalves];
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) columns[h] = half(h);
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        add_product(acc[r][h], columns[h], x.at(r) + kColumn + h * second(apart));
      }
    }
  } else {
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      const Vec columns = half(h);
      FSSA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        add_product(acc[r][h], columns, x.at(r) + kColumn + h * second(apart));
      }
    }
  }
}

// acc += x W^T for kRows rows and the first kHalves halves at `panel`, of a packed matrix [*, k]
// whose next column pair is `step` words away.
template <int kAheadBytes = kStepBytes, int kRows, int kHalves, typename Rows, typename Next,
          typename Apart = Same>
FSSA_INLINE void accumulate(Rows x, const BFloat16* panel, int64_t k, Vec (&acc)[kRows][kHalves],
                            Next&& ahead, int64_t step = kPanelColumns, Apart apart = {}) {
  const uint32_t* w = reinterpret_cast<const uint32_t*>(panel);
  int64_t p = 0;
  if constexpr (sizeof(typename Rows::Value) == 4) {
    // Two pairs at a time: what a step does beside multiplying is a sixth of its instructions.
    for (; p + 2 <= k / 2; p += 2, w += 2 * step) {
      fetch<kRows, 2 * kAheadBytes>(ahead);
      add_column<0>(x, w, acc, apart);
      add_column<1>(x, w, acc, apart);
      add_column<2>(x, w + step, acc, apart);
      add_column<3>(x, w + step, acc, apart);
      x.advance(4);
    }
  }
  for (; p < k / 2; ++p, w += step) {
    if constexpr (sizeof(typename Rows::Value) == 4) {
      add_column<0>(x, w, acc, apart);
      add_column<1>(x, w, acc, apart);
    } else {
      Pairs columns[kHalves];
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) columns[h] = load_pairs(w + kHalfColumns * h);
      fetch<kRows, kAheadBytes>(ahead);
      FSSA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSSA_UNROLL
        for (int h = 0; h < kHalves; ++h) {
          const Pairs pair = broadcast_pair(x.at(r) + h * second(apart));
          acc[r][h] = dot_pairs(acc[r][h], columns[h], pair);
        }
      }
    }
    x.advance(2);
  }
  if (k % 2) {
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        const Pairs pair = broadcast_bits(as_bf16_bits(x.at(r)[h * second(apart)]));
        acc[r][h] = dot_pairs(acc[r][h], load_pairs(w + kHalfColumns * h), pair);
      }
    }
  }
}

template <int kAheadBytes = kStepBytes, int kRows, int kHalves, typename Rows, typename Next,
          typename Apart = Same>
FSSA_INLINE void accumulate(Rows x, const float* panel, int64_t k, Vec (&acc)[kRows][kHalves],
                            Next&& ahead, int64_t step = kPanelColumns, Apart apart = {}) {
  const float* w = panel;
  for (int64_t i = 0; i < k; ++i, w += step) {
    Vec columns[kHalves];
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) columns[h] = load(w + kHalfColumns * h);
    fetch<kRows, kAheadBytes>(ahead);
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        add_product(acc[r][h], columns[h], x.at(r) + h * second(apart));
      }
    }
    x.advance(1);
  }
}

// What lies `bytes` into a packed matrix.
template <typename W>
FSSA_INLINE const W* packed_at(const void* packed, int64_t bytes) {
  return reinterpret_cast<const W*>(static_cast<const char*>(packed) + bytes);
}

// The same, at half `half` of the panel that begins there.
template <typename W>
FSSA_INLINE const W* half_at(const void* packed, int64_t bytes, int half) {
  return packed_at<W>(packed, bytes + half * (kStepBytes / 2));
}

// Dot products of x with `num` rows of a row-major matrix.
template <typename X, typename A>
FSSA_INLINE void dots(const X* x, const A* a, int64_t stride, int64_t k, int64_t num, float* out) {
  for (int64_t n = 0; n < num; ++n) {
    const A* row = a + n * stride;
    Vec acc = broadcast(0.0f);
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) acc = fma(load(row + i), load(x + i), acc);
    if (i < k) acc = fma(load_first(row + i, k - i), load_first(x + i, k - i), acc);
    out[n] = sum(acc);
  }
}

template <typename X>
FSSA_INLINE void dots_any(const X* x, const SideMatrix& a, int64_t offset, int64_t k, int64_t num,
                          float* out) {
  if (a.dtype == DType::kFloat32) {
    dots(x, static_cast<const float*>(a.data) + offset, a.stride, k, num, out);
  } else {
    dots(x, static_cast<const BFloat16*>(a.data) + offset, a.stride, k, num, out);
  }
}

// The rows of x as products read them: where they lie, or widened to fp32.
template <typename X>
struct Input {
  const X* x;
  int64_t stride;

  template <int kRows>
  FSSA_INLINE_MEMBER SpacedRows<kRows, X> rows(int64_t t) const {
    return SpacedRows<kRows, X>(x + t * stride, stride);
  }
};

// What B is multiplied with, v, has B's dtype, or its values in fp32 where x is read in fp32.
template <typename X>
FSSA_INLINE void store_low_rank(const ModulatedLinearCall& a, int64_t at, Vec v, int64_t valid) {
  if constexpr (sizeof(X) == 4) {
    if (a.lora_b.dtype == DType::kBFloat16) v = round_bf16(v);
    store_up_to(a.low_rank + at, v, valid);
  } else {
    store_as(a.low_rank, a.lora_b.dtype, at, v, valid);
  }
}

// v = A x, times g for gated. For core u = A x in fp32, which `mix` turns into v.
//
// Rows [t, t + kRows), 16 columns of A.
template <int kRows, typename X, typename A>
FSSA_NOINLINE void shrink_tile(const ModulatedLinearCall& a, const Input<X>& input, int64_t t,
                               int64_t half, Ahead ahead) {
  Vec acc[kRows][1];
  for (int r = 0; r < kRows; ++r) acc[r][0] = broadcast(0.0f);
  const int64_t first = half * kHalfColumns, valid = smaller(kHalfColumns, a.width() - first);
  if (a.family == Family::kGated) {
    for (int r = 0; r < kRows; ++r) prefetch(a.user_row(t + r, first));
  }
  const A* columns =
      packed_at<A>(a.lora_a.data, half * half_bytes(a.lora_a.dtype, a.in_features));
  accumulate(input.template rows<kRows>(t), columns, a.in_features, acc, ahead, kHalfColumns);
  for (int r = 0; r < kRows; ++r) {
    Vec value = acc[r][0];
    const int64_t at = (t + r) * a.width() + first;
    if (a.family == Family::kGated) {
      value = mul(value, load_first_as(a.user_row(t + r, first), a.rows.dtype, 0, valid));
    }
    if (a.family == Family::kCore) {
      store_up_to(a.unmixed + at, value, valid);
    } else {
      store_low_rank<X>(a, at, value, valid);
    }
  }
}

template <int kRows, typename A, typename X>
FSSA_INLINE void shrink_tile_of(int64_t rows, const ModulatedLinearCall& a, const Input<X>& input,
                                int64_t t, int64_t half, Ahead ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      shrink_tile_of<kRows - 1, A>(rows, a, input, t, half, ahead);
      return;
    }
  }
  shrink_tile<kRows, X, A>(a, input, t, half, ahead);
}

// `count` things in `parts` runs, of which the first ones have one more than the rest.
struct Runs {
  int64_t length, longer;

  FSSA_INLINE_MEMBER Runs(int64_t count, int64_t parts)
      : length(count / larger(1, parts)), longer(count % larger(1, parts)) {}

  FSSA_INLINE_MEMBER int64_t begin(int64_t run) const {
    return run * length + smaller(run, longer);
  }
};

FSSA_INLINE int64_t num_tiles(int64_t num_tokens) { return (num_tokens + kMaxRows - 1) / kMaxRows; }

template <typename A, typename X>
FSSA_INLINE void shrink(const ModulatedLinearCall& a, const Input<X>& input, int64_t num_tokens,
                        Team& team) {
  const int64_t halves = a.shrink_halves(), tiles = num_tiles(num_tokens);
  const Range mine = team.share(halves * tiles);
  const Runs rows(num_tokens, tiles);
  for (int64_t i = mine.first; i < mine.last; ++i) {
    const int64_t first = rows.begin(i / halves), last = rows.begin(i / halves + 1);
    // The last tile brings the first panel of the weight.
    const Span next = i + 1 == mine.last ? a.first_panel(team) : Span{};
    const Ahead ahead{next.data, next.data + next.bytes, nullptr, nullptr};
    shrink_tile_of<kMaxRows, A>(last - first, a, input, first, i % halves, ahead);
  }
}

// v_s = M_s u_s for every projection s of row t.
template <typename X>
FSSA_INLINE void mix(const ModulatedLinearCall& a, int64_t t) {
  SideMatrix core = a.rows;
  core.stride = a.rank;
  const float* u = a.unmixed + t * a.width();
  for (int64_t first = 0; first < a.width(); first += a.rank) {
    for (int64_t r = 0; r < a.rank; r += kHalfColumns) {
      const int64_t num = smaller(kHalfColumns, a.rank - r);
      float values[kHalfColumns];
      dots_any(u + first, core, a.slots[t] * a.rows.stride + (first + r) * a.rank, a.rank, num,
               values);
      store_low_rank<X>(a, t * a.width() + first + r, load_up_to(values, num), num);
    }
  }
}

// v = A_u x for row t, with the user's own A.
template <typename X>
FSSA_INLINE void shrink_own(const ModulatedLinearCall& a, const Input<X>& input, int64_t t) {
  float* out = a.low_rank + t * a.width();
  dots_any(input.x + t * input.stride, a.lora_a, a.slots[t] * a.lora_a.user_stride, a.in_features,
           a.width(), out);
}

// v of every row; the team has it once it has arrived after this.
template <typename X>
FSSA_INLINE void low_rank(const ModulatedLinearCall& a, const Input<X>& input, int64_t num_tokens,
                          Team& team) {
  if (a.family == Family::kFactors) {
    const Range mine = team.share(num_tokens);
    for (int64_t t = mine.first; t < mine.last; ++t) shrink_own(a, input, t);
    return;
  }
  if (a.lora_a.dtype == DType::kBFloat16) {
    shrink<BFloat16>(a, input, num_tokens, team);
  } else {
    shrink<float>(a, input, num_tokens, team);
  }
  if (a.family == Family::kCore) {
    team.barrier();
    const Range mine = team.share(num_tokens);
    for (int64_t t = mine.first; t < mine.last; ++t) mix<X>(a, t);
  }
}

// acc += v B^T for kRows rows and kHalves halves of a panel, from half `first` on.
template <int kRows, int kHalves, typename V, typename B>
FSSA_INLINE void expand_packed(const ModulatedLinearCall& a, int64_t t, int64_t panel, int first,
                               Vec (&acc)[kRows][kHalves], Ahead& ahead) {
  const Half* halves = a.halves + 2 * panel + first;
  const SpacedRows<kRows, V> v(
      reinterpret_cast<const V*>(a.low_rank) + t * a.width() + halves[0].split * a.rank, a.width());
  const B* b = half_at<B>(a.lora_b.data, panel * panel_bytes(a.lora_b.dtype, a.rank), first);
  if constexpr (kHalves == 1) {
    accumulate<kStepBytes / 2>(v, b, a.rank, acc, ahead);
  } else {
    const int64_t apart = (halves[1].valid ? halves[1].split - halves[0].split : 0) * a.rank;
    accumulate(v, b, a.rank, acc, ahead, kPanelColumns, apart);
  }
}

// The same with each row's own B.
template <int kRows, int kHalves>
FSSA_INLINE void expand_own(const ModulatedLinearCall& a, int64_t t, int64_t panel, int first,
                            Vec (&acc)[kRows][kHalves]) {
  float term[kRows][kHalves][kHalfColumns] = {};
  for (int h = 0; h < kHalves; ++h) {
    const Half& half = a.halves[2 * panel + first + h];
    for (int r = 0; r < kRows; ++r) {
      const float* v = a.low_rank + (t + r) * a.width();
      dots_any(v + half.split * a.rank, a.lora_b,
               a.slots[t + r] * a.lora_b.user_stride + half.row * a.lora_b.stride, a.rank,
               half.valid, term[r][h]);
    }
  }
  FSSA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) acc[r][h] = add(acc[r][h], load(term[r][h]));
  }
}

// Asks for one panel of B, too short for the machine's own prefetcher to notice.
FSSA_INLINE void fetch_expand(const ModulatedLinearCall& a, int64_t panel) {
  if (a.family == Family::kNone || a.family == Family::kFactors) return;
  const int64_t bytes = panel_bytes(a.lora_b.dtype, a.rank);
  const char* b = static_cast<const char*>(a.lora_b.data) + panel * bytes;
  for (int64_t i = 0; i < bytes; i += 64) prefetch(b + i);
}

// y = the sums of kRows rows of one half.
template <int kRows, int kHalves, typename Y>
FSSA_INLINE void store_half(Y* y, int64_t stride, int64_t valid, const Vec (&acc)[kRows][kHalves],
                            int h) {
  if (valid == kHalfColumns) {
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) store(y + r * stride, acc[r][h]);
  } else {
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) store_first(y + r * stride, acc[r][h], valid);
  }
}

// y = activation(gate) up for kRows rows of a panel whose halves are the two. Both in memory: the
// loop over them is too long to be unrolled.
template <int kRows>
FSSA_INLINE void store_activated(const ModulatedLinearCall& a, int64_t t, const Half& half,
                                 const Vec (&sums)[2][kRows]) {
  for (int r = 0; r < kRows; ++r) {
    const Vec gate = a.epilogue == Epilogue::kSiluMul ? silu(sums[0][r]) : gelu_tanh(sums[0][r]);
    store_as(a.y, a.y_dtype, (t + r) * a.y_stride + half.column, mul(gate, sums[1][r]),
             half.valid);
  }
}

// Rows [t, t + kRows) of one panel, from the product to the stored result, as many halves at a time
// as the registers hold sums of. `ready` is called once the product is done and before the low-rank
// term is needed; `brought` goes on in both. Sums are named by constants alone, in loops that are
// unrolled: so they stay in registers.
template <int kRows, typename T, typename X, typename Ready>
FSSA_NOINLINE void tile(const ModulatedLinearCall& a, const Input<X>& input, int64_t t,
                        int64_t panel, const Ready& ready, Ahead& brought) {
  constexpr int kHalves = 2 * kRows <= kMaxSums ? 2 : 1;
  Vec activated[2][kRows];
  Ahead ahead = brought;
  for (int first = 0; first < 2; first += kHalves) {
    Vec acc[kRows][kHalves];
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) acc[r][h] = broadcast(0.0f);
    }
    accumulate<kStepBytes / 2 * kHalves>(input.template rows<kRows>(t),
                                         half_at<T>(a.panel(panel), 0, first), a.in_features, acc,
                                         ahead);
    ready();
    if (a.family == Family::kFactors) {
      expand_own(a, t, panel, first, acc);
    } else if (a.family != Family::kNone) {
      if (a.lora_b.dtype == DType::kFloat32) {
        expand_packed<kRows, kHalves, float, float>(a, t, panel, first, acc, ahead);
      } else {
        expand_packed<kRows, kHalves, X, BFloat16>(a, t, panel, first, acc, ahead);
      }
    }
    const Half* halves = a.halves + 2 * panel + first;
    if (a.bias != nullptr) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        const Vec bias = load_first_as(a.bias, a.dtype, halves[h].row, halves[h].valid);
        FSSA_UNROLL
        for (int r = 0; r < kRows; ++r) acc[r][h] = add(acc[r][h], bias);
      }
    }
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      const int64_t at = t * a.y_stride + halves[h].column;
      if (a.epilogue != Epilogue::kNone) {
        FSSA_UNROLL
        for (int r = 0; r < kRows; ++r) activated[first + h][r] = acc[r][h];
      } else if (a.y_dtype == DType::kFloat32) {
        store_half(static_cast<float*>(a.y) + at, a.y_stride, halves[h].valid, acc, h);
      } else {
        store_half(static_cast<BFloat16*>(a.y) + at, a.y_stride, halves[h].valid, acc, h);
      }
    }
  }
  brought = ahead;
  if (a.epilogue != Epilogue::kNone) store_activated(a, t, a.halves[2 * panel], activated);
}

template <int kRows, typename T, typename X, typename Ready>
FSSA_INLINE void tile_of(int64_t rows, const ModulatedLinearCall& a, const Input<X>& input,
                         int64_t t, int64_t panel, const Ready& ready, Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      tile_of<kRows - 1, T>(rows, a, input, t, panel, ready, ahead);
      return;
    }
  }
  tile<kRows, T>(a, input, t, panel, ready, ahead);
}

// This thread's part of `tiles`. Each is two halves wide, and a tile of the shrink is one, so that
// whoever had more of that gets less of this.
FSSA_INLINE Range product_share(const Team& team, int64_t shrink_tiles, int64_t tiles) {
  if (2 * tiles < team.size()) return team.share(tiles);
  const int64_t all = 2 * tiles + shrink_tiles, size = team.size();
  const auto bound = [&](int64_t index) {
    return (all * index / size - shrink_tiles * index / size) / 2;
  };
  return {bound(team.index()), bound(team.index() + 1)};
}

// This thread's part of the product, by tiles. `ready` as in `tile`.
template <typename T, typename X, typename Ready>
FSSA_INLINE void product(const ModulatedLinearCall& a, const Input<X>& input, int64_t num_tokens,
                         Team& team, const Ready& ready) {
  // Tiles in chunks whose x stays in L2 while the panels pass.
  constexpr int64_t kChunkBytes = 256 * 1024;
  const int64_t row_bytes = larger(1, a.in_features * static_cast<int64_t>(sizeof(X)));
  const int64_t num_panels = a.num_panels(), tiles = num_tiles(num_tokens);
  const int64_t chunk_tiles = larger(1, kChunkBytes / row_bytes / kMaxRows);
  const int64_t chunks = (tiles + chunk_tiles - 1) / chunk_tiles;
  const bool shrinks = a.family != Family::kNone && a.family != Family::kFactors;
  const Range mine =
      product_share(team, shrinks ? a.shrink_halves() * tiles : 0, num_panels * tiles);
  const Runs rows(num_tokens, tiles);
  Span* queue = team.meanwhile();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Range of_chunk{tiles * chunk / chunks, tiles * (chunk + 1) / chunks};
    const int64_t height = of_chunk.last - of_chunk.first, start = num_panels * of_chunk.first;
    const int64_t begin = larger(mine.first, start);
    const int64_t end = smaller(mine.last, start + num_panels * height);
    int64_t panel = (begin - start) / height, tile = of_chunk.first + (begin - start) % height;
    // While a panel is computed, the next one comes from memory and, since the low-rank term has
    // steps too, something of the one after it. With the last panel comes what follows.
    const char* const stop = a.panel((end - 1 - start) / height + 1);
    const char* brought = a.panel(panel + 1);
    for (int64_t i = begin; i < end; ++panel, tile = of_chunk.first) {
      fetch_expand(a, panel);
      const char* const bound = a.panel(panel + 2) + kLeadBytes;
      Ahead ahead{brought, bound < stop ? bound : stop, queue, team.meanwhile_end()};
      if (a.panel(panel + 1) == stop) {
        const Span next = end < mine.last ? Span{a.panel(0), a.panel_bytes()} : team.upcoming();
        ahead.at = next.data;
        ahead.end = next.data + next.bytes;
      }
      brought = ahead.end;
      for (; tile < of_chunk.last && i < end; ++tile, ++i) {
        const int64_t first = rows.begin(tile);
        tile_of<kMaxRows, T>(rows.begin(tile + 1) - first, a, input, first, panel, ready, ahead);
      }
      if (ahead.queue == queue && ahead.at < brought) brought = ahead.at;
      queue = unread(ahead, queue);
    }
  }
}

// This thread's part of x in fp32, for products of bf16 that are taken in fp32: once for every
// number and not once for every sixteen columns it is multiplied with.
FSSA_INLINE void widen_rows(const ModulatedLinearCall& a, int64_t num_tokens, const Team& team) {
  const int64_t k = a.in_features;
  const Range mine = team.share(num_tokens);
  for (int64_t t = mine.first; t < mine.last; ++t) {
    const BFloat16* x = static_cast<const BFloat16*>(a.x) + t * a.x_stride;
    for (int64_t i = 0; i < k; i += 16) {
      store_up_to(a.widened + t * k + i, load_up_to(x + i, k - i), k - i);
    }
  }
}

template <typename T, typename X>
FSSA_INLINE void modulated_linear_of(const ModulatedLinearCall& a, const Input<X>& input,
                                     int64_t num_tokens, Team& team) {
  const bool modulated = a.family != Family::kNone;
  if (modulated) {
    low_rank(a, input, num_tokens, team);
    team.arrive();
  }
  // The others' part of the low-rank term is waited for when the first product is done: by then
  // they have long had it.
  bool waited = !modulated;
  const auto ready = [&] {
    if (!waited) team.wait();
    waited = true;
  };
  product<T>(a, input, num_tokens, team, ready);
  ready();
}

template <typename T>
void modulated_linear(const ModulatedLinearCall& a, Team& team) {
  const int64_t num_tokens = a.count.get();
  if constexpr (sizeof(T) == 2 && kWidenedRows < INT64_MAX) {
    if (num_tokens >= kWidenedRows) {
      widen_rows(a, num_tokens, team);
      team.barrier();
      modulated_linear_of<T>(a, Input<float>{a.widened, a.in_features}, num_tokens, team);
      return;
    }
  }
  const Input<T> input{static_cast<const T*>(a.x), a.x_stride};
  modulated_linear_of<T>(a, input, num_tokens, team);
}

template <typename T>
void take_rows(const TakeRowsCall& a, Team& team) {
  const Range mine = team.share(a.count.get());
  for (int64_t t = mine.first; t < mine.last; ++t) {
    T* y = static_cast<T*>(a.y) + t * a.k;
    const int64_t row = a.index[t];
    if (!a.packed) {
      const T* from = static_cast<const T*>(a.table) + row * a.row_stride;
      for (int64_t i = 0; i < a.k; ++i) y[i] = from[i];
    } else {
      const char* panel = static_cast<const char*>(a.table) +
                          row / kPanelColumns * panel_bytes(a.dtype, a.k);
      const int64_t lane = row % kPanelColumns;
      constexpr int64_t kStep = sizeof(T) == 2 ? 2 : 1;
      const T* from = reinterpret_cast<const T*>(panel) + lane * kStep;
      for (int64_t i = 0; i < a.k; ++i) {
        y[i] = from[i / kStep * (kPanelColumns * kStep) + i % kStep];
      }
    }
    if (a.scale != 1.0f) {
      for (int64_t i = 0; i < a.k; i += 16) {
        const int64_t left = a.k - i;
        store_up_to(y + i, mul(load_up_to(y + i, left), broadcast(a.scale)), left);
      }
    }
  }
}

}  // namespace FSSA_ISA
