// Types and index arithmetic that the host and the device share. No CUDA header, no torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FSSA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FSSA_HOST_DEVICE inline
#endif

namespace fssa::cuda {

// As the Python side numbers them (fssa_kernels/cuda/module.py).
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct DeviceLimits {
  int capability;  // 80 for sm_80
  int num_sms;
  int shared_bytes;  // that a block may take
};

FSSA_HOST_DEVICE int divide_up(int value, int by) { return (value + by - 1) / by; }
FSSA_HOST_DEVICE int round_up(int value, int to) { return divide_up(value, to) * to; }

// Where a matrix [rows, columns] of 16-bit numbers lies, as the tensor copy engine wants to be
// told.
struct alignas(128) TileMap {
  uint64_t words[16];
};

// Rows of 64 numbers, 128 bytes each, one after another, as the tensor copy engine lays them: of
// row r the 16 bytes number `chunk` lie at place chunk ^ (r % 8). Eight lanes read at once, four
// neighbours in each of two rows: from different banks if the rows are four apart, so lanes take
// the rows of eight in the order of row_of_lanes.
constexpr int kTileRowBytes = 128;
constexpr int kTileAlignment = 1024;  // of the first row

FSSA_HOST_DEVICE int tile_offset(int row, int chunk) {
  return row * kTileRowBytes + 16 * (chunk ^ (row % 8));
}

// Row of eight that the lanes 4g .. 4g + 3 hold: 0, 4, 1, 5, 2, 6, 3, 7.
FSSA_HOST_DEVICE int row_of_lanes(int g) { return g / 2 + 4 * (g % 2); }

// Rows of any length in shared memory. Eight lanes read 16 bytes each at once, four of one row and
// four of the next: rows of a pair lie an odd multiple of 64 bytes apart, so in different banks.
constexpr int kRowGap = 64;

// Where a row begins, in bytes. `row_bytes` is a multiple of 128.
FSSA_HOST_DEVICE int row_offset(int row, int row_bytes) {
  return row * row_bytes + (row + 1) / 2 * kRowGap;
}

// Bytes that rows take, rounded so that others can follow.
FSSA_HOST_DEVICE int rows_bytes(int rows, int row_bytes) {
  return round_up(divide_up(rows, 2) * (2 * row_bytes + kRowGap), 128);
}

}  // namespace fssa::cuda
