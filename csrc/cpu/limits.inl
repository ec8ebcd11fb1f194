// What the machine can do at most, which decoding is held against.
namespace FSSA_ISA {

// Reads memory once, as fast as it can.
double stream(const void* data, int64_t bytes, Team& team) {
  const Range mine = team.share(bytes / 512);
  const char* p = static_cast<const char*>(data) + mine.first * 512;
  Vec acc[8];
  for (int i = 0; i < 8; ++i) acc[i] = broadcast(0.0f);
  for (int64_t n = mine.first; n < mine.last; ++n, p += 512) {
    FSSA_UNROLL
    for (int i = 0; i < 8; ++i) prefetch(p + 4096 + 64 * i);
    FSSA_UNROLL
    for (int i = 0; i < 8; ++i) acc[i] = add(acc[i], load(reinterpret_cast<const float*>(p) + 16 * i));
  }
  double total = 0.0;
  for (int i = 0; i < 8; ++i) total += sum(acc[i]);
  return total;
}

// Multiplies and adds `steps` times what a tile does for a column, or a pair of them where there is an
// instruction for pairs, with everything in registers. Counts the operations. The sums begin at
// `start`, which the compiler does not see: what is equal it would compute once. They have a tile's
// shape, in loops short enough to be unrolled: in a longer one they would be in memory.
double multiply_add(int64_t steps, const float* start, int64_t& flop) {
  constexpr bool kByPairs = kWidenedRows == INT64_MAX;
  constexpr int kHalves = kMaxSums / kMaxRows;
  static_assert(kMaxRows * kHalves == kMaxSums && 16 + kMaxSums <= kMultiplyAddStart, "");
  Vec acc[kMaxRows][kHalves];
  FSSA_UNROLL
  for (int r = 0; r < kMaxRows; ++r) {
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) acc[r][h] = load(start + r * kHalves + h);
  }
  const Vec half = broadcast(0.5f), one = broadcast(1.0f);
  const Pairs halves = broadcast_bits(0x3f003f00);
  for (int64_t n = 0; n < steps; ++n) {
    FSSA_UNROLL
    for (int r = 0; r < kMaxRows; ++r) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        acc[r][h] = kByPairs ? dot_pairs(acc[r][h], halves, halves) : fma(acc[r][h], half, one);
      }
    }
  }
  flop = steps * kMaxSums * 16 * (kByPairs ? 4 : 2);
  double total = 0.0;
  FSSA_UNROLL
  for (int r = 0; r < kMaxRows; ++r) {
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) total += sum(acc[r][h]);
  }
  return total;
}

}  // namespace FSSA_ISA
