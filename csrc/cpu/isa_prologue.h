// What every isa_<name>.cpp includes before it sets the compiler's target.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "machine.h"
#include "modulated_linear.h"
#include "paged_attention.h"
#include "residual_film_rms_norm.h"
#include "rope_kv_write.h"
#include "sample.h"

#if defined(FSSA_USES_AVX512) && defined(FSSA_EMULATE_AVX512)
#include "emulated_avx512.h"
#elif defined(FSSA_X86_KERNELS)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define FSSA_INLINE static inline __attribute__((always_inline))
#define FSSA_INLINE_MEMBER inline __attribute__((always_inline))
#define FSSA_NOINLINE static __attribute__((noinline))
#else
#define FSSA_INLINE static inline
#define FSSA_INLINE_MEMBER inline
#define FSSA_NOINLINE static
#endif

#if defined(__clang__)
#define FSSA_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define FSSA_UNROLL _Pragma("GCC unroll 16")
#else
#define FSSA_UNROLL
#endif

// From here to the end of the file functions are compiled for these extensions.
#define FSSA_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define FSSA_TARGET(LIST) \
  FSSA_PRAGMA(clang attribute push(__attribute__((target(LIST))), apply_to = function))
#define FSSA_TARGET_END _Pragma("clang attribute pop")
#else
#define FSSA_TARGET(LIST) FSSA_PRAGMA(GCC target(LIST))
#define FSSA_TARGET_END
#endif
#ifdef FSSA_EMULATE_AVX512
#define FSSA_TARGET_AVX512(LIST) FSSA_TARGET("avx2,fma,prfchw")
#else
#define FSSA_TARGET_AVX512(LIST) FSSA_TARGET(LIST)
#endif
