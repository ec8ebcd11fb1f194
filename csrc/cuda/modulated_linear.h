// y = x W^T + b + low-rank term for few rows: what a launch is made of. No device code, no torch.
//
// The grid is one block for each multiprocessor, or fewer. The work is cut into units, a tile of
// columns by kBlockK numbers of K, tile after tile; a block takes a run of units and streams them
// through shared memory without a pause at the ends of tiles. A tile that several blocks share is
// added up by the last of them to come, in the order of K. Which units a block takes depends on the
// weight and the device, never on the rows of x or their modulation: so a row has the same bits in
// every batch, and a row of nobody those of the unmodulated product.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layout.h"

namespace fssa::cuda {

constexpr int kMaxTokens = 32;
constexpr int kMaxProjections = 4;
constexpr int kMaxRank = 64;
constexpr int kBlockK = 128;
constexpr int kHalves = 2 * kBlockK / kTileRowBytes;  // of a stage, each of 64 numbers of K
constexpr int kMaxStages = 6;
constexpr int kMaxLinearThreads = 2 * (128 + 64);  // of the widest tile, and A half as wide
constexpr int kLowRankThreads = 512;

enum class Family : int { kNone = 0, kStatic = 1, kGated = 2, kCore = 3, kFactors = 4 };
enum class Epilogue : int { kNone = 0, kSiluMul = 1, kGeluTanhMul = 2 };

struct LinearShape {
  int num_tokens;
  int in_features;
  std::vector<int> splits;
  bool paired;  // two projections that the epilogue multiplies
  Family family;
  int rank;  // 0 without a term
};

// Where everything lies in a block's shared memory, in bytes from the first multiple of
// kTileAlignment. A stage has, for each half of its numbers of K, rows of W, then of A, then of x.
// Behind the stages:
//   sums [tokens][rows] fp32: products of this unit's rows of W, then of A;
//   low [tokens][low_columns] fp32: gates, then u as the user sees it;
//   lora_b [rank, up to a multiple of 8][columns] fp32; the barriers of the stages; a flag.
struct SharedLayout {
  int stage_bytes;
  int sums, sums_pitch;
  int low, low_pitch;
  int lora_b, lora_b_pitch;
  int barriers;
  int flag;
  int total;
};

struct LinearPlan {
  bool tiles;          // copied by the tensor copy engine, else by cp.async
  bool in_loop;        // u = x A^T is made on the way
  int token_tiles;     // of 8 rows of x
  int block_columns;   // rows of W in a tile
  int low_rows;        // rows of A beside them, up to a multiple of 16 for each projection
  int num_tiles;
  int units_per_tile;
  int grid;
  int threads;
  int stages;
  SharedLayout shared;
  int64_t partial_floats;

  FSSA_HOST_DEVICE int units() const { return num_tiles * units_per_tile; }
};

// Throws std::invalid_argument naming the limit that the shape or the device does not keep.
LinearPlan plan_linear(const DeviceLimits& device, const LinearShape& shape);

// First unit of a block. Products of units and blocks have 32 bits: planning sees to it.
FSSA_HOST_DEVICE int first_unit(int block, int units, int grid) { return block * units / grid; }

// The block that takes a unit.
FSSA_HOST_DEVICE int owner_of(int unit, int units, int grid) {
  return ((unit + 1) * grid - 1) / units;
}

// A tile of columns: which projection, its first row of W, how many (of each of two, if paired).
struct TilePlace {
  int projection;
  int first;
  int columns;
};

FSSA_HOST_DEVICE TilePlace place_of(int tile, const int (&ends)[kMaxProjections],
                                    int num_projections, int block_columns) {
  int begin = 0;
  for (int s = 0; s < num_projections; ++s) {
    const int tiles = divide_up(ends[s] - begin, block_columns);
    if (tile < tiles) {
      const int first = begin + tile * block_columns;
      const int left = ends[s] - first;
      return {s, first, left < block_columns ? left : block_columns};
    }
    tile -= tiles;
    begin = ends[s];
  }
  return {0, 0, 0};
}

// Where a block leaves its part of a tile that it shares: only its first and its last are shared.
FSSA_HOST_DEVICE int partial_slot(int block, int tile, int units, int units_per_tile, int grid) {
  const bool first = first_unit(block, units, grid) / units_per_tile == tile;
  return 2 * block + (first ? 0 : 1);
}

// What a kernel is given. Strides count elements; null is none.
struct LinearArguments {
  TileMap weight_map, lora_a_map, x_map;  // where the tensor copy engine reads; the launcher's
  void* y;  // [T, columns of the result]
  float* partial;
  int* counters;  // zero, one for each tile, and left zero
  const void* x;
  const void* weight;
  const void* bias;
  const void* lora_a;  // in_loop
  const void* lora_b;
  const void* rows;    // gated, core; in_loop
  const float* low;    // [T, S*R], made beforehand; not in_loop
  const int32_t* slots;
  int64_t stride_x, stride_w, stride_a, stride_b, stride_b_user, stride_rows, stride_low;
  int num_tokens, in_features, out_columns, num_projections, rank, num_users;
  int ends[kMaxProjections];  // of the projections, counted from 0
  Family family;
  Epilogue epilogue;
  bool lora_b_is_float, rows_is_float;
  LinearPlan plan;
};

// Launches in that stream. Throws std::runtime_error with CUDA's word for what went wrong.
void launch_linear(const LinearArguments& arguments, DType dtype, uintptr_t stream);

// low [T, S*R] = u as each row's user sees it: for factors, and for an A too large for the tile.
struct LowRankArguments {
  float* low;
  const void* x;
  const void* lora_a;  // [S*R, K], factors [U, S*R, K]
  const void* rows;
  const int32_t* slots;
  int64_t stride_x, stride_a, stride_a_user, stride_rows, stride_low;
  int num_tokens, in_features, num_projections, rank, num_users;
  Family family;
  bool rows_is_float;
};

void launch_low_rank(const LowRankArguments& arguments, DType dtype, uintptr_t stream);

}  // namespace fssa::cuda
