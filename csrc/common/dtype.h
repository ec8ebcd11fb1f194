// Element types as the Python side numbers them (fssa_kernels/native.py), and their conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace fssa {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(bits >> 16)};
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const void* advance(const void* base, DType dtype, int64_t elements) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}

inline void* advance(void* base, DType dtype, int64_t elements) {
  return static_cast<char*>(base) + elements * size_of(dtype);
}

inline float load(const void* base, DType dtype, int64_t index) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(base)[index]
                                  : to_float(static_cast<const BFloat16*>(base)[index]);
}

inline void store(void* base, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<BFloat16*>(base)[index] = to_bfloat16(value);
  }
}

}  // namespace fssa
