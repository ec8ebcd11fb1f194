// Products with compressed weights, whose words are put together in registers.
namespace FSSA_ISA {

// acc += x W^T for kRows rows and both halves of the column pair that begins `column` numbers on in x.
template <int kRows, typename Rows, typename Apart>
FSSA_INLINE void add_pair(const Rows& x, int column, const Pairs (&pairs)[2], Vec (&acc)[kRows][2],
                          Apart apart) {
  FSSA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FSSA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Pairs pair = broadcast_pair(x.at(r) + column + h * second(apart));
      acc[r][h] = dot_pairs(acc[r][h], pairs[h], pair);
    }
  }
}

// The same sums as `accumulate` takes, of a panel that is compressed.
template <int kRows, typename Rows, typename Apart = Same>
FSSA_INLINE void accumulate_compressed(Rows x, const char* panel, int64_t header_bytes, int64_t k,
                                       Vec (&acc)[kRows][2], Ahead& ahead, Apart apart = {}) {
  const Codebook codebook = load_codebook(panel);
  for (int64_t i = 0; i < header_bytes; i += 64) fetch<64>(ahead);
  const Exception* exception = exceptions_of(panel);
  const char* const units = panel + header_bytes;
  const int64_t num_units = k / kUnitColumns;
  for (const char* unit = units;;) {
    const int64_t exceptional = exception->word / kUnitWords;
    const char* const stop = units + smaller(exceptional, num_units) * kUnitBytes;
    for (; unit != stop; unit += kUnitBytes) {
      fetch_some<kUnitBytes>(ahead);
      Pairs columns[2];
      put_together<0>(unit, codebook, columns);
      add_pair(x, 0, columns, acc, apart);
      put_together<1>(unit, codebook, columns);
      add_pair(x, 2, columns, acc, apart);
      x.advance(kUnitColumns);
    }
    if (exceptional >= num_units) return;
    alignas(64) uint16_t words[kUnitWords];
    Pairs columns[2];
    put_together<0>(unit, codebook, columns);
    store_pairs(words, columns[0]);
    store_pairs(words + 32, columns[1]);
    put_together<1>(unit, codebook, columns);
    store_pairs(words + 64, columns[0]);
    store_pairs(words + 96, columns[1]);
    for (; exception->word / kUnitWords == exceptional; ++exception) {
      words[exception->word % kUnitWords] = static_cast<uint16_t>(exception->bits);
    }
    fetch_some<kUnitBytes>(ahead);
    for (int pair = 0; pair < 2; ++pair) {
      columns[0] = load_pairs(words + 64 * pair);
      columns[1] = load_pairs(words + 64 * pair + 32);
      add_pair(x, 2 * pair, columns, acc, apart);
    }
    x.advance(kUnitColumns);
    unit += kUnitBytes;
  }
}

}  // namespace FSSA_ISA
