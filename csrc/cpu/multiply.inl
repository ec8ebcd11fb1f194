// The inner loop of every product: sums in registers += rows of x times columns of a packed matrix,
// with what is read next brought into the cache meanwhile (ahead.inl). Every sum is one chain of
// additions over k in order, whatever rows share the registers.
namespace FSSA_ISA {

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

// Rows of x a constant distance apart. A register for every four of them and two for the distance,
// in bytes, name every element of a step in the instruction that reads it. A dozen pointers are more
// than the machine has registers for; so are the sums that a compiler makes ahead of a loop, where
// it sees that these numbers stay as they are.
template <int kRows, typename T>
struct SpacedRows {
  using Value = T;
  static constexpr int kFours = (kRows + 3) / 4;
  static constexpr int64_t kSize = sizeof(T);

  const char* fours[kFours];
  int64_t distance, thrice;

  FSSA_INLINE_MEMBER SpacedRows(const T* first, int64_t stride)
      : distance(stride * kSize), thrice(3 * distance) {
    for (int i = 0; i < kFours; ++i) {
      fours[i] = reinterpret_cast<const char*>(first + 4 * i * stride);
    }
    hide();
  }

  FSSA_INLINE_MEMBER const T* at(int r) const {
    const int64_t from_four = r % 4 == 3 ? thrice : r % 4 * distance;
    return reinterpret_cast<const T*>(fours[r / 4] + from_four);
  }

  FSSA_INLINE_MEMBER void advance(int64_t columns) {
    FSSA_UNROLL
    for (int i = 0; i < kFours; ++i) fours[i] += columns * kSize;
    // Products of bf16 pairs leave registers free: there nothing is kept in memory for it.
    if constexpr (kSize == sizeof(float)) hide();
  }

  FSSA_INLINE_MEMBER void hide() {
    FSSA_UNROLL
    for (int i = 0; i < kFours; ++i) opaque(fours[i]);
    opaque(distance);
    opaque(thrice);
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

// acc += x W^T for the first `eights` times eight columns of x, which x and w pass. Eight at a time:
// whatever a step does beside multiplying costs time where another thread has half of the core.
// Where all that a step reads is asked for, it is in two parts: more at once would keep the words of
// this step waiting.
template <int kBytes, bool kHalved, int kRows, int kHalves, typename Rows, typename Apart>
FSSA_INLINE void add_eights(Rows& x, const uint32_t*& w, int64_t eights,
                            Vec (&acc)[kRows][kHalves], Ahead& ahead, int64_t step, Apart apart) {
  for (const uint32_t* const end = w + 4 * eights * step; w != end; w += 4 * step) {
    fetch<2 * kBytes>(ahead);
    add_column<0>(x, w, acc, apart);
    add_column<1>(x, w, acc, apart);
    add_column<2>(x, w + step, acc, apart);
    add_column<3>(x, w + step, acc, apart);
    if constexpr (!kHalved) fetch<2 * kBytes>(ahead);
    add_column<4>(x, w + 2 * step, acc, apart);
    add_column<5>(x, w + 2 * step, acc, apart);
    add_column<6>(x, w + 3 * step, acc, apart);
    add_column<7>(x, w + 3 * step, acc, apart);
    x.advance(8);
  }
}

// acc += x W^T for kRows rows and the first kHalves halves at `panel`, of a packed matrix [*, k]
// whose next column pair is `step` words away.
template <int kAheadBytes = kStepBytes, int kRows, int kHalves, typename Rows,
          typename Apart = Same>
FSSA_INLINE void accumulate(Rows x, const BFloat16* panel, int64_t k, Vec (&acc)[kRows][kHalves],
                            Ahead& ahead, int64_t step = kPanelColumns, Apart apart = {}) {
  const uint32_t* w = reinterpret_cast<const uint32_t*>(panel);
  int64_t p = 0;
  if constexpr (sizeof(typename Rows::Value) == 4) {
    if (ahead.halved) {
      add_eights<kAheadBytes, true>(x, w, k / 8, acc, ahead, step, apart);
    } else {
      add_eights<kAheadBytes, false>(x, w, k / 8, acc, ahead, step, apart);
    }
    p = k / 8 * 4;
  }
  for (; p < k / 2; ++p, w += step) {
    if constexpr (sizeof(typename Rows::Value) == 4) {
      add_column<0>(x, w, acc, apart);
      add_column<1>(x, w, acc, apart);
    } else {
      Pairs columns[kHalves];
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) columns[h] = load_pairs(w + kHalfColumns * h);
      fetch_some<kAheadBytes>(ahead);
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

template <int kAheadBytes = kStepBytes, int kRows, int kHalves, typename Rows,
          typename Apart = Same>
FSSA_INLINE void accumulate(Rows x, const float* panel, int64_t k, Vec (&acc)[kRows][kHalves],
                            Ahead& ahead, int64_t step = kPanelColumns, Apart apart = {}) {
  const float* w = panel;
  for (int64_t i = 0; i < k; ++i, w += step) {
    Vec columns[kHalves];
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) columns[h] = load(w + kHalfColumns * h);
    fetch_some<kAheadBytes>(ahead);
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

}  // namespace FSSA_ISA
