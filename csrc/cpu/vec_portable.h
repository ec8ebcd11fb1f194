// Sixteen lanes of fp32 in plain C++: every machine has it, compilers vectorise it.
namespace FSSA_ISA {

// Rows of a tile, and sums of sixteen columns at a time: as many as the registers hold.
constexpr int kMaxRows = 4, kMaxSums = 8;
// Whether the others hold both halves of a panel's column, or one after the other.
constexpr bool kRoomForPanel = true;
// From so many rows on products of bf16 read x in fp32.
constexpr int64_t kWidenedRows = 4;
// From so many rows on both lines of a step are asked for ahead.
constexpr int kBothLinesRows = 4;

struct Vec {
  float lane[16];
};

struct Pairs {
  uint32_t lane[16];  // two bf16 numbers each, the first in the low half
};

#define FSSA_LANES for (int i = 0; i < 16; ++i)

FSSA_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FSSA_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FSSA_INLINE Vec broadcast(float value) {
  Vec out;
  FSSA_LANES out.lane[i] = value;
  return out;
}

FSSA_INLINE Vec load(const float* p) {
  Vec out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}

FSSA_INLINE void store(float* p, Vec a) { std::memcpy(p, a.lane, sizeof a.lane); }

FSSA_INLINE Vec load(const BFloat16* p) {
  Vec out;
  FSSA_LANES out.lane[i] = as_float(static_cast<uint32_t>(p[i].bits) << 16);
  return out;
}

FSSA_INLINE uint32_t rounded_bits(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

FSSA_INLINE void store(BFloat16* p, Vec a) {
  FSSA_LANES p[i].bits = static_cast<uint16_t>(rounded_bits(a.lane[i]));
}

FSSA_INLINE Vec load_first(const float* p, int64_t count) {
  Vec out = broadcast(0.0f);
  for (int64_t i = 0; i < count; ++i) out.lane[i] = p[i];
  return out;
}

FSSA_INLINE Vec load_first(const BFloat16* p, int64_t count) {
  Vec out = broadcast(0.0f);
  for (int64_t i = 0; i < count; ++i) out.lane[i] = as_float(static_cast<uint32_t>(p[i].bits) << 16);
  return out;
}

FSSA_INLINE void store_first(float* p, Vec a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = a.lane[i];
}

FSSA_INLINE void store_first(BFloat16* p, Vec a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i].bits = static_cast<uint16_t>(rounded_bits(a.lane[i]));
}

FSSA_INLINE Vec round_bf16(Vec a) {
  Vec out;
  FSSA_LANES out.lane[i] = as_float(rounded_bits(a.lane[i]) << 16);
  return out;
}

#define FSSA_BINARY(NAME, EXPRESSION)      \
  FSSA_INLINE Vec NAME(Vec a, Vec b) {     \
    Vec out;                               \
    FSSA_LANES out.lane[i] = (EXPRESSION); \
    return out;                            \
  }
FSSA_BINARY(add, a.lane[i] + b.lane[i])
FSSA_BINARY(sub, a.lane[i] - b.lane[i])
FSSA_BINARY(mul, a.lane[i] * b.lane[i])
FSSA_BINARY(div, a.lane[i] / b.lane[i])
// Where one is NaN, the second.
FSSA_BINARY(max, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
FSSA_BINARY(min, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i])
#undef FSSA_BINARY

FSSA_INLINE Vec fma(Vec a, Vec b, Vec c) {
  Vec out;
  FSSA_LANES out.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
  return out;
}

// sum += x y for one number y.
template <typename T>
FSSA_INLINE void add_product(Vec& sum, Vec x, const T* y) {
  sum = fma(x, broadcast(to_float(*y)), sum);
}

FSSA_INLINE Vec square_root(Vec a) {
  Vec out;
  FSSA_LANES out.lane[i] = sqrtf(a.lane[i]);
  return out;
}

// To the nearest integer, for |a| < 2^22.
FSSA_INLINE Vec round_nearest(Vec a) {
  Vec out;
  FSSA_LANES out.lane[i] = (a.lane[i] + 12582912.0f) - 12582912.0f;
  return out;
}

// a * 2^n for integers n in [-250, 250].
FSSA_INLINE Vec scale_by_power(Vec a, Vec n) {
  Vec out;
  FSSA_LANES {
    const int32_t whole = n.lane[i] == n.lane[i] ? static_cast<int32_t>(n.lane[i]) : 0;
    const int32_t half = whole / 2;
    out.lane[i] = a.lane[i] * as_float(static_cast<uint32_t>(half + 127) << 23) *
                  as_float(static_cast<uint32_t>(whole - half + 127) << 23);
  }
  return out;
}

// Lanes in [first, last) of a, `other` elsewhere.
FSSA_INLINE Vec keep_lanes(Vec a, int64_t first, int64_t last, float other) {
  FSSA_LANES a.lane[i] = i >= first && i < last ? a.lane[i] : other;
  return a;
}

FSSA_INLINE float sum(Vec a) {
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) a.lane[i] += a.lane[i + width];
  }
  return a.lane[0];
}

FSSA_INLINE float largest(Vec a) {
  float out = a.lane[0];
  for (int i = 1; i < 16; ++i) out = a.lane[i] > out ? a.lane[i] : out;
  return out;
}

FSSA_INLINE Pairs load_pairs(const void* p) {
  Pairs out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}

FSSA_INLINE Pairs broadcast_pair(const BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  Pairs out;
  FSSA_LANES out.lane[i] = bits;
  return out;
}

FSSA_INLINE Pairs broadcast_bits(uint32_t bits) {
  Pairs out;
  FSSA_LANES out.lane[i] = bits;
  return out;
}

FSSA_INLINE Vec low(Pairs a) {
  Vec out;
  FSSA_LANES out.lane[i] = as_float(a.lane[i] << 16);
  return out;
}

FSSA_INLINE Vec high(Pairs a) {
  Vec out;
  FSSA_LANES out.lane[i] = as_float(a.lane[i] & 0xffff0000u);
  return out;
}

FSSA_INLINE Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
  return fma(high(a), high(b), fma(low(a), low(b), acc));
}

// out[i * stride + j] = word i of rows[j], 32-bit words.
FSSA_INLINE void transpose_words(const void* const* rows, uint32_t* out, int64_t stride) {
  for (int j = 0; j < 16; ++j) {
    uint32_t words[16];
    std::memcpy(words, rows[j], sizeof words);
    for (int i = 0; i < 16; ++i) out[i * stride + j] = words[i];
  }
}

#undef FSSA_LANES

}  // namespace FSSA_ISA
