// Functions every kernel uses, on top of the sixteen lanes of vec_*.h.
namespace FSSA_ISA {

FSSA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FSSA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Asks for the line at `p`, which need not be valid.
FSSA_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 3);
#else
  (void)p;
#endif
}

// The same for a line that is read once in a long time: it is not worth the place of another in the
// caches that cores share.
FSSA_INLINE void prefetch_passing(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 0);
#else
  (void)p;
#endif
}

// The same into the second-level cache.
FSSA_INLINE void prefetch_second(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// The same for a line that is going to be written: it is this core's alone once it is there.
FSSA_INLINE void prefetch_to_write(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 1, 3);
#else
  (void)p;
#endif
}

// Hides from the compiler how `value`, a number or a pointer, was made, so that it stays in a register.
template <typename T>
FSSA_INLINE void opaque(T& value) {
#if defined(__GNUC__)
  asm("" : "+r"(value));
#else
  (void)value;
#endif
}

// Sixteen numbers at `index` of an array of either type.
FSSA_INLINE Vec load_as(const void* base, DType dtype, int64_t index) {
  return dtype == DType::kFloat32 ? load(static_cast<const float*>(base) + index)
                                  : load(static_cast<const BFloat16*>(base) + index);
}

FSSA_INLINE Vec load_first_as(const void* base, DType dtype, int64_t index, int64_t count) {
  return dtype == DType::kFloat32 ? load_first(static_cast<const float*>(base) + index, count)
                                  : load_first(static_cast<const BFloat16*>(base) + index, count);
}

template <typename T>
FSSA_INLINE Vec load_up_to(const T* p, int64_t count) {
  return count >= 16 ? load(p) : load_first(p, count);
}

template <typename T>
FSSA_INLINE void store_up_to(T* p, Vec x, int64_t count) {
  if (count >= 16) {
    store(p, x);
  } else {
    store_first(p, x, count);
  }
}

// The first `count` lanes to `index` of an array of either type.
FSSA_INLINE void store_as(void* base, DType dtype, int64_t index, Vec x, int64_t count) {
  if (dtype == DType::kFloat32) {
    store_up_to(static_cast<float*>(base) + index, x, count);
  } else {
    store_up_to(static_cast<BFloat16*>(base) + index, x, count);
  }
}

// What x is after a store in T and a load.
FSSA_INLINE Vec rounded_to(const float*, Vec x) { return x; }
FSSA_INLINE Vec rounded_to(const BFloat16*, Vec x) { return round_bf16(x); }

// e^x within 2 units in the last place: x = n ln 2 + r, a polynomial in r, and the scale 2^n.
FSSA_INLINE Vec exp(Vec x) {
  // The bound comes first and x second, so that a NaN stays one.
  x = min(broadcast(89.0f), max(broadcast(-104.0f), x));
  const Vec n = round_nearest(mul(x, broadcast(1.44269504f)));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec y = broadcast(1.9875691500e-4f);
  y = fma(y, r, broadcast(1.3981999507e-3f));
  y = fma(y, r, broadcast(8.3334519073e-3f));
  y = fma(y, r, broadcast(4.1665795894e-2f));
  y = fma(y, r, broadcast(1.6666665459e-1f));
  y = fma(y, r, broadcast(5.0000001201e-1f));
  y = fma(mul(r, r), y, add(r, broadcast(1.0f)));
  return scale_by_power(y, n);
}

FSSA_INLINE Vec silu(Vec x) {
  const Vec one = broadcast(1.0f);
  return div(x, add(one, exp(sub(broadcast(0.0f), x))));
}

// x/2 (1 + tanh(s)) = x / (1 + e^-2s),  s = sqrt(2/pi) (x + 0.044715 x^3).
FSSA_INLINE Vec gelu_tanh(Vec x) {
  const Vec cubed = mul(x, mul(x, x));
  const Vec inner = fma(broadcast(0.044715f), cubed, x);
  const Vec minus_two_s = mul(broadcast(-1.5957691216f), inner);
  return div(x, add(broadcast(1.0f), exp(minus_two_s)));
}

}  // namespace FSSA_ISA
