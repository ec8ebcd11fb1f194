// Sixteen lanes of fp32 in four vectors of GNU C++: many machines have such, and compilers make up
// for those that have not. Loops over single lanes take longer: benchmarks/README.md.
namespace FSSA_ISA {

// Rows of a tile, and sums of sixteen columns at a time: as many as the registers hold.
constexpr int kMaxRows = 4, kMaxSums = 4;
// From so many rows on a core multiplies for most of the time that weights are under way.
constexpr int64_t kBusyRows = 2;
// Whether the others hold both halves of a panel's column, or one after the other.
constexpr bool kRoomForPanel = true;
// Whether products read compressed weights.
constexpr bool kReadsCompressed = false;
// From so many rows on products of bf16 read x in fp32.
constexpr int64_t kWidenedRows = 4;

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadInt __attribute__((vector_size(16)));
typedef uint32_t QuadBits __attribute__((vector_size(16)));
typedef uint16_t QuadShort __attribute__((vector_size(8)));

struct Vec {
  Quad part[4];
};

struct Pairs {
  QuadBits part[4];  // two bf16 numbers a lane, the first in the low half
};

#define FSSA_PARTS FSSA_UNROLL for (int i = 0; i < 4; ++i)

FSSA_INLINE Vec broadcast(float value) {
  Vec out;
  FSSA_PARTS out.part[i] = Quad{value, value, value, value};
  return out;
}

FSSA_INLINE Vec load(const float* p) {
  Vec out;
  FSSA_PARTS std::memcpy(&out.part[i], p + 4 * i, sizeof out.part[i]);
  return out;
}

FSSA_INLINE void store(float* p, Vec a) {
  FSSA_PARTS std::memcpy(p + 4 * i, &a.part[i], sizeof a.part[i]);
}

FSSA_INLINE Vec load(const BFloat16* p) {
  Vec out;
  FSSA_PARTS {
    QuadShort bits;
    std::memcpy(&bits, p + 4 * i, sizeof bits);
    out.part[i] = (Quad)(__builtin_convertvector(bits, QuadBits) << 16);
  }
  return out;
}

FSSA_INLINE QuadBits rounded_bits(Quad value) {
  const QuadBits bits = (QuadBits)value;
  const QuadBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

FSSA_INLINE void store(BFloat16* p, Vec a) {
  FSSA_PARTS {
    const QuadShort bits = __builtin_convertvector(rounded_bits(a.part[i]), QuadShort);
    std::memcpy(p + 4 * i, &bits, sizeof bits);
  }
}

// Stores that leave no copy in a cache, on machines whose compilers have such: not here.
template <typename T>
FSSA_INLINE void store_past_caches(T* p, Vec a) {
  store(p, a);
}
FSSA_INLINE void finish_past_caches() {}

template <typename T>
FSSA_INLINE Vec load_first(const T* p, int64_t count) {
  T lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <typename T>
FSSA_INLINE void store_first(T* p, Vec a, int64_t count) {
  T lanes[16];
  store(lanes, a);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

FSSA_INLINE Vec round_bf16(Vec a) {
  FSSA_PARTS a.part[i] = (Quad)(rounded_bits(a.part[i]) << 16);
  return a;
}

#define FSSA_BINARY(NAME, EXPRESSION)           \
  FSSA_INLINE Vec NAME(Vec left, Vec right) {   \
    FSSA_PARTS {                                \
      const Quad a = left.part[i];              \
      const Quad b = right.part[i];             \
      left.part[i] = (EXPRESSION);              \
    }                                           \
    return left;                                \
  }
FSSA_BINARY(add, a + b)
FSSA_BINARY(sub, a - b)
FSSA_BINARY(mul, a * b)
FSSA_BINARY(div, a / b)
// Where one is NaN, the second.
FSSA_BINARY(max, a > b ? a : b)
FSSA_BINARY(min, a < b ? a : b)
#undef FSSA_BINARY

FSSA_INLINE Vec fma(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }

// sum += x y for one number y.
template <typename T>
FSSA_INLINE void add_product(Vec& sum, Vec x, const T* y) {
  sum = fma(x, broadcast(to_float(*y)), sum);
}

FSSA_INLINE Vec square_root(Vec a) {
  FSSA_PARTS {
    for (int lane = 0; lane < 4; ++lane) a.part[i][lane] = sqrtf(a.part[i][lane]);
  }
  return a;
}

// To the nearest integer, for |a| < 2^22.
FSSA_INLINE Vec round_nearest(Vec a) {
  FSSA_PARTS a.part[i] = (a.part[i] + 12582912.0f) - 12582912.0f;
  return a;
}

// 2^n for integers n in [-126, 127].
FSSA_INLINE Quad power_of_two(QuadInt n) { return (Quad)((n + 127) << 23); }

// a * 2^n for integers n in [-250, 250].
FSSA_INLINE Vec scale_by_power(Vec a, Vec n) {
  FSSA_PARTS {
    const Quad exponent = n.part[i], zero = {};
    const QuadInt whole =
        __builtin_convertvector(exponent == exponent ? exponent : zero, QuadInt);
    const QuadInt half = whole >> 1;
    a.part[i] = a.part[i] * power_of_two(half) * power_of_two(whole - half);
  }
  return a;
}

// Lanes in [first, last) of a, `other` elsewhere.
FSSA_INLINE Vec keep_lanes(Vec a, int64_t first, int64_t last, float other) {
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < 16; ++i) lanes[i] = i >= first && i < last ? lanes[i] : other;
  return load(lanes);
}

FSSA_INLINE float sum(Vec a) {
  const Quad sums = (a.part[0] + a.part[2]) + (a.part[1] + a.part[3]);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

FSSA_INLINE float largest(Vec a) {
  float lanes[16];
  store(lanes, a);
  float out = lanes[0];
  for (int i = 1; i < 16; ++i) out = lanes[i] > out ? lanes[i] : out;
  return out;
}

FSSA_INLINE Pairs load_pairs(const void* p) {
  Pairs out;
  FSSA_PARTS {
    std::memcpy(&out.part[i], static_cast<const char*>(p) + sizeof(QuadBits) * i,
                sizeof out.part[i]);
  }
  return out;
}

FSSA_INLINE Pairs broadcast_bits(uint32_t bits) {
  Pairs out;
  FSSA_PARTS out.part[i] = QuadBits{bits, bits, bits, bits};
  return out;
}

FSSA_INLINE Pairs broadcast_pair(const BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return broadcast_bits(bits);
}

FSSA_INLINE Vec low(Pairs a) {
  Vec out;
  FSSA_PARTS out.part[i] = (Quad)(a.part[i] << 16);
  return out;
}

FSSA_INLINE Vec high(Pairs a) {
  Vec out;
  FSSA_PARTS out.part[i] = (Quad)(a.part[i] & 0xffff0000u);
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

#undef FSSA_PARTS

}  // namespace FSSA_ISA
