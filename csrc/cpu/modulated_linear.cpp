#include "modulated_linear.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "dot.h"

namespace fssa::cpu {
namespace {

// Rows are taken in chunks, so that their fp32 copies stay in cache while W streams past, and
// columns in blocks, so that a block of W stays in L1 while the rows of the chunk use it.
constexpr int64_t kChunkRows = 64;
constexpr int64_t kBlockColumns = 16;

struct Block {
  int64_t split;
  int64_t first;  // output column, counted over all projections
  int64_t size;
};

std::vector<Block> make_blocks(const ModulatedLinearArgs& a) {
  // With an epilogue the second projection has no blocks of its own: it rides with the first.
  const size_t num_splits = a.epilogue == Epilogue::kNone ? a.splits.size() : 1;
  std::vector<Block> blocks;
  int64_t start = 0;
  for (size_t s = 0; s < num_splits; ++s) {
    const int64_t stop = start + a.splits[s];
    for (int64_t n = start; n < stop; n += kBlockColumns) {
      blocks.push_back({static_cast<int64_t>(s), n, std::min(kBlockColumns, stop - n)});
    }
    start = stop;
  }
  return blocks;
}

void check_slots(const ModulatedLinearArgs& a) {
  if (a.slots == nullptr) return;
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    if (a.slots[t] < 0 || a.slots[t] >= a.num_users) {
      throw std::invalid_argument("modulated_linear: slots: expected values in [0, " +
                                  std::to_string(a.num_users) + "), got " +
                                  std::to_string(a.slots[t]) + " at row " + std::to_string(t));
    }
  }
}

int64_t user_of(const ModulatedLinearArgs& a, int64_t t) {
  return a.family == Family::kFactors ? a.slots[t] : 0;
}

// The fp32 copy of row t of x, where x is not fp32 already.
void widen(const ModulatedLinearArgs& a, int64_t t, float* out) {
  const void* row = advance(a.x.data, a.x.dtype, t * a.x.stride);
  for (int64_t k = 0; k < a.in_features; ++k) out[k] = load(row, a.x.dtype, k);
}

// u = A x_t.
void project(const ModulatedLinearArgs& a, int64_t t, const float* x, int64_t width, float* u) {
  const int64_t offset = user_of(a, t) * a.lora_a.user_stride;
  dot_columns(x, advance(a.lora_a.data, a.lora_a.dtype, offset), a.lora_a.dtype, a.lora_a.stride,
              a.in_features, width, u);
}

// u <- u * g (gated) or M_s u_s for every projection s (core), with the state of row t's user.
void modulate(const ModulatedLinearArgs& a, int64_t t, int64_t width, float* u, float* spare) {
  if (a.family != Family::kGated && a.family != Family::kCore) return;
  const DType dtype = a.rows.dtype;
  const void* state = advance(a.rows.data, dtype, a.slots[t] * a.rows.stride);
  if (a.family == Family::kGated) {
    for (int64_t r = 0; r < width; ++r) u[r] *= load(state, dtype, r);
    return;
  }
  for (int64_t first = 0; first < width; first += a.rank) {
    const void* core = advance(state, dtype, first * a.rank);
    dot_columns(u + first, core, dtype, a.rank, a.rank, a.rank, spare + first);
  }
  std::copy(spare, spare + width, u);
}

// out[c] = W x + b + B_s u_s for the columns of one block, in fp32.
void block_columns(const ModulatedLinearArgs& a, int64_t t, const float* x, const float* u,
                   const Block& block, float* out) {
  dot_columns(x, advance(a.weight.data, a.weight.dtype, block.first * a.weight.stride),
              a.weight.dtype, a.weight.stride, a.in_features, block.size, out);
  if (a.bias.data != nullptr) {
    for (int64_t c = 0; c < block.size; ++c) {
      out[c] += load(a.bias.data, a.bias.dtype, block.first + c);
    }
  }
  if (a.family == Family::kNone) return;
  float low[kBlockColumns];
  const int64_t offset = user_of(a, t) * a.lora_b.user_stride + block.first * a.lora_b.stride;
  dot_columns(u + block.split * a.rank, advance(a.lora_b.data, a.lora_b.dtype, offset),
              a.lora_b.dtype, a.lora_b.stride, a.rank, block.size, low);
  for (int64_t c = 0; c < block.size; ++c) out[c] += low[c];
}

float activate(float value, Epilogue epilogue) {
  if (epilogue == Epilogue::kSiluMul) return value / (1.0f + std::exp(-value));
  const float inner = 0.7978845608028654f * (value + 0.044715f * value * value * value);
  return 0.5f * value * (1.0f + std::tanh(inner));
}

void write_block(const ModulatedLinearArgs& a, int64_t t, const float* x, const float* u,
                 const Block& block, int64_t out_columns) {
  float out[kBlockColumns];
  block_columns(a, t, x, u, block, out);
  if (a.epilogue != Epilogue::kNone) {
    float up[kBlockColumns];
    block_columns(a, t, x, u, {1, block.first + a.splits[0], block.size}, up);
    for (int64_t c = 0; c < block.size; ++c) out[c] = activate(out[c], a.epilogue) * up[c];
  }
  for (int64_t c = 0; c < block.size; ++c) {
    store(a.y, a.x.dtype, t * out_columns + block.first + c, out[c]);
  }
}

}  // namespace

void modulated_linear(const ModulatedLinearArgs& a) {
  check_slots(a);
  const std::vector<Block> blocks = make_blocks(a);
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  const int64_t out_columns = blocks.empty() ? 0 : blocks.back().first + blocks.back().size;
  const int64_t width =
      a.family == Family::kNone ? 0 : static_cast<int64_t>(a.splits.size()) * a.rank;
  const int64_t max_rows = std::min(kChunkRows, a.num_tokens);
  const bool copies = a.x.dtype != DType::kFloat32;
  std::vector<float> wide(copies ? max_rows * a.in_features : 0);
  std::vector<float> u(max_rows * width), spare(max_rows * width);
  (void)a.num_threads;  // only read by OpenMP

  for (int64_t start = 0; start < a.num_tokens; start += kChunkRows) {
    const int64_t num_rows = std::min(kChunkRows, a.num_tokens - start);
    const auto x_row = [&](int64_t i) {
      return copies ? wide.data() + i * a.in_features
                    : static_cast<const float*>(a.x.data) + (start + i) * a.x.stride;
    };
#pragma omp parallel num_threads(a.num_threads)
    {
      // Whole rows, not columns, are shared out here: one barrier instead of three, which is what
      // counts when there are few rows, and A x is a small part of the work.
#pragma omp for schedule(static)
      for (int64_t i = 0; i < num_rows; ++i) {
        if (copies) widen(a, start + i, wide.data() + i * a.in_features);
        if (width == 0) continue;
        project(a, start + i, x_row(i), width, u.data() + i * width);
        modulate(a, start + i, width, u.data() + i * width, spare.data() + i * width);
      }
#pragma omp for schedule(static)
      for (int64_t b = 0; b < num_blocks; ++b) {
        for (int64_t i = 0; i < num_rows; ++i) {
          write_block(a, start + i, x_row(i), u.data() + i * width, blocks[b], out_columns);
        }
      }
    }
  }
}

}  // namespace fssa::cpu
