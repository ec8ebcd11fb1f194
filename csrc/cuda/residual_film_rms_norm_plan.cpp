#include <algorithm>
#include <stdexcept>
#include <string>

#include "residual_film_rms_norm.h"

namespace fssa::cuda {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("residual_film_rms_norm: " + what);
}

}  // namespace

NormPlan plan_norm(const DeviceLimits& device, const NormShape& shape) {
  if (shape.num_channels < 1 || shape.num_channels % 8 || shape.num_channels > kMaxChannels) {
    refuse("expected channels in multiples of 8, at most " + std::to_string(kMaxChannels) +
           ", got " + std::to_string(shape.num_channels));
  }
  if (device.capability < 80) {
    refuse("expected a device of capability 8.0 or more, got sm_" +
           std::to_string(device.capability));
  }
  NormPlan plan{};
  plan.row_bytes = round_up(2 * shape.num_channels, 128);
  if (shape.low_rank == 0) {
    plan.blocks_t = shape.num_tokens;
    // Two vectors of eight numbers for each thread.
    plan.threads = std::min(kMaxNormThreads, round_up(divide_up(shape.num_channels, 16), 32));
    plan.parts = plan.row_bytes;
    plan.shared_bytes = plan.parts + 4 * 32;
  } else {
    plan.blocks_t = divide_up(shape.num_tokens, kShrinkTokens);
    plan.blocks_w = divide_up(shape.low_rank, 16);
    plan.threads = 32 * kShrinkWarps;
    plan.parts = rows_bytes(kShrinkTokens, plan.row_bytes);
    plan.shared_bytes = plan.parts + 4 * kShrinkWarps * 16 * kShrinkTokens;
  }
  if (plan.shared_bytes > device.shared_bytes) {
    refuse("expected a device with " + std::to_string(plan.shared_bytes) +
           " bytes of shared memory for a block, got " + std::to_string(device.shared_bytes));
  }
  return plan;
}

}  // namespace fssa::cuda
