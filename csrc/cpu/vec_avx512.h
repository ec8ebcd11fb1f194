// Sixteen lanes of fp32 as one AVX-512 register; with FSSA_BF16_DOT the products of bf16 pairs are
// one instruction.
namespace FSSA_ISA {

// Rows of a tile, and sums of sixteen columns at a time: 24 of the 32 registers accumulate.
constexpr int kMaxRows = 12, kMaxSums = 24;
// From so many rows on a core multiplies for most of the time that weights are under way.
constexpr int64_t kBusyRows = 4;
// Whether the others hold both halves of a panel's column, or one after the other.
constexpr bool kRoomForPanel = true;
// Whether products read compressed weights. From so many rows on products of bf16 read x in fp32:
// fewer wait for the weights, not for the instructions that widen x.
#ifdef FSSA_BF16_DOT
constexpr bool kReadsCompressed = true;
constexpr int64_t kWidenedRows = INT64_MAX;
#else
constexpr bool kReadsCompressed = false;
constexpr int64_t kWidenedRows = 4;
#endif

struct Vec {
  __m512 v;
};

struct Pairs {
  __m512i v;  // two bf16 numbers a lane, the first in the low half
};

FSSA_INLINE Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }

FSSA_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }

FSSA_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }

FSSA_INLINE Vec widen(__m256i half) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

FSSA_INLINE Vec load(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

FSSA_INLINE __m512i rounded_bits(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), quiet);
}

FSSA_INLINE __m256i narrow(Vec x) {
#ifdef FSSA_BF16_DOT
  return (__m256i)_mm512_cvtneps_pbh(x.v);  // as below, but numbers under 2^-126 become zero
#else
  return _mm512_cvtepi32_epi16(rounded_bits(x.v));
#endif
}

FSSA_INLINE void store(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x));
}

// Stores to whole lines, aligned, that leave no copy in a cache; in order with others once they are
// finished.
FSSA_INLINE void store_past_caches(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
FSSA_INLINE void store_past_caches(BFloat16* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(x));
}
FSSA_INLINE void finish_past_caches() { _mm_sfence(); }

FSSA_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

FSSA_INLINE Vec load_first(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(first_lanes(count), p)};
}

FSSA_INLINE Vec load_first(const BFloat16* p, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}

FSSA_INLINE void store_first(float* p, Vec x, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), x.v);
}

FSSA_INLINE void store_first(BFloat16* p, Vec x, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(x));
}

FSSA_INLINE Vec round_bf16(Vec x) { return widen(narrow(x)); }

FSSA_INLINE Vec add(Vec x, Vec y) { return {_mm512_add_ps(x.v, y.v)}; }
FSSA_INLINE Vec sub(Vec x, Vec y) { return {_mm512_sub_ps(x.v, y.v)}; }
FSSA_INLINE Vec mul(Vec x, Vec y) { return {_mm512_mul_ps(x.v, y.v)}; }
FSSA_INLINE Vec div(Vec x, Vec y) { return {_mm512_div_ps(x.v, y.v)}; }
// Where one is NaN, the second.
FSSA_INLINE Vec max(Vec x, Vec y) { return {_mm512_max_ps(x.v, y.v)}; }
FSSA_INLINE Vec min(Vec x, Vec y) { return {_mm512_min_ps(x.v, y.v)}; }
FSSA_INLINE Vec fma(Vec x, Vec y, Vec z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }

// sum += x y for one number y.
template <typename T>
FSSA_INLINE void add_product(Vec& sum, Vec x, const T* y) {
  sum = fma(x, broadcast(to_float(*y)), sum);
}

FSSA_INLINE Vec square_root(Vec x) { return {_mm512_sqrt_ps(x.v)}; }

FSSA_INLINE Vec round_nearest(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// x * 2^n for integers n in [-250, 250].
FSSA_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

// Lanes in [first, last) of x, `other` elsewhere; the bounds may lie outside [0, 16].
FSSA_INLINE Vec keep_lanes(Vec x, int64_t first, int64_t last, float other) {
  const uint32_t below = last >= 16 ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1u;
  const uint32_t skip = first >= 16 ? 0xffffu : first <= 0 ? 0u : (1u << first) - 1u;
  const __mmask16 inside = static_cast<__mmask16>(below & ~skip);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), inside, x.v)};
}

FSSA_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x.v); }
FSSA_INLINE float largest(Vec x) { return _mm512_reduce_max_ps(x.v); }

FSSA_INLINE Pairs load_pairs(const void* p) { return {_mm512_loadu_si512(p)}; }

FSSA_INLINE Pairs broadcast_bits(uint32_t bits) {
  return {_mm512_set1_epi32(static_cast<int>(bits))};
}

FSSA_INLINE Pairs broadcast_pair(const BFloat16* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return broadcast_bits(bits);
}

FSSA_INLINE void store_pairs(void* p, Pairs x) { _mm512_storeu_si512(p, x.v); }

#ifdef FSSA_BF16_DOT
// The sixteen high bytes of compressed words, in each 128-bit lane.
struct Codebook {
  __m512i bytes;
};

FSSA_INLINE Codebook load_codebook(const void* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}

// One of the two groups of words of a compressed unit.
template <int kGroup>
FSSA_INLINE void put_together(const char* unit, Codebook codebook, Pairs (&group)[2]) {
  const __m512i low = _mm512_loadu_si512(unit + 64 * kGroup);
  const __m512i both = _mm512_loadu_si512(unit + 128);
  const __m512i codes = _mm512_and_si512(kGroup ? _mm512_srli_epi16(both, 4) : both,
                                         _mm512_set1_epi32(0x0f0f0f0f));
  const __m512i high = _mm512_shuffle_epi8(codebook.bytes, codes);
  group[0] = {_mm512_unpacklo_epi8(low, high)};
  group[1] = {_mm512_unpackhi_epi8(low, high)};
}
#endif

FSSA_INLINE Vec low(Pairs p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(p.v, 16))}; }

FSSA_INLINE Vec high(Pairs p) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(p.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

FSSA_INLINE Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
#ifdef FSSA_BF16_DOT
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
  return fma(high(a), high(b), fma(low(a), low(b), acc));
#endif
}

// out[i * stride + j] = word i of rows[j], 32-bit words.
FSSA_INLINE void transpose_words(const void* const* rows, uint32_t* out, int64_t stride) {
  __m512i a[16], b[16];
  for (int j = 0; j < 16; ++j) a[j] = _mm512_loadu_si512(rows[j]);
  // Pairs of rows, then fours: afterwards b[4 * i + k] holds word k of each 128-bit lane.
  for (int j = 0; j < 16; j += 2) {
    b[j] = _mm512_unpacklo_epi32(a[j], a[j + 1]);
    b[j + 1] = _mm512_unpackhi_epi32(a[j], a[j + 1]);
  }
  for (int j = 0; j < 16; j += 4) {
    a[j] = _mm512_unpacklo_epi64(b[j], b[j + 2]);
    a[j + 1] = _mm512_unpackhi_epi64(b[j], b[j + 2]);
    a[j + 2] = _mm512_unpacklo_epi64(b[j + 1], b[j + 3]);
    a[j + 3] = _mm512_unpackhi_epi64(b[j + 1], b[j + 3]);
  }
  // Then the 128-bit lanes: a 4 x 4 transpose of them for each k.
  for (int k = 0; k < 4; ++k) {
    const __m512i low_even = _mm512_shuffle_i32x4(a[k], a[k + 4], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(a[k], a[k + 4], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0xdd);
    _mm512_storeu_si512(out + k * stride, _mm512_shuffle_i32x4(low_even, high_even, 0x88));
    _mm512_storeu_si512(out + (k + 8) * stride, _mm512_shuffle_i32x4(low_even, high_even, 0xdd));
    _mm512_storeu_si512(out + (k + 4) * stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(out + (k + 12) * stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
}

}  // namespace FSSA_ISA
