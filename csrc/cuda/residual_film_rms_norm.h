// h = gamma * (residual + x) + beta, normed = h / rms(h) * (weight + offset), and behind it, if
// there is an A, (normed A^T) * gates: what a launch is made of. No device code, no torch.
//
// Without A a block takes one row. With it, a block takes eight rows, which are the columns of the
// matrix instruction, and sixteen rows of A; blocks that share rows of x each normalise them, and
// the first one writes them.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fssa::cuda {

constexpr int kMaxChannels = 16384;
constexpr int kMaxNormThreads = 1024;
constexpr int kShrinkTokens = 8;
constexpr int kShrinkWarps = 8;

struct NormShape {
  int num_tokens;
  int num_channels;
  int low_rank;  // rows of A; 0 for none
};

struct NormPlan {
  int blocks_t;
  int blocks_w;  // 0 without A
  int threads;
  int row_bytes;  // of a row in shared memory
  int parts;      // where partial sums lie, in bytes
  int shared_bytes;
};

// Throws std::invalid_argument naming the limit that the shape or the device does not keep.
NormPlan plan_norm(const DeviceLimits& device, const NormShape& shape);

// Strides count elements; null is none. A user's part of `film` is contiguous.
struct NormArguments {
  void* normed;  // [T, stride_normed], of which C + W are written
  void* h;       // [T, C]
  const void* x;
  const void* residual;
  const void* weight;
  const void* film;  // [U, 2, C]
  const void* lora_a;
  const void* gates;
  const int32_t* slots;
  int64_t stride_normed, stride_x, stride_residual, stride_film, stride_a, stride_gates;
  int num_tokens, num_channels, low_rank, num_users, num_gates;
  float eps, weight_offset;
  bool weight_is_float, film_is_float, gates_is_float;
  bool weight_aligned, film_aligned, normed_aligned;  // can be read or written 16 bytes at a time
  NormPlan plan;
};

void launch_norm(const NormArguments& arguments, DType dtype, uintptr_t stream);

}  // namespace fssa::cuda
