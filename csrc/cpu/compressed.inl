// Products with compressed weights, whose words are put together in registers.
namespace FSSA_ISA {

// The columns of x that a unit of a panel of kHalves halves is multiplied with.
template <int kHalves>
constexpr int kUnitColumns = static_cast<int>(kUnitWords / (kHalves * kHalfColumns));

// acc += x W^T for kRows rows and the columns from `column` on in x of a group of words, in two
// registers: both halves of a column pair, or two pairs of one half.
template <int kRows, int kHalves, typename Rows, typename Apart>
FSSA_INLINE void add_group(const Rows& x, int column, const Pairs (&group)[2],
                           Vec (&acc)[kRows][kHalves], Apart apart) {
  FSSA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FSSA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t at = kHalves == 2 ? column + i * second(apart) : column + 2 * i;
      Vec& sum = acc[r][kHalves == 2 ? i : 0];
      sum = dot_pairs(sum, group[i], broadcast_pair(x.at(r) + at));
    }
  }
}

// The same sums as `accumulate` takes, of a panel that is compressed.
template <int kRows, int kHalves, typename Rows, typename Apart = Same>
FSSA_INLINE void accumulate_compressed(Rows x, const char* panel, int64_t header_bytes, int64_t k,
                                       Vec (&acc)[kRows][kHalves], Ahead& ahead,
                                       Apart apart = {}) {
  constexpr int kColumns = kUnitColumns<kHalves>;
  const Codebook codebook = load_codebook(panel);
  for (int64_t i = 0; i < header_bytes; i += 64) fetch<64>(ahead);
  const Exception* exception = exceptions_of(panel);
  const char* const units = panel + header_bytes;
  const int64_t num_units = k / kColumns;
  for (const char* unit = units;;) {
    const int64_t exceptional = exception->word / kUnitWords;
    const char* const stop = units + smaller(exceptional, num_units) * kUnitBytes;
    for (; unit != stop; unit += kUnitBytes) {
      fetch_some<kUnitBytes>(ahead);
      Pairs group[2];
      put_together<0>(unit, codebook, group);
      add_group(x, 0, group, acc, apart);
      put_together<1>(unit, codebook, group);
      add_group(x, kColumns / 2, group, acc, apart);
      x.advance(kColumns);
    }
    if (exceptional >= num_units) return;
    alignas(64) uint16_t words[kUnitWords];
    Pairs group[2];
    put_together<0>(unit, codebook, group);
    store_pairs(words, group[0]);
    store_pairs(words + 32, group[1]);
    put_together<1>(unit, codebook, group);
    store_pairs(words + 64, group[0]);
    store_pairs(words + 96, group[1]);
    for (; exception->word / kUnitWords == exceptional; ++exception) {
      words[exception->word % kUnitWords] = static_cast<uint16_t>(exception->bits);
    }
    fetch_some<kUnitBytes>(ahead);
    for (int i = 0; i < 2; ++i) {
      group[0] = load_pairs(words + 64 * i);
      group[1] = load_pairs(words + 64 * i + 32);
      add_group(x, i * kColumns / 2, group, acc, apart);
    }
    x.advance(kColumns);
    unit += kUnitBytes;
  }
}

}  // namespace FSSA_ISA
