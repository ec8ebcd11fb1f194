// Kernel of the modulated linear. Every output is one chain of additions over k in order, whatever
// rows share the tile, so a row's bits do not depend on its neighbours.
namespace FSSA_ISA {

// acc += x W^T for kRows rows and the columns of a panel (kHalves = 2) or of one half-width block.
template <int kRows, int kHalves>
FSSA_INLINE void accumulate(const BFloat16* const* x, const void* panel, int64_t k,
                            Vec (&acc)[kRows][kHalves]) {
  constexpr int64_t kStep = kHalves * 16 * 4;
  const char* w = static_cast<const char*>(panel);
  for (int64_t p = 0; p < k / 2; ++p, w += kStep) {
    Pairs columns[kHalves];
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) columns[h] = load_pairs(w + 64 * h);
    prefetch(w + 16 * kStep);
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Pairs pair = broadcast_pair(x[r] + 2 * p);
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) acc[r][h] = dot_pairs(acc[r][h], columns[h], pair);
    }
  }
  if (k % 2) {
    for (int r = 0; r < kRows; ++r) {
      const Pairs pair = broadcast_bits(x[r][k - 1].bits);
      for (int h = 0; h < kHalves; ++h) {
        acc[r][h] = dot_pairs(acc[r][h], load_pairs(w + 64 * h), pair);
      }
    }
  }
}

template <int kRows, int kHalves>
FSSA_INLINE void accumulate(const float* const* x, const void* panel, int64_t k,
                            Vec (&acc)[kRows][kHalves]) {
  const float* w = static_cast<const float*>(panel);
  for (int64_t i = 0; i < k; ++i, w += 16 * kHalves) {
    Vec columns[kHalves];
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) columns[h] = load(w + 16 * h);
    prefetch(w + 16 * 16 * kHalves);
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec value = broadcast(x[r][i]);
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) acc[r][h] = fma(columns[h], value, acc[r][h]);
    }
  }
}

// Four dot products of x with rows of a row-major matrix, fp32 sums whose order depends on k alone.
template <typename X, typename A>
FSSA_INLINE void dots(const X* x, const A* a, int64_t stride, int64_t k, int64_t num, float* out) {
  for (int64_t first = 0; first < num; first += 4) {
    const A* row[4];
    Vec acc[4];
    for (int j = 0; j < 4; ++j) {
      row[j] = a + smaller(first + j, num - 1) * stride;
      acc[j] = broadcast(0.0f);
    }
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
      const Vec value = load(x + i);
      FSSA_UNROLL
      for (int j = 0; j < 4; ++j) acc[j] = fma(load(row[j] + i), value, acc[j]);
    }
    if (i < k) {
      const Vec value = load_first(x + i, k - i);
      for (int j = 0; j < 4; ++j) acc[j] = fma(load_first(row[j] + i, k - i), value, acc[j]);
    }
    for (int64_t j = 0; j < smaller(4, num - first); ++j) out[first + j] = sum(acc[j]);
  }
}

#ifdef FSSA_BF16_DOT
FSSA_INLINE void dots(const BFloat16* x, const BFloat16* a, int64_t stride, int64_t k, int64_t num,
                      float* out) {
  for (int64_t first = 0; first < num; first += 4) {
    const BFloat16* row[4];
    Vec acc[4];
    for (int j = 0; j < 4; ++j) {
      row[j] = a + smaller(first + j, num - 1) * stride;
      acc[j] = broadcast(0.0f);
    }
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
      const Pairs value = load_pairs(x + i);
      FSSA_UNROLL
      for (int j = 0; j < 4; ++j) acc[j] = dot_pairs(acc[j], load_pairs(row[j] + i), value);
    }
    for (; i < k; i += 16) {
      const int64_t left = smaller(16, k - i);
      const Vec value = load_first(x + i, left);
      for (int j = 0; j < 4; ++j) acc[j] = fma(load_first(row[j] + i, left), value, acc[j]);
    }
    for (int64_t j = 0; j < smaller(4, num - first); ++j) out[first + j] = sum(acc[j]);
  }
}
#endif

template <typename X>
FSSA_INLINE void dots_any(const X* x, const SideMatrix& a, int64_t offset, int64_t k, int64_t num,
                          float* out) {
  if (a.dtype == DType::kFloat32) {
    dots(x, static_cast<const float*>(a.data) + offset, a.stride, k, num, out);
  } else {
    dots(x, static_cast<const BFloat16*>(a.data) + offset, a.stride, k, num, out);
  }
}

// What B will be multiplied with, for columns [first, first + num) of row t: A x, times g for
// gated. For core [first, first + num) is one projection, and the result is M A x.
template <typename T>
FSSA_INLINE void shrink(const ModulatedLinearCall& a, int64_t t, int64_t first, int64_t num) {
  const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
  float* out = a.low_rank + t * a.width() + first;
  const int64_t user = a.family == Family::kFactors ? a.slots[t] : 0;
  dots_any(x, a.lora_a, user * a.lora_a.user_stride + first * a.lora_a.stride, a.in_features, num,
           out);
  if (a.family == Family::kGated) {
    const int64_t state = a.slots[t] * a.rows.stride + first;
    for (int64_t r = 0; r < num; ++r) out[r] *= fssa::load(a.rows.data, a.rows.dtype, state + r);
  }
  if (a.family == Family::kCore) {
    constexpr int64_t kMostOnStack = 256;
    float stack[kMostOnStack];
    float* mixed = num <= kMostOnStack ? stack : new float[num];
    SideMatrix core = a.rows;
    core.stride = a.rank;
    dots_any(out, core, a.slots[t] * a.rows.stride + first * a.rank, a.rank, num, mixed);
    for (int64_t r = 0; r < num; ++r) out[r] = mixed[r];
    if (mixed != stack) delete[] mixed;
  }
}

// acc += v B^T for one half; b: the half's part of a packed panel.
FSSA_INLINE Vec expand_packed(Vec acc, const float* v, const float* b, int64_t rank) {
  for (int64_t r = 0; r < rank; ++r) {
    acc = fma(load(b + r * kPanelColumns), broadcast(v[r]), acc);
  }
  return acc;
}

FSSA_INLINE Vec expand_packed(Vec acc, const float* v, const BFloat16* b, int64_t rank) {
  for (int64_t r = 0; r < rank; r += 2) {
    const Pairs both = load_pairs(b + r * kPanelColumns);
    acc = fma(low(both), broadcast(v[r]), acc);
    if (r + 1 < rank) acc = fma(high(both), broadcast(v[r + 1]), acc);
  }
  return acc;
}

FSSA_INLINE Vec expand(const ModulatedLinearCall& a, Vec acc, int64_t t, int64_t half_index) {
  const Half& half = a.halves[half_index];
  const float* v = a.low_rank + t * a.width() + half.split * a.rank;
  if (a.family == Family::kFactors) {
    float out[kHalfColumns] = {};
    dots_any(v, a.lora_b, a.slots[t] * a.lora_b.user_stride + half.row * a.lora_b.stride, a.rank,
             half.valid, out);
    return add(acc, load(out));
  }
  const char* panel = static_cast<const char*>(a.lora_b.data) +
                      half_index / 2 * panel_bytes(a.lora_b.dtype, a.rank) +
                      half_index % 2 * (kHalfColumns * 4);
  return a.lora_b.dtype == DType::kFloat32
             ? expand_packed(acc, v, reinterpret_cast<const float*>(panel), a.rank)
             : expand_packed(acc, v, reinterpret_cast<const BFloat16*>(panel), a.rank);
}

FSSA_INLINE void write(const ModulatedLinearCall& a, int64_t t, int64_t column, int64_t valid,
                       Vec value) {
  const int64_t at = t * a.y_stride + column;
  if (a.y_dtype == DType::kFloat32) {
    store_up_to(static_cast<float*>(a.y) + at, value, valid);
  } else {
    store_up_to(static_cast<BFloat16*>(a.y) + at, value, valid);
  }
}

// Rows [t, t + kRows) of one panel, from the product to the stored result. `ready` is called once
// the product is done and before the low-rank term is needed.
template <int kRows, typename T, typename Ready>
FSSA_NOINLINE void tile(const ModulatedLinearCall& a, int64_t t, int64_t panel,
                        const Ready& ready) {
  const T* x[kRows];
  Vec acc[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const T*>(a.x) + (t + r) * a.x_stride;
    acc[r][0] = acc[r][1] = broadcast(0.0f);
  }
  const char* w = static_cast<const char*>(a.weight) + panel * panel_bytes(a.dtype, a.in_features);
  accumulate<kRows, 2>(x, w, a.in_features, acc);
  ready();
  for (int h = 0; h < 2; ++h) {
    const Half& half = a.halves[2 * panel + h];
    if (half.valid == 0) continue;
    if (a.bias != nullptr) {
      const Vec bias = load_first_as(a.bias, a.dtype, half.row, half.valid);
      for (int r = 0; r < kRows; ++r) acc[r][h] = add(acc[r][h], bias);
    }
    if (a.family != Family::kNone) {
      for (int r = 0; r < kRows; ++r) acc[r][h] = expand(a, acc[r][h], t + r, 2 * panel + h);
    }
    if (a.epilogue == Epilogue::kNone) {
      for (int r = 0; r < kRows; ++r) write(a, t + r, half.column, half.valid, acc[r][h]);
    }
  }
  if (a.epilogue == Epilogue::kNone) return;
  const Half& half = a.halves[2 * panel];
  for (int r = 0; r < kRows; ++r) {
    const Vec gate = a.epilogue == Epilogue::kSiluMul ? silu(acc[r][0]) : gelu_tanh(acc[r][0]);
    write(a, t + r, half.column, half.valid, mul(gate, acc[r][1]));
  }
}

template <int kRows, typename T, typename Ready>
FSSA_INLINE void tile_of(int64_t rows, const ModulatedLinearCall& a, int64_t t, int64_t panel,
                         const Ready& ready) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      tile_of<kRows - 1, T>(rows, a, t, panel, ready);
      return;
    }
  }
  tile<kRows, T>(a, t, panel, ready);
}

template <typename T>
void modulated_linear(const ModulatedLinearCall& a, Team& team) {
  const int64_t num_tokens = a.count.get();
  const bool low_rank = a.family != Family::kNone;
  if (low_rank) {
    // Pieces small enough that a single row is shared out too.
    const int64_t piece = a.family == Family::kCore ? a.rank : smaller(4, a.width());
    const int64_t pieces = (a.width() + piece - 1) / piece;
    const Range mine = team.share(num_tokens * pieces);
    for (int64_t i = mine.first; i < mine.last; ++i) {
      const int64_t first = i % pieces * piece;
      shrink<T>(a, i / pieces, first, smaller(piece, a.width() - first));
    }
    team.arrive();
  }
  // The others' part of the low-rank term is waited for when the first product is done: by then
  // they have long had it.
  bool waited = !low_rank;
  const auto ready = [&] {
    if (!waited) team.wait();
    waited = true;
  };
  // Rows in chunks whose x stays in L2 while the panels pass; each chunk in tiles of equal height.
  constexpr int64_t kChunkBytes = 256 * 1024;
  const int64_t row_bytes = larger(1, a.in_features * size_of(a.dtype));
  const int64_t chunk = larger(kMaxRows, kChunkBytes / row_bytes / kMaxRows * kMaxRows);
  // With few panels for many threads, the chunks are shared out as well.
  const int64_t num_panels = a.num_halves / 2;
  const int64_t num_chunks = (num_tokens + chunk - 1) / chunk;
  const Range mine = team.share(num_panels * num_chunks);
  for (int64_t i = mine.first; i < mine.last; ++i) {
    const int64_t panel = i % num_panels, start = i / num_panels * chunk;
    const int64_t rows = smaller(chunk, num_tokens - start);
    const int64_t tiles = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t j = 0; j < tiles; ++j) {
      const int64_t first = rows * j / tiles, last = rows * (j + 1) / tiles;
      tile_of<kMaxRows, T>(last - first, a, start + first, panel, ready);
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
