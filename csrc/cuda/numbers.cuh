// Tensors whose type is known only when a kernel runs.
#pragma once

#include "layout.h"
#include "platform.cuh"

namespace fssa::cuda {

// One number of a matrix that is in T or in fp32.
template <typename T>
FSSA_DEVICE float load_number(const void* base, bool is_float, int64_t index) {
  return is_float ? load(static_cast<const float*>(base) + index)
                  : to_float(load(static_cast<const T*>(base) + index));
}

// Eight numbers of T, of which two stand in a word.
template <typename T>
FSSA_DEVICE void unpack(const Words4& words, float (&numbers)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    numbers[i] = to_float(T{static_cast<uint16_t>(words.word[i / 2] >> (16 * (i % 2)))});
  }
}

template <typename T>
FSSA_DEVICE Words4 pack(const float (&numbers)[8]) {
  Words4 words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    T low, high;
    from_float(numbers[2 * i], low);
    from_float(numbers[2 * i + 1], high);
    words.word[i] = low.bits | static_cast<uint32_t>(high.bits) << 16;
  }
  return words;
}

FSSA_DEVICE float not_a_number() { return as_float(0x7fffffffu); }

}  // namespace fssa::cuda
