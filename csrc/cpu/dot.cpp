#include "dot.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define FSSA_X86_VARIANTS 1
#endif

#if defined(__GNUC__)
#define FSSA_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define FSSA_ALWAYS_INLINE inline
#endif

namespace fssa::cpu {
namespace {

// The loops are written once and compiled once per instruction set: they are inlined into functions
// that carry a target attribute, one of which is picked when the module loads. target_clones would
// do the same, but it cannot name two extensions (AVX2 and FMA) for one clone, and needs ifuncs,
// which musl does not have. `omp simd reduction` is the licence to keep partial sums in lanes.

template <typename W>
FSSA_ALWAYS_INLINE void dot4(const float* x, const W* w, int64_t stride, int64_t k, float* out) {
  const W* w0 = w;
  const W* w1 = w + stride;
  const W* w2 = w + 2 * stride;
  const W* w3 = w + 3 * stride;
  float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < k; ++i) {
    s0 += x[i] * to_float(w0[i]);
    s1 += x[i] * to_float(w1[i]);
    s2 += x[i] * to_float(w2[i]);
    s3 += x[i] * to_float(w3[i]);
  }
  out[0] = s0;
  out[1] = s1;
  out[2] = s2;
  out[3] = s3;
}

template <typename W>
FSSA_ALWAYS_INLINE void dot1(const float* x, const W* w, int64_t k, float* out) {
  float s = 0.0f;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < k; ++i) s += x[i] * to_float(w[i]);
  out[0] = s;
}

template <typename W>
FSSA_ALWAYS_INLINE void dot_loop(const float* x, const void* matrix, int64_t stride, int64_t k,
                                 int64_t columns, float* out) {
  const W* w = static_cast<const W*>(matrix);
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4) dot4(x, w + c * stride, stride, k, out + c);
  for (; c < columns; ++c) dot1(x, w + c * stride, k, out + c);
}

using DotFn = void (*)(const float*, const void*, int64_t, int64_t, int64_t, float*);

struct Variant {
  const char* name;
  DotFn fp32;
  DotFn bf16;
};

#define FSSA_DOT_VARIANT(NAME, ATTRIBUTE)                                                     \
  ATTRIBUTE void dot_fp32_##NAME(const float* x, const void* w, int64_t stride, int64_t k,    \
                                 int64_t columns, float* out) {                               \
    dot_loop<float>(x, w, stride, k, columns, out);                                           \
  }                                                                                           \
  ATTRIBUTE void dot_bf16_##NAME(const float* x, const void* w, int64_t stride, int64_t k,    \
                                 int64_t columns, float* out) {                               \
    dot_loop<BFloat16>(x, w, stride, k, columns, out);                                        \
  }                                                                                           \
  constexpr Variant k_##NAME{#NAME, dot_fp32_##NAME, dot_bf16_##NAME};

FSSA_DOT_VARIANT(portable, )
#ifdef FSSA_X86_VARIANTS
FSSA_DOT_VARIANT(avx2, __attribute__((target("avx2,fma"))))
FSSA_DOT_VARIANT(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))))
#endif

Variant choose() {
#ifdef FSSA_X86_VARIANTS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return k_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return k_avx2;
#endif
  return k_portable;
}

const Variant& chosen() {
  static const Variant variant = choose();
  return variant;
}

}  // namespace

void dot_columns(const float* x, const void* w, DType dtype, int64_t stride, int64_t k,
                 int64_t columns, float* out) {
  const Variant& variant = chosen();
  (dtype == DType::kFloat32 ? variant.fp32 : variant.bf16)(x, w, stride, k, columns, out);
}

const char* instruction_set() { return chosen().name; }

}  // namespace fssa::cpu
