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

template <int kRows>
FSSA_INLINE void fetch(NothingAhead&) {}

template <int kRows>
FSSA_INLINE void fetch(Ahead& ahead) {
  if (ahead.at >= ahead.end) {
    if (ahead.queue == ahead.queue_end) return;
    ahead.at = ahead.queue->data;
    ahead.end = ahead.at + ahead.queue->bytes;
    ++ahead.queue;
  }
  prefetch(ahead.at);
  // A step of few rows is too short for two requests; the machine's own prefetcher, which takes
  // lines in pairs, brings the second. Measured: 1 to 3 rows 10 to 25 % faster, 4 and more slower.
  if (kRows > 3) prefetch(ahead.at + kStepBytes / 2);
  ahead.at += kStepBytes;
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

// acc += x W^T for kRows rows and the first kHalves halves at `panel`, of a packed matrix [*, k]
// whose next column pair is `step` words away.
template <int kRows, int kHalves, typename Next, typename Apart = Same>
FSSA_INLINE void accumulate(const BFloat16* const* x, const BFloat16* panel, int64_t k,
                            Vec (&acc)[kRows][kHalves], Next&& ahead, int64_t step = kPanelColumns,
                            Apart apart = {}) {
  const uint32_t* w = reinterpret_cast<const uint32_t*>(panel);
  for (int64_t p = 0; p < k / 2; ++p, w += step) {
    Pairs columns[kHalves];
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) columns[h] = load_pairs(w + kHalfColumns * h);
    fetch<kRows>(ahead);
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        const Pairs pair = broadcast_pair(x[r] + h * second(apart) + 2 * p);
        acc[r][h] = dot_pairs(acc[r][h], columns[h], pair);
      }
    }
  }
  if (k % 2) {
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < kHalves; ++h) {
        const Pairs pair = broadcast_bits(x[r][h * second(apart) + k - 1].bits);
        acc[r][h] = dot_pairs(acc[r][h], load_pairs(w + kHalfColumns * h), pair);
      }
    }
  }
}

template <int kRows, int kHalves, typename X, typename Next, typename Apart = Same>
FSSA_INLINE void accumulate(const X* const* x, const float* panel, int64_t k,
                            Vec (&acc)[kRows][kHalves], Next&& ahead, int64_t step = kPanelColumns,
                            Apart apart = {}) {
  const float* w = panel;
  for (int64_t i = 0; i < k; ++i, w += step) {
    Vec columns[kHalves];
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) columns[h] = load(w + kHalfColumns * h);
    fetch<kRows>(ahead);
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        const Vec value = broadcast(to_float(x[r][h * second(apart) + i]));
        acc[r][h] = fma(columns[h], value, acc[r][h]);
      }
    }
  }
}

// What lies `bytes` into a packed matrix.
template <typename W>
FSSA_INLINE const W* packed_at(const void* packed, int64_t bytes) {
  return reinterpret_cast<const W*>(static_cast<const char*>(packed) + bytes);
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

// What B is multiplied with: v = A x, times g for gated, in B's dtype. For core u = A x in fp32,
// which `mix` turns into v.
//
// Rows [t, t + kRows), 16 columns of A.
template <int kRows, typename X, typename A>
FSSA_NOINLINE void shrink_tile(const ModulatedLinearCall& a, int64_t t, int64_t half, Ahead ahead) {
  const X* x[kRows];
  Vec acc[kRows][1];
  for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const X*>(a.x) + (t + r) * a.x_stride;
    acc[r][0] = broadcast(0.0f);
  }
  const A* columns =
      packed_at<A>(a.lora_a.data, half * half_bytes(a.lora_a.dtype, a.in_features));
  accumulate(x, columns, a.in_features, acc, ahead, kHalfColumns);
  const int64_t first = half * kHalfColumns, valid = smaller(kHalfColumns, a.width() - first);
  for (int r = 0; r < kRows; ++r) {
    Vec value = acc[r][0];
    const int64_t at = (t + r) * a.width() + first;
    if (a.family == Family::kGated) {
      const int64_t state = a.slots[t + r] * a.rows.stride + first;
      value = mul(value, load_first_as(a.rows.data, a.rows.dtype, state, valid));
    }
    if (a.family == Family::kCore) {
      store_up_to(a.unmixed + at, value, valid);
    } else {
      store_as(a.low_rank, a.lora_b.dtype, at, value, valid);
    }
  }
}

template <int kRows, typename X, typename A>
FSSA_INLINE void shrink_tile_of(int64_t rows, const ModulatedLinearCall& a, int64_t t,
                                int64_t half, Ahead ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      shrink_tile_of<kRows - 1, X, A>(rows, a, t, half, ahead);
      return;
    }
  }
  shrink_tile<kRows, X, A>(a, t, half, ahead);
}

FSSA_INLINE int64_t num_tiles(int64_t num_tokens) { return (num_tokens + kMaxRows - 1) / kMaxRows; }

template <typename X, typename A>
FSSA_INLINE void shrink(const ModulatedLinearCall& a, int64_t num_tokens, Team& team) {
  const int64_t halves = a.shrink_halves(), tiles = num_tiles(num_tokens);
  const Range mine = team.share(halves * tiles);
  for (int64_t i = mine.first; i < mine.last; ++i) {
    const int64_t tile = i / halves;
    const int64_t first = num_tokens * tile / tiles, last = num_tokens * (tile + 1) / tiles;
    // The last tile brings the first panel of the weight.
    const Span next = i + 1 == mine.last ? a.first_panel(team) : Span{};
    const Ahead ahead{next.data, next.data + next.bytes, nullptr, nullptr};
    shrink_tile_of<kMaxRows, X, A>(last - first, a, first, i % halves, ahead);
  }
}

// v_s = M_s u_s for every projection s of row t.
FSSA_INLINE void mix(const ModulatedLinearCall& a, int64_t t) {
  SideMatrix core = a.rows;
  core.stride = a.rank;
  const float* u = a.unmixed + t * a.width();
  for (int64_t first = 0; first < a.width(); first += a.rank) {
    for (int64_t r = 0; r < a.rank; ++r) {
      float value;
      dots_any(u + first, core, a.slots[t] * a.rows.stride + (first + r) * a.rank, a.rank, 1,
               &value);
      fssa::store(a.low_rank, a.lora_b.dtype, t * a.width() + first + r, value);
    }
  }
}

// v = A_u x for row t, with the user's own A.
template <typename X>
FSSA_INLINE void shrink_own(const ModulatedLinearCall& a, int64_t t) {
  float* out = static_cast<float*>(a.low_rank) + t * a.width();
  dots_any(static_cast<const X*>(a.x) + t * a.x_stride, a.lora_a,
           a.slots[t] * a.lora_a.user_stride, a.in_features, a.width(), out);
}

// v of every row; the team has it once it has arrived after this.
template <typename X>
FSSA_INLINE void low_rank(const ModulatedLinearCall& a, int64_t num_tokens, Team& team) {
  if (a.family == Family::kFactors) {
    const Range mine = team.share(num_tokens);
    for (int64_t t = mine.first; t < mine.last; ++t) shrink_own<X>(a, t);
    return;
  }
  if constexpr (sizeof(X) == 2) {
    if (a.lora_a.dtype == DType::kBFloat16) {
      shrink<X, BFloat16>(a, num_tokens, team);
    } else {
      shrink<X, float>(a, num_tokens, team);
    }
  } else {
    shrink<X, float>(a, num_tokens, team);
  }
  if (a.family == Family::kCore) {
    team.barrier();
    const Range mine = team.share(num_tokens);
    for (int64_t t = mine.first; t < mine.last; ++t) mix(a, t);
  }
}

// acc += v B^T for kRows rows of one panel.
template <int kRows, typename B>
FSSA_INLINE void expand_packed(const ModulatedLinearCall& a, int64_t t, int64_t panel,
                               Vec (&acc)[kRows][2]) {
  const Half* halves = a.halves + 2 * panel;
  const B* v[kRows];
  for (int r = 0; r < kRows; ++r) {
    v[r] = static_cast<const B*>(a.low_rank) + (t + r) * a.width() + halves[0].split * a.rank;
  }
  const int64_t apart = (halves[1].valid ? halves[1].split - halves[0].split : 0) * a.rank;
  const B* b = packed_at<B>(a.lora_b.data, panel * panel_bytes(a.lora_b.dtype, a.rank));
  accumulate(v, b, a.rank, acc, NothingAhead{}, kPanelColumns, apart);
}

// The same with each row's own B.
template <int kRows>
FSSA_INLINE void expand_own(const ModulatedLinearCall& a, int64_t t, int64_t panel,
                            Vec (&acc)[kRows][2]) {
  for (int h = 0; h < 2; ++h) {
    const Half& half = a.halves[2 * panel + h];
    for (int r = 0; r < kRows; ++r) {
      const float* v = static_cast<const float*>(a.low_rank) + (t + r) * a.width();
      float out[kHalfColumns] = {};
      dots_any(v + half.split * a.rank, a.lora_b,
               a.slots[t + r] * a.lora_b.user_stride + half.row * a.lora_b.stride, a.rank,
               half.valid, out);
      acc[r][h] = add(acc[r][h], load(out));
    }
  }
}

// Asks for one panel of B, too short for the machine's own prefetcher to notice.
FSSA_INLINE void fetch_expand(const ModulatedLinearCall& a, int64_t panel) {
  if (a.family == Family::kNone || a.family == Family::kFactors) return;
  const int64_t bytes = panel_bytes(a.lora_b.dtype, a.rank);
  const char* b = static_cast<const char*>(a.lora_b.data) + panel * bytes;
  for (int64_t i = 0; i < bytes; i += 64) prefetch(b + i);
}

// Rows [t, t + kRows) of one panel, from the product to the stored result. `ready` is called once
// the product is done and before the low-rank term is needed. Returns what is left of the queue.
template <int kRows, typename T, typename Ready>
FSSA_NOINLINE Span* tile(const ModulatedLinearCall& a, int64_t t, int64_t panel,
                         const Ready& ready, Ahead ahead) {
  const T* x[kRows];
  Vec acc[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const T*>(a.x) + (t + r) * a.x_stride;
    acc[r][0] = acc[r][1] = broadcast(0.0f);
  }
  Span* queue = ahead.queue;
  accumulate(x, packed_at<T>(a.panel(panel), 0), a.in_features, acc, ahead);
  queue = unread(ahead, queue);
  ready();
  if (a.family == Family::kFactors) {
    expand_own(a, t, panel, acc);
  } else if (a.family != Family::kNone) {
    if (a.lora_b.dtype == DType::kFloat32) {
      expand_packed<kRows, float>(a, t, panel, acc);
    } else {
      expand_packed<kRows, BFloat16>(a, t, panel, acc);
    }
  }
  for (int h = 0; h < 2; ++h) {
    const Half& half = a.halves[2 * panel + h];
    if (half.valid == 0) continue;
    if (a.bias != nullptr) {
      const Vec bias = load_first_as(a.bias, a.dtype, half.row, half.valid);
      for (int r = 0; r < kRows; ++r) acc[r][h] = add(acc[r][h], bias);
    }
    if (a.epilogue == Epilogue::kNone) {
      for (int r = 0; r < kRows; ++r) {
        store_as(a.y, a.y_dtype, (t + r) * a.y_stride + half.column, acc[r][h], half.valid);
      }
    }
  }
  if (a.epilogue == Epilogue::kNone) return queue;
  const Half& half = a.halves[2 * panel];
  for (int r = 0; r < kRows; ++r) {
    const Vec gate = a.epilogue == Epilogue::kSiluMul ? silu(acc[r][0]) : gelu_tanh(acc[r][0]);
    store_as(a.y, a.y_dtype, (t + r) * a.y_stride + half.column, mul(gate, acc[r][1]), half.valid);
  }
  return queue;
}

template <int kRows, typename T, typename Ready>
FSSA_INLINE Span* tile_of(int64_t rows, const ModulatedLinearCall& a, int64_t t, int64_t panel,
                          const Ready& ready, Ahead ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return tile_of<kRows - 1, T>(rows, a, t, panel, ready, ahead);
    }
  }
  return tile<kRows, T>(a, t, panel, ready, ahead);
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

template <typename T>
void modulated_linear(const ModulatedLinearCall& a, Team& team) {
  const int64_t num_tokens = a.count.get();
  const bool modulated = a.family != Family::kNone;
  if (modulated) {
    low_rank<T>(a, num_tokens, team);
    team.arrive();
  }
  // The others' part of the low-rank term is waited for when the first product is done: by then
  // they have long had it.
  bool waited = !modulated;
  const auto ready = [&] {
    if (!waited) team.wait();
    waited = true;
  };
  // Rows in tiles of equal height, tiles in chunks whose x stays in L2 while the panels pass.
  constexpr int64_t kChunkBytes = 256 * 1024;
  const int64_t row_bytes = larger(1, a.in_features * size_of(a.dtype));
  const int64_t num_panels = a.num_panels(), tiles = num_tiles(num_tokens);
  const int64_t chunk_tiles = larger(1, kChunkBytes / row_bytes / kMaxRows);
  const int64_t chunks = (tiles + chunk_tiles - 1) / chunk_tiles;
  const bool shrinks = modulated && a.family != Family::kFactors;
  const Range mine =
      product_share(team, shrinks ? a.shrink_halves() * tiles : 0, num_panels * tiles);
  Span* queue = team.meanwhile();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Range rows{tiles * chunk / chunks, tiles * (chunk + 1) / chunks};
    const int64_t height = rows.last - rows.first, start = num_panels * rows.first;
    const int64_t stop = smaller(mine.last, start + num_panels * height);
    for (int64_t i = larger(mine.first, start); i < stop; ++i) {
      const int64_t panel = (i - start) / height, j = (i - start) % height;
      if (j == 0 || i == mine.first) fetch_expand(a, panel);
      // The next panel comes from memory while the tiles of this one are computed.
      Span next = team.upcoming();
      if (i - j + height < mine.last) {
        next = {a.panel((panel + 1) % num_panels), panel_bytes(a.dtype, a.in_features)};
      }
      const Ahead ahead{next.data + next.bytes * j / height,
                        next.data + next.bytes * (j + 1) / height, queue, team.meanwhile_end()};
      const int64_t tile = rows.first + j;
      const int64_t first = num_tokens * tile / tiles, last = num_tokens * (tile + 1) / tiles;
      queue = tile_of<kMaxRows, T>(last - first, a, first, panel, ready, ahead);
    }
  }
  ready();
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
