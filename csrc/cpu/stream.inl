// Reads memory once, as fast as it can: the limit that decoding is held against.
namespace FSSA_ISA {

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

}  // namespace FSSA_ISA
