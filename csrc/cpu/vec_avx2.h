// Sixteen lanes of fp32 as two AVX2 registers.
namespace FSSA_ISA {

// Rows of a tile, and sums of sixteen columns at a time: 12 of the 16 registers accumulate.
constexpr int kMaxRows = 6, kMaxSums = 6;
// From so many rows on a core multiplies for most of the time that weights are under way.
constexpr int64_t kBusyRows = 2;
// Whether the others hold both halves of a panel's column, or one after the other.
constexpr bool kRoomForPanel = false;
// Whether products read compressed weights.
constexpr bool kReadsCompressed = false;
// From so many rows on products of bf16 read x in fp32: fewer wait for the weights, not for the
// instructions that widen x.
constexpr int64_t kWidenedRows = 4;

struct Vec {
  __m256 a, b;
};

struct Pairs {
  __m256i a, b;  // two bf16 numbers a lane, the first in the low half
};

FSSA_INLINE Vec broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

FSSA_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

FSSA_INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}

FSSA_INLINE __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

FSSA_INLINE Vec load(const BFloat16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}

FSSA_INLINE __m256i rounded_bits(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}

FSSA_INLINE __m128i narrow(__m256 value) {
  const __m256i bits = rounded_bits(value);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

FSSA_INLINE void store(BFloat16* p, Vec v) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, narrow(v.a));
  _mm_storeu_si128(q + 1, narrow(v.b));
}

// Stores to whole lines, aligned, that leave no copy in a cache; in order with others once they are
// finished.
FSSA_INLINE void store_past_caches(float* p, Vec v) {
  _mm256_stream_ps(p, v.a);
  _mm256_stream_ps(p + 8, v.b);
}
FSSA_INLINE void store_past_caches(BFloat16* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(narrow(v.b), narrow(v.a)));
}
FSSA_INLINE void finish_past_caches() { _mm_sfence(); }

template <typename T>
FSSA_INLINE Vec load_first(const T* p, int64_t count) {
  alignas(32) T whole[16] = {};
  for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
  return load(whole);
}

template <typename T>
FSSA_INLINE void store_first(T* p, Vec v, int64_t count) {
  alignas(32) T whole[16];
  store(whole, v);
  for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
}

FSSA_INLINE Vec round_bf16(Vec v) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(rounded_bits(v.a), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(rounded_bits(v.b), 16))};
}

#define FSSA_BINARY(NAME, INTRINSIC)                       \
  FSSA_INLINE Vec NAME(Vec x, Vec y) {                     \
    return {INTRINSIC(x.a, y.a), INTRINSIC(x.b, y.b)};     \
  }
FSSA_BINARY(add, _mm256_add_ps)
FSSA_BINARY(sub, _mm256_sub_ps)
FSSA_BINARY(mul, _mm256_mul_ps)
FSSA_BINARY(div, _mm256_div_ps)
// Where one is NaN, the second.
FSSA_BINARY(max, _mm256_max_ps)
FSSA_BINARY(min, _mm256_min_ps)
#undef FSSA_BINARY

FSSA_INLINE Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

// sum += x y for one number y, in the registers that hold the sum and one more. Left to choose, the
// compiler keeps some y early and some results where x was, and with twelve sums in sixteen
// registers one of them ends in memory: a third of the speed.
FSSA_INLINE void add_product(Vec& sum, Vec x, const float* y) {
  __m256 all;
  asm("vbroadcastss %5, %2\n\tvfmadd231ps %2, %3, %0\n\tvfmadd231ps %2, %4, %1"
      : "+x"(sum.a), "+x"(sum.b), "=&x"(all)
      : "x"(x.a), "x"(x.b), "m"(*y));
}

FSSA_INLINE void add_product(Vec& sum, Vec x, const BFloat16* y) {
  sum = fma(x, broadcast(to_float(*y)), sum);
}

FSSA_INLINE Vec square_root(Vec x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }

FSSA_INLINE Vec round_nearest(Vec x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}

FSSA_INLINE __m256 power(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

FSSA_INLINE __m256 scaled(__m256 x, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(_mm256_and_ps(n, _mm256_cmp_ps(n, n, _CMP_ORD_Q)));
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
}

// x * 2^n for integers n in [-250, 250].
FSSA_INLINE Vec scale_by_power(Vec x, Vec n) { return {scaled(x.a, n.a), scaled(x.b, n.b)}; }

FSSA_INLINE __m256 kept(__m256 x, int64_t first, int64_t last, float other) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int low = static_cast<int>(first), high = static_cast<int>(last);
  const __m256i inside = _mm256_and_si256(_mm256_cmpgt_epi32(index, _mm256_set1_epi32(low - 1)),
                                          _mm256_cmpgt_epi32(_mm256_set1_epi32(high), index));
  return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(inside));
}

// Lanes in [first, last) of x, `other` elsewhere.
FSSA_INLINE Vec keep_lanes(Vec x, int64_t first, int64_t last, float other) {
  return {kept(x.a, first, last, other), kept(x.b, first - 8, last - 8, other)};
}

FSSA_INLINE float sum(Vec x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

FSSA_INLINE float largest(Vec x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

FSSA_INLINE Pairs load_pairs(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}

FSSA_INLINE Pairs broadcast_bits(uint32_t bits) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  return {all, all};
}

FSSA_INLINE Pairs broadcast_pair(const BFloat16* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return broadcast_bits(bits);
}

FSSA_INLINE Vec low(Pairs p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(p.a, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(p.b, 16))};
}

FSSA_INLINE Vec high(Pairs p) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(p.a, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(p.b, mask))};
}

FSSA_INLINE Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
  return fma(high(a), high(b), fma(low(a), low(b), acc));
}

// out[i * stride + j] = word i of rows[j], for eight rows and eight words.
FSSA_INLINE void transpose_eight(const void* const* rows, int64_t word, uint32_t* out,
                                 int64_t stride) {
  __m256 a[8], b[8];
  FSSA_UNROLL
  for (int j = 0; j < 8; ++j) a[j] = _mm256_loadu_ps(static_cast<const float*>(rows[j]) + word);
  // Pairs of rows, then fours: afterwards a[4 * i + k] holds word k of each 128-bit lane.
  FSSA_UNROLL
  for (int j = 0; j < 8; j += 2) {
    b[j] = _mm256_unpacklo_ps(a[j], a[j + 1]);
    b[j + 1] = _mm256_unpackhi_ps(a[j], a[j + 1]);
  }
  FSSA_UNROLL
  for (int j = 0; j < 8; j += 4) {
    a[j] = _mm256_shuffle_ps(b[j], b[j + 2], 0x44);
    a[j + 1] = _mm256_shuffle_ps(b[j], b[j + 2], 0xee);
    a[j + 2] = _mm256_shuffle_ps(b[j + 1], b[j + 3], 0x44);
    a[j + 3] = _mm256_shuffle_ps(b[j + 1], b[j + 3], 0xee);
  }
  FSSA_UNROLL
  for (int k = 0; k < 4; ++k) {
    float* to = reinterpret_cast<float*>(out) + k * stride;
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(a[k], a[k + 4], 0x20));
    _mm256_storeu_ps(to + 4 * stride, _mm256_permute2f128_ps(a[k], a[k + 4], 0x31));
  }
}

// out[i * stride + j] = word i of rows[j], 32-bit words.
FSSA_INLINE void transpose_words(const void* const* rows, uint32_t* out, int64_t stride) {
  for (int j = 0; j < 16; j += 8) {
    transpose_eight(rows + j, 0, out + j, stride);
    transpose_eight(rows + j, 8, out + 8 * stride + j, stride);
  }
}

}  // namespace FSSA_ISA
