#include <algorithm>
#include <stdexcept>

#include "modulated_linear.h"

namespace fssa::cuda {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("modulated_linear: " + what);
}

int64_t tiles_of(const LinearShape& shape, int block_columns) {
  if (shape.paired) return divide_up(shape.splits[0], block_columns / 2);
  int64_t tiles = 0;
  for (const int size : shape.splits) tiles += divide_up(size, block_columns);
  return tiles;
}

SharedLayout lay_out(const LinearPlan& plan, const LinearShape& shape) {
  const int tokens = 8 * plan.token_tiles;
  const int rows = plan.block_columns + plan.low_rows;
  const int projections = shape.paired ? 2 : 1;
  const int rank = round_up(shape.rank, 8);
  SharedLayout shared{};
  shared.stage_bytes = kHalves * kTileRowBytes * (rows + tokens);
  // An odd multiple of 8 words, so that a warp's lanes write their sums to different banks.
  shared.sums_pitch = rows + 8;
  shared.low_pitch = projections * rank;
  shared.lora_b_pitch = plan.block_columns;
  shared.sums = plan.stages * shared.stage_bytes;
  shared.low = shared.sums + 4 * tokens * shared.sums_pitch;
  shared.lora_b = shared.low + 4 * tokens * shared.low_pitch;
  const bool shared_b = shape.family != Family::kFactors;
  shared.barriers = shared.lora_b + (shared_b ? 4 * rank * shared.lora_b_pitch : 0);
  shared.flag = shared.barriers + 8 * kMaxStages;
  // Memory begins somewhere, and tiles at a multiple of their alignment.
  shared.total = shared.flag + 16 + kTileAlignment;
  return shared;
}

// The most stages that fit for so many rows of x, with their layout; below 2, the bytes of 2.
void fit(LinearPlan& plan, const DeviceLimits& device, const LinearShape& shape, int token_tiles) {
  plan.token_tiles = token_tiles;
  for (plan.stages = kMaxStages; plan.stages >= 2; --plan.stages) {
    plan.shared = lay_out(plan, shape);
    if (plan.shared.total <= device.shared_bytes) return;
  }
}

bool fits(LinearPlan& plan, const DeviceLimits& device, const LinearShape& shape) {
  fit(plan, device, shape, kMaxTokens / 8);
  return plan.stages >= 2;
}

// The shape of a tile, the widest that suits. Its columns depend neither on the number of rows of x
// nor on the term, and how u is made not on the rows, for then a row's bits would too.
bool choose_tile(LinearPlan& plan, const DeviceLimits& device, const LinearShape& shape) {
  const bool may_loop = shape.rank > 0 && shape.family != Family::kFactors &&
                        !(shape.family == Family::kCore && shape.rank > 32);
  const int low_rows = (shape.paired ? 2 : 1) * round_up(shape.rank, 16);
  for (const int columns : {128, 64, 32}) {
    // A wide tile reads x and A less often; of a small weight there are too few for every
    // multiprocessor to get several units.
    const int64_t tiles = tiles_of(shape, columns);
    if (columns > 32 && tiles * plan.units_per_tile < 4 * device.num_sms) continue;
    plan.block_columns = columns;
    plan.num_tiles = static_cast<int>(tiles);
    plan.in_loop = false;
    plan.low_rows = 0;
    LinearShape largest = shape;
    largest.family = Family::kGated;
    largest.rank = kMaxRank;
    if (!fits(plan, device, largest)) continue;
    // A is read from the L2 cache once for each tile: with too much of it that takes longer than
    // another launch.
    plan.in_loop = may_loop && low_rows <= columns / 2;
    plan.low_rows = plan.in_loop ? low_rows : 0;
    if (!fits(plan, device, shape)) {
      plan.in_loop = false;
      plan.low_rows = 0;
    }
    return true;
  }
  return false;
}

}  // namespace

LinearPlan plan_linear(const DeviceLimits& device, const LinearShape& shape) {
  if (shape.num_tokens < 1 || shape.num_tokens > kMaxTokens) {
    refuse("expected 1 to " + std::to_string(kMaxTokens) + " rows of x, got " +
           std::to_string(shape.num_tokens));
  }
  if (shape.in_features < 1 || shape.in_features % 8) {
    refuse("expected in_features in multiples of 8, got " + std::to_string(shape.in_features));
  }
  if (shape.rank > kMaxRank) {
    refuse("expected a rank of at most " + std::to_string(kMaxRank) + ", got " +
           std::to_string(shape.rank));
  }
  if (shape.splits.empty() || shape.splits.size() > kMaxProjections) {
    refuse("expected 1 to " + std::to_string(kMaxProjections) + " projections, got " +
           std::to_string(shape.splits.size()));
  }
  if (shape.paired && (shape.splits.size() != 2 || shape.splits[0] != shape.splits[1])) {
    refuse("expected two projections of equal size to multiply");
  }
  if (device.capability < 80) {
    refuse("expected a device of capability 8.0 or more, got sm_" +
           std::to_string(device.capability));
  }
  LinearPlan plan{};
  plan.tiles = device.capability >= 90;
  plan.units_per_tile = divide_up(shape.in_features, kBlockK);
  if (!choose_tile(plan, device, shape)) {
    refuse("expected a device with " + std::to_string(plan.shared.total) +
           " bytes of shared memory for a block, got " + std::to_string(device.shared_bytes));
  }
  const int64_t units = static_cast<int64_t>(plan.num_tiles) * plan.units_per_tile;
  if (units * (device.num_sms + 1) > INT32_MAX) {
    refuse("expected a weight of at most " + std::to_string(INT32_MAX / (device.num_sms + 1)) +
           " tiles of " + std::to_string(plan.block_columns) + " by " + std::to_string(kBlockK) +
           " numbers, got " + std::to_string(units));
  }
  plan.grid = std::min(device.num_sms, std::max(1, (plan.units() + 1) / 2));
  plan.threads = 2 * (plan.block_columns + plan.low_rows);
  fit(plan, device, shape, shape.num_tokens <= 8 ? 1 : shape.num_tokens <= 16 ? 2 : 4);
  plan.partial_floats =
      static_cast<int64_t>(2) * plan.grid * 8 * plan.token_tiles * plan.block_columns;
  return plan;
}

}  // namespace fssa::cuda
