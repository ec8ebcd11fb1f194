// The AVX-512 intrinsics that vec_avx512.h uses, in plain C++ on the compiler's vectors: with
// FSSA_EMULATE_AVX512 defined its kernels run, slowly, on machines that have no AVX-512, for tests.
// What each computes is Intel's intrinsics guide's to say; a name that is missing here does not
// compile. Products of bf16 pairs are rounded once more than by the instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define FSSA_EMULATED static inline __attribute__((always_inline))

typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef short __m256bh __attribute__((vector_size(32)));
typedef uint16_t __mmask16;

namespace fssa::cpu::emulated {

typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint64_t Doubles __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef uint16_t LongShorts __attribute__((vector_size(64)));
typedef uint32_t ShortWords __attribute__((vector_size(16)));

template <typename V>
FSSA_EMULATED V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
FSSA_EMULATED void write(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Ends the process where the instruction would.
template <typename V>
FSSA_EMULATED void write_aligned(void* p, V v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof v != 0) __builtin_trap();
  write(p, v);
}

// out[i] = f(i) for the lanes of V.
template <typename V, typename F>
FSSA_EMULATED V each(const F& f) {
  V v;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = f(i);
  return v;
}

FSSA_EMULATED float as_float(uint32_t bits) { return read<float>(&bits); }

template <typename F>
FSSA_EMULATED float reduce(__m512 x, const F& f) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = f(x[i], x[i + half]);
  }
  return x[0];
}

}  // namespace fssa::cpu::emulated

#define _CMP_UNORD_Q 3
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8

// ---- memory

FSSA_EMULATED __m512 _mm512_loadu_ps(const void* p) {
  return fssa::cpu::emulated::read<__m512>(p);
}
FSSA_EMULATED __m512i _mm512_loadu_si512(const void* p) {
  return fssa::cpu::emulated::read<__m512i>(p);
}
FSSA_EMULATED __m128i _mm_loadu_si128(const __m128i* p) {
  return fssa::cpu::emulated::read<__m128i>(p);
}
FSSA_EMULATED __m256i _mm256_loadu_si256(const __m256i* p) {
  return fssa::cpu::emulated::read<__m256i>(p);
}
FSSA_EMULATED void _mm512_storeu_ps(void* p, __m512 x) { fssa::cpu::emulated::write(p, x); }
FSSA_EMULATED void _mm512_storeu_si512(void* p, __m512i x) { fssa::cpu::emulated::write(p, x); }
FSSA_EMULATED void _mm256_storeu_si256(__m256i* p, __m256i x) { fssa::cpu::emulated::write(p, x); }
FSSA_EMULATED void _mm512_stream_ps(void* p, __m512 x) { fssa::cpu::emulated::write_aligned(p, x); }
FSSA_EMULATED void _mm256_stream_si256(__m256i* p, __m256i x) {
  fssa::cpu::emulated::write_aligned(p, x);
}
FSSA_EMULATED void _mm_sfence() { __atomic_thread_fence(__ATOMIC_RELEASE); }

FSSA_EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  const float* from = static_cast<const float*>(p);
  return fssa::cpu::emulated::each<__m512>(
      [&](int i) { return mask >> i & 1 ? from[i] : 0.0f; });
}
FSSA_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  const uint16_t* from = static_cast<const uint16_t*>(p);
  return (__m256i)fssa::cpu::emulated::each<fssa::cpu::emulated::Shorts>(
      [&](int i) { return mask >> i & 1 ? from[i] : uint16_t{0}; });
}
FSSA_EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 x) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<float*>(p)[i] = x[i];
  }
}
FSSA_EMULATED void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i x) {
  const auto lanes = (fssa::cpu::emulated::Shorts)x;
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<uint16_t*>(p)[i] = lanes[i];
  }
}

// ---- fp32

FSSA_EMULATED __m512 _mm512_set1_ps(float x) {
  return fssa::cpu::emulated::each<__m512>([&](int) { return x; });
}
FSSA_EMULATED __m512 _mm512_add_ps(__m512 x, __m512 y) { return x + y; }
FSSA_EMULATED __m512 _mm512_sub_ps(__m512 x, __m512 y) { return x - y; }
FSSA_EMULATED __m512 _mm512_mul_ps(__m512 x, __m512 y) { return x * y; }
FSSA_EMULATED __m512 _mm512_div_ps(__m512 x, __m512 y) { return x / y; }
// Where one is NaN, the second.
FSSA_EMULATED __m512 _mm512_max_ps(__m512 x, __m512 y) { return x > y ? x : y; }
FSSA_EMULATED __m512 _mm512_min_ps(__m512 x, __m512 y) { return x < y ? x : y; }
FSSA_EMULATED __m512 _mm512_fmadd_ps(__m512 x, __m512 y, __m512 z) {
  return fssa::cpu::emulated::each<__m512>([&](int i) { return std::fma(x[i], y[i], z[i]); });
}
FSSA_EMULATED __m512 _mm512_sqrt_ps(__m512 x) {
  return fssa::cpu::emulated::each<__m512>([&](int i) { return std::sqrt(x[i]); });
}
FSSA_EMULATED __m512 _mm512_roundscale_ps(__m512 x, int) {
  return fssa::cpu::emulated::each<__m512>([&](int i) { return std::nearbyint(x[i]); });
}
FSSA_EMULATED __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
  return fssa::cpu::emulated::each<__m512>([&](int i) {
    if (std::isnan(n[i])) return n[i];
    const float power = std::floor(std::fmin(std::fmax(n[i], -1000.0f), 1000.0f));
    return std::ldexp(x[i], static_cast<int>(power));
  });
}
FSSA_EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int) {  // _CMP_UNORD_Q
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned{std::isnan(x[i]) || std::isnan(y[i])} << i;
  return static_cast<__mmask16>(mask);
}
FSSA_EMULATED __m512 _mm512_mask_mov_ps(__m512 other, __mmask16 mask, __m512 x) {
  return fssa::cpu::emulated::each<__m512>([&](int i) { return mask >> i & 1 ? x[i] : other[i]; });
}
FSSA_EMULATED float _mm512_reduce_add_ps(__m512 x) {
  return fssa::cpu::emulated::reduce(x, [](float a, float b) { return a + b; });
}
FSSA_EMULATED float _mm512_reduce_max_ps(__m512 x) {
  return fssa::cpu::emulated::reduce(x, [](float a, float b) { return a > b ? a : b; });
}

// ---- integers

FSSA_EMULATED __m512i _mm512_set1_epi32(int x) {
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Words>(
      [&](int) { return static_cast<uint32_t>(x); });
}
FSSA_EMULATED __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
FSSA_EMULATED __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
FSSA_EMULATED __m512i _mm512_and_si512(__m512i x, __m512i y) { return x & y; }
FSSA_EMULATED __m512i _mm512_or_si512(__m512i x, __m512i y) { return x | y; }
FSSA_EMULATED __m512i _mm512_add_epi32(__m512i x, __m512i y) {
  return (__m512i)((fssa::cpu::emulated::Words)x + (fssa::cpu::emulated::Words)y);
}
FSSA_EMULATED __m512i _mm512_slli_epi32(__m512i x, unsigned n) {
  return (__m512i)((fssa::cpu::emulated::Words)x << n);
}
FSSA_EMULATED __m512i _mm512_srli_epi32(__m512i x, unsigned n) {
  return (__m512i)((fssa::cpu::emulated::Words)x >> n);
}
FSSA_EMULATED __m512i _mm512_srli_epi16(__m512i x, unsigned n) {
  return (__m512i)((fssa::cpu::emulated::LongShorts)x >> n);
}
FSSA_EMULATED __m512i _mm512_broadcast_i32x4(__m128i x) {
  const auto lane = fssa::cpu::emulated::read<fssa::cpu::emulated::ShortWords>(&x);
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Words>(
      [&](int i) { return lane[i % 4]; });
}
FSSA_EMULATED __m512i _mm512_mask_mov_epi32(__m512i other, __mmask16 mask, __m512i x) {
  return (__m512i)_mm512_mask_mov_ps((__m512)other, mask, (__m512)x);
}
FSSA_EMULATED __m512i _mm512_cvtepu16_epi32(__m256i x) {
  const auto lanes = (fssa::cpu::emulated::Shorts)x;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Words>(
      [&](int i) { return uint32_t{lanes[i]}; });
}
FSSA_EMULATED __m256i _mm512_cvtepi32_epi16(__m512i x) {
  const auto words = (fssa::cpu::emulated::Words)x;
  return (__m256i)fssa::cpu::emulated::each<fssa::cpu::emulated::Shorts>(
      [&](int i) { return static_cast<uint16_t>(words[i]); });
}

// ---- order: within 128-bit lanes, of which a register has four

FSSA_EMULATED __m512i _mm512_unpacklo_epi32(__m512i x, __m512i y) {
  const auto a = (fssa::cpu::emulated::Words)x, b = (fssa::cpu::emulated::Words)y;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Words>(
      [&](int i) { return (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2]; });
}
FSSA_EMULATED __m512i _mm512_unpackhi_epi32(__m512i x, __m512i y) {
  const auto a = (fssa::cpu::emulated::Words)x, b = (fssa::cpu::emulated::Words)y;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Words>(
      [&](int i) { return (i % 2 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2]; });
}
FSSA_EMULATED __m512i _mm512_unpacklo_epi8(__m512i x, __m512i y) {
  const auto a = (fssa::cpu::emulated::Bytes)x, b = (fssa::cpu::emulated::Bytes)y;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Bytes>(
      [&](int i) { return (i % 2 ? b : a)[i / 16 * 16 + i % 16 / 2]; });
}
FSSA_EMULATED __m512i _mm512_unpackhi_epi8(__m512i x, __m512i y) {
  const auto a = (fssa::cpu::emulated::Bytes)x, b = (fssa::cpu::emulated::Bytes)y;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Bytes>(
      [&](int i) { return (i % 2 ? b : a)[i / 16 * 16 + 8 + i % 16 / 2]; });
}
FSSA_EMULATED __m512i _mm512_shuffle_epi8(__m512i x, __m512i index) {
  const auto a = (fssa::cpu::emulated::Bytes)x, at = (fssa::cpu::emulated::Bytes)index;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Bytes>(
      [&](int i) { return at[i] & 128 ? uint8_t{0} : a[i / 16 * 16 + at[i] % 16]; });
}
FSSA_EMULATED __m512i _mm512_unpacklo_epi64(__m512i x, __m512i y) {
  const auto a = (fssa::cpu::emulated::Doubles)x, b = (fssa::cpu::emulated::Doubles)y;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Doubles>(
      [&](int i) { return (i % 2 ? b : a)[i / 2 * 2]; });
}
FSSA_EMULATED __m512i _mm512_unpackhi_epi64(__m512i x, __m512i y) {
  const auto a = (fssa::cpu::emulated::Doubles)x, b = (fssa::cpu::emulated::Doubles)y;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Doubles>(
      [&](int i) { return (i % 2 ? b : a)[i / 2 * 2 + 1]; });
}
FSSA_EMULATED __m512i _mm512_shuffle_i32x4(__m512i x, __m512i y, int order) {
  const auto a = (fssa::cpu::emulated::Words)x, b = (fssa::cpu::emulated::Words)y;
  return (__m512i)fssa::cpu::emulated::each<fssa::cpu::emulated::Words>(
      [&](int i) { return (i < 8 ? a : b)[(order >> i / 4 * 2 & 3) * 4 + i % 4]; });
}

// ---- bf16

FSSA_EMULATED __m256bh _mm512_cvtneps_pbh(__m512 x) {
  const auto words = (fssa::cpu::emulated::Words)x;
  return (__m256bh)fssa::cpu::emulated::each<fssa::cpu::emulated::Shorts>([&](int i) {
    const uint32_t bits = words[i], exponent = bits & 0x7f800000u;
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    if (exponent == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  });
}
FSSA_EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) {
  using fssa::cpu::emulated::as_float;
  const auto a = (fssa::cpu::emulated::Words)x, b = (fssa::cpu::emulated::Words)y;
  return fssa::cpu::emulated::each<__m512>([&](int i) {
    const float odd = as_float(a[i] & 0xffff0000u) * as_float(b[i] & 0xffff0000u);
    return sum[i] + odd + as_float(a[i] << 16) * as_float(b[i] << 16);
  });
}
