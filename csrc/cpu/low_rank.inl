// The low-rank term of the modulated linear: v = g (A x) for a team's rows, and its product with B.
namespace FSSA_ISA {

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

static_assert(kMaxRows <= kMostRows, "");

// What B is multiplied with, v, into `out`: it has B's dtype, or its values in fp32 where x is read in
// fp32.
template <typename X>
FSSA_INLINE void store_low_rank(const ModulatedLinearCall& a, float* out, int64_t at, Vec v,
                                int64_t valid) {
  if constexpr (sizeof(X) == 4) {
    if (a.lora_b.dtype == DType::kBFloat16) v = round_bf16(v);
    store_up_to(out + at, v, valid);
  } else {
    store_as(out, a.lora_b.dtype, at, v, valid);
  }
}

// The same from u = A x of row t and columns of A from `first` on; for core, u itself, which `mix`
// turns into v.
template <typename X>
FSSA_INLINE void store_shrunk(const ModulatedLinearCall& a, float* out, int64_t t, int64_t first,
                              Vec u) {
  const int64_t at = t * a.width() + first, valid = smaller(kHalfColumns, a.width() - first);
  if (a.family == Family::kCore) {
    store_up_to(a.unmixed + at, u, valid);
    return;
  }
  if (a.family == Family::kGated) {
    u = mul(u, load_first_as(a.user_row(t, first), a.rows.dtype, 0, valid));
  }
  store_low_rank<X>(a, out, at, u, valid);
}

// acc += x A^T for kRows rows, one half of A and a part of its columns, with which x begins.
template <typename A, int kRows, typename X>
FSSA_INLINE void multiply_shrink(const ModulatedLinearCall& a, const SpacedRows<kRows, X>& x,
                                 const char* panel, Vec (&acc)[kRows][1], Ahead& ahead) {
  if constexpr (kReadsCompressed && sizeof(A) == 2 && sizeof(X) == 2) {
    if (a.lora_a.header_bytes != 0) {
      accumulate_compressed(x, panel, a.lora_a.header_bytes, a.part_columns(), acc, ahead);
      return;
    }
  }
  accumulate<kStepBytes / 2>(x, packed_at<A>(panel, 0), a.part_columns(), acc, ahead, kHalfColumns);
}

// u = A x of rows [t, t + kRows) and 16 columns of A: v of all parts of x, or one part into `partial`.
template <int kRows, typename X, typename A>
FSSA_NOINLINE void shrink_tile(const ModulatedLinearCall& a, const Input<X>& input, int64_t t,
                               int64_t half, Range parts, Ahead& brought) {
  Ahead ahead = brought;
  const int64_t first = half * kHalfColumns, all = a.shrink_parts();
  if (a.family == Family::kGated) {
    for (int r = 0; r < kRows; ++r) prefetch(a.user_row(t + r, first));
  }
  Vec sums[kRows];  // in memory: some loops over them are too long to be unrolled
  for (int64_t part = parts.first; part < parts.last; ++part) {
    Vec acc[kRows][1];
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) acc[r][0] = broadcast(0.0f);
    auto rows = input.template rows<kRows>(t);
    rows.advance(part * a.part_columns());
    multiply_shrink<A>(a, rows, a.shrink_panel(half * all + part), acc, ahead);
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums[r] = part == parts.first ? acc[r][0] : add(sums[r], acc[r][0]);
    }
  }
  brought = ahead;
  if (parts.last - parts.first == all) {
    for (int r = 0; r < kRows; ++r) store_shrunk<X>(a, a.low_rank, t + r, first, sums[r]);
  } else {
    const int64_t valid = smaller(kHalfColumns, a.width() - first);
    for (int r = 0; r < kRows; ++r) {
      float* to = a.partial + ((t + r) * all + parts.first) * a.width() + first;
      store_up_to(to, sums[r], valid);
    }
  }
}

template <int kRows, typename A, typename X>
FSSA_INLINE void shrink_tile_of(int64_t rows, const ModulatedLinearCall& a, const Input<X>& input,
                                int64_t t, int64_t half, Range parts, Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      shrink_tile_of<kRows - 1, A>(rows, a, input, t, half, parts, ahead);
      return;
    }
  }
  shrink_tile<kRows, X, A>(a, input, t, half, parts, ahead);
}

// v of row t into `out`, from u of every part.
template <typename X>
FSSA_INLINE void add_parts(const ModulatedLinearCall& a, float* out, int64_t t) {
  const int64_t parts = a.shrink_parts();
  const float* const u = a.partial + t * parts * a.width();
  for (int64_t first = 0; first < a.width(); first += kHalfColumns) {
    const int64_t valid = smaller(kHalfColumns, a.width() - first);
    Vec sum = load_up_to(u + first, valid);
    for (int64_t part = 1; part < parts; ++part) {
      sum = add(sum, load_up_to(u + part * a.width() + first, valid));
    }
    store_shrunk<X>(a, out, t, first, sum);
  }
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

// In how many pieces threads share out a tile's half of A: its parts where there is a single tile, which
// has fewer halves than there may be threads.
FSSA_INLINE int64_t shrink_pieces(const ModulatedLinearCall& a, int64_t num_tokens) {
  return num_tokens <= kMaxRows ? a.shrink_parts() : 1;
}

template <typename A, typename X>
FSSA_INLINE void shrink(const ModulatedLinearCall& a, const Input<X>& input, int64_t num_tokens,
                        Team& team) {
  const int64_t halves = a.shrink_halves(), tiles = num_tiles(num_tokens);
  const int64_t parts = a.shrink_parts(), pieces = shrink_pieces(a, num_tokens);
  const Range mine = team.share(tiles * halves * pieces);
  const Runs rows(num_tokens, tiles);
  FirstReads& due = team.due();
  Ahead ahead = requests_for(due.begin(), due.end());
  for (int64_t i = mine.first; i < mine.last; ++i) {
    const int64_t tile = i / pieces / halves, half = i / pieces % halves, piece = i % pieces;
    const int64_t first = rows.begin(tile), last = rows.begin(tile + 1);
    const Range of_piece{parts * piece / pieces, parts * (piece + 1) / pieces};
    shrink_tile_of<kMaxRows, A>(last - first, a, input, first, half, of_piece, ahead);
  }
  due.left_from(unread(ahead, due.begin()));
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
      store_low_rank<X>(a, a.low_rank, t * a.width() + first + r, load_up_to(values, num), num);
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

// v of every row, or its parts; the team has it once it has arrived after this.
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
    for (int64_t t = mine.first; t < mine.last; ++t) {
      if (shrink_pieces(a, num_tokens) > 1) add_parts<X>(a, a.low_rank, t);
      mix<X>(a, t);
    }
  }
}

// Where v of every row is, after that. Of a few rows every thread adds up the parts for itself: that is
// sooner done than waiting for one another again.
template <typename X>
FSSA_INLINE const float* low_rank_of(const ModulatedLinearCall& a, int64_t num_tokens,
                                     const Team& team) {
  const bool in_parts = a.has_common_factors() && shrink_pieces(a, num_tokens) > 1;
  if (!in_parts || a.family == Family::kCore) return a.low_rank;
  float* const own = a.own + team.index() * kMostRows * a.width();
  for (int64_t t = 0; t < num_tokens; ++t) add_parts<X>(a, own, t);
  return own;
}

// What a step of the product with B asks for.
constexpr int kEarlyBytes = 64;

// acc += v B^T for kHalves halves of a panel, from half `first` on; the second one's v begins `apart`
// numbers after the first one's.
template <typename B, int kRows, int kHalves, typename V>
FSSA_INLINE void expand_halves(const ModulatedLinearCall& a, const SpacedRows<kRows, V>& v,
                               int64_t panel, int first, int64_t apart,
                               Vec (&acc)[kRows][kHalves], Ahead& ahead) {
  if constexpr (kReadsCompressed && kHalves == 2 && sizeof(B) == 2 && sizeof(V) == 2) {
    if (a.lora_b.header_bytes != 0) {
      accumulate_compressed(v, a.expand_panel(panel), a.lora_b.header_bytes, a.rank, acc, ahead,
                            apart);
      return;
    }
  }
  const B* b = half_at<B>(a.expand_panel(panel), 0, first);
  if (kHalves == 1 || apart == 0) {  // Both halves multiply the same numbers: read once.
    accumulate<kEarlyBytes>(v, b, a.rank, acc, ahead);
  } else {
    accumulate<kEarlyBytes>(v, b, a.rank, acc, ahead, kPanelColumns, apart);
  }
}

// acc += v B^T for kRows rows and kHalves halves of a panel, from half `first` on.
template <int kRows, int kHalves, typename V, typename B>
FSSA_INLINE void expand_packed(const ModulatedLinearCall& a, const float* low_rank, int64_t t,
                               int64_t panel, int first, Vec (&acc)[kRows][kHalves],
                               Ahead& brought) {
  const Half* halves = a.halves + 2 * panel + first;
  const SpacedRows<kRows, V> v(
      reinterpret_cast<const V*>(low_rank) + t * a.width() + halves[0].split * a.rank, a.width());
  int64_t apart = 0;
  if constexpr (kHalves == 2) {
    if (halves[1].valid) apart = (halves[1].split - halves[0].split) * a.rank;
  }
  Ahead ahead = early_requests(brought);
  expand_halves<B>(a, v, panel, first, apart, acc, ahead);
  count_early(brought, ahead);
}

// The same with each row's own B.
template <int kRows, int kHalves>
FSSA_INLINE void expand_own(const ModulatedLinearCall& a, const float* low_rank, int64_t t,
                            int64_t panel, int first, Vec (&acc)[kRows][kHalves]) {
  float term[kRows][kHalves][kHalfColumns] = {};
  for (int h = 0; h < kHalves; ++h) {
    const Half& half = a.halves[2 * panel + first + h];
    for (int r = 0; r < kRows; ++r) {
      const float* v = low_rank + (t + r) * a.width();
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
  if (!a.has_common_factors()) return;
  const char* b = a.expand_panel(panel);
  for (int64_t i = 0; i < a.expand_bytes(); i += 64) prefetch(b + i);
}

}  // namespace FSSA_ISA
