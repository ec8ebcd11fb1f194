// A GPU for tests: kernels written against platform.cuh, run on a CPU.
//
// Every thread of a block is a fiber. It runs until it waits: at a barrier of the block, for the
// other lanes of its warp, for bytes that are on their way. What hardware may do late is done as
// late as it may be: a copy's target is filled with NaN when the copy is issued, and gets its bytes
// only when somebody has waited for them. The order of threads, of blocks and of arriving copies is
// drawn from a seed, so that a missing barrier shows as a wrong result under some of them. Shared
// memory starts as NaN; a write past its end is found.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "emulation_machine.h"
#include "layout.h"

#define FSSA_GLOBAL(threads, blocks) inline void
#define FSSA_DEVICE inline
#define FSSA_GRID_CONSTANT

namespace fssa::cuda {

constexpr bool kEmulated = true;
constexpr bool kHasTileCopies = true;

struct alignas(16) Words4 {
  uint32_t word[4];
};

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

inline int thread_index() { return emulation::machine().current; }
inline int num_threads() { return emulation::machine().block_threads; }
inline int block_x() { return emulation::machine().x; }
inline int block_y() { return emulation::machine().y; }
inline int block_z() { return emulation::machine().z; }
inline char* shared_memory() { return emulation::machine().shared; }
inline void sync_block() { emulation::machine().sync_block(); }

// Throws where the hardware would stop the program: an address that is no multiple of the access.
inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    emulation::machine().fail("an access of " + std::to_string(bytes) + " bytes is misaligned");
  }
}

inline Words4 load_words(const void* source) {
  check_aligned(source, 16);
  return *static_cast<const Words4*>(source);
}

template <typename T>
inline T load(const T* source) {
  check_aligned(source, sizeof(T));
  return *source;
}

inline float load_shared_by_blocks(const float* source) { return load(source); }

template <typename T>
inline void store(T* target, T value) {
  check_aligned(target, sizeof(T));
  *target = value;
}

inline void store_words(void* target, const Words4& value) {
  check_aligned(target, 16);
  *static_cast<Words4*>(target) = value;
}

inline void fence_device() {}

inline int atomic_add(int* target, int value) {
  const int before = *target;
  *target += value;
  return before;
}

inline float inverse_root(float value) { return 1.0f / std::sqrt(value); }

struct Shuffle {
  float value;
  int mask;
};

inline float shuffle_xor(float value, int mask) {
  const Shuffle sent{value, mask};
  float received = 0.0f;
  emulation::machine().together(
      [](emulation::Thread* const* lanes) {
        for (int lane = 0; lane < emulation::kWarp; ++lane) {
          const auto* mine = static_cast<const Shuffle*>(lanes[lane]->sent);
          const auto* other = static_cast<const Shuffle*>(lanes[lane ^ mine->mask]->sent);
          *static_cast<float*>(lanes[lane]->received) = other->value;
        }
      },
      &sent, &received);
  return received;
}

inline void copy_async_or_zero(void* target, const void* source, bool there) {
  check_aligned(target, 16);
  check_aligned(source, 16);
  const emulation::Copy copy{static_cast<char*>(target),
                             there ? static_cast<const char*>(source) : nullptr};
  copy.issue();
  emulation::machine().thread().open.push_back(copy);
}

inline void copy_async(void* target, const void* source) {
  copy_async_or_zero(target, source, true);
}

inline void copy_commit() {
  emulation::Thread& thread = emulation::machine().thread();
  thread.groups.push_back(std::exchange(thread.open, {}));
}

template <int kPending>
inline void copy_wait() {
  emulation::Thread& thread = emulation::machine().thread();
  while (static_cast<int>(thread.groups.size()) > kPending) {
    for (const emulation::Copy& copy : thread.groups.front()) copy.finish();
    thread.groups.pop_front();
  }
}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  check_aligned(barrier, 8);
  const auto count = static_cast<int16_t>(arrivals);
  emulation::state_of(barrier) = {count, count, 0, 0};
}

inline void fence_barrier_init() {}

inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  emulation::BarrierState& state = emulation::state_of(barrier);
  if (state.pending <= 0) emulation::machine().fail("more arrivals than the barrier counts");
  state.bytes += static_cast<int32_t>(bytes);
  --state.pending;
  state.settle();
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  if (emulation::state_of(barrier).arrivals <= 0) {
    emulation::machine().fail("waits at a barrier that nobody has initialised");
  }
  emulation::machine().wait(
      [barrier, parity] { return emulation::state_of(barrier).phase != parity; });
}

inline void copy_tile(void* target, const TileMap& map, int k, int row, uint64_t* barrier) {
  check_aligned(target, kTileAlignment);
  const auto* matrix = reinterpret_cast<const emulation::Matrix*>(&map);
  emulation::machine().in_flight({static_cast<char*>(target), nullptr, matrix, k, row, barrier});
}

struct MatrixLoad {
  const void* row;
};

inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  check_aligned(row, 16);
  const MatrixLoad sent{row};
  emulation::machine().together(
      [](emulation::Thread* const* lanes) {
        const auto element = [&](int matrix, int at_row, int column) -> uint32_t {
          const auto* load = static_cast<const MatrixLoad*>(lanes[8 * matrix + at_row]->sent);
          return static_cast<const uint16_t*>(load->row)[column];
        };
        for (int lane = 0; lane < emulation::kWarp; ++lane) {
          auto* words = static_cast<uint32_t*>(lanes[lane]->received);
          const int g = lane / 4, c = lane % 4;
          for (int matrix = 0; matrix < 4; ++matrix) {
            words[matrix] = element(matrix, 2 * c, g) | element(matrix, 2 * c + 1, g) << 16;
          }
        }
      },
      &sent, matrices);
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(BF16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(FP16 value) {
  const int exponent = (value.bits >> 10) & 31;
  const int fraction = value.bits & 1023;
  float size;
  if (exponent == 31) {
    size = fraction != 0 ? std::nanf("") : INFINITY;
  } else if (exponent == 0) {
    size = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    size = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return std::copysign(size, value.bits & 0x8000 ? -1.0f : 1.0f);
}

inline void from_float(float value, BF16& result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  // A NaN stays one; the rest is rounded to nearest, ties to even.
  if (value != value) {
    result.bits = 0x7fff;
  } else {
    result.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline void from_float(float value, FP16& result) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) {
    result.bits = 0x7fff;
  } else if (size >= 65520.0f) {
    result.bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (size < 6.103515625e-05f) {  // below the smallest normal number
    result.bits = static_cast<uint16_t>(sign | std::lrint(std::ldexp(size, 24)));
  } else {
    int exponent;
    const float fraction = std::frexp(size, &exponent);
    // A fraction that rounds up to the next power of two carries into the exponent.
    const long bits = (static_cast<long>(exponent + 14) << 10) +
                      std::lrint(std::ldexp(fraction, 11)) - 1024;
    result.bits = static_cast<uint16_t>(sign | bits);
  }
}

template <typename T>
struct Fragments {
  const float* sum;
  const uint32_t* a;
  const uint32_t* b;
};

template <typename T>
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Fragments<T> sent{sum, a, b};
  emulation::machine().together(
      [](emulation::Thread* const* lanes) {
        const auto number = [](uint32_t word, int half) {
          return to_float(T{static_cast<uint16_t>(word >> (16 * half))});
        };
        float left[16][16], right[16][8];
        for (int lane = 0; lane < emulation::kWarp; ++lane) {
          const auto* mine = static_cast<const Fragments<T>*>(lanes[lane]->sent);
          const int g = lane / 4, c = lane % 4;
          for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) {
              left[g + 8 * (i % 2)][2 * c + half + 8 * (i / 2)] = number(mine->a[i], half);
            }
            for (int i = 0; i < 2; ++i) {
              right[2 * c + half + 8 * i][g] = number(mine->b[i], half);
            }
          }
        }
        for (int lane = 0; lane < emulation::kWarp; ++lane) {
          const auto* mine = static_cast<const Fragments<T>*>(lanes[lane]->sent);
          auto* result = static_cast<float*>(lanes[lane]->received);
          const int g = lane / 4, c = lane % 4;
          for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i / 2), column = 2 * c + i % 2;
            double total = mine->sum[i];
            for (int k = 0; k < 16; ++k) {
              total += static_cast<double>(left[row][k]) * right[k][column];
            }
            result[i] = static_cast<float>(total);
          }
        }
      },
      &sent, sum);
}

}  // namespace fssa::cuda
