// y = x W^T + b + low-rank term chosen per row, on packed weights.
//
// Weights lie in panels of 32 output columns, two halves of 16, so that a step of the inner loop
// reads two whole registers: fp32 [panel][K][32], bf16 [panel][K/2][32][2] (an odd K is padded by a
// zero). A half belongs to one projection; where projections are multiplied in the epilogue, the
// two halves of a panel are the same columns of both. A, whose rows are few, lies in panels of one
// half each, and of a part of its K columns, which threads share out where rows of x are few. Panels
// of bf16 may be compressed (compressed.h).
#pragma once

#include <cstdint>

#include "call.h"
#include "compressed.h"

namespace fssa::cpu {

enum class Family : int { kNone = 0, kStatic = 1, kGated = 2, kCore = 3, kFactors = 4 };
enum class Epilogue : int { kNone = 0, kSiluMul = 1, kGeluTanhMul = 2 };

constexpr int kHalfColumns = 16;
constexpr int kPanelColumns = 2 * kHalfColumns;
constexpr int kMostRows = 12;  // that a tile has, whatever the instruction set

// Sixteen output columns: rows row .. row + valid of the stacked matrix.
struct Half {
  int32_t row;
  int32_t column;  // of y
  int32_t valid;   // 0 for a half that only fills its panel
  int32_t split;   // the projection they belong to
};

inline int64_t half_bytes(DType dtype, int64_t k) {
  return (dtype == DType::kFloat32 ? k : (k + 1) / 2) * kHalfColumns * 4;
}

// Of a panel of so many halves, which is compressed where `header_bytes` is not 0.
inline int64_t panel_bytes(DType dtype, int64_t k, int64_t header_bytes = 0, int64_t halves = 2) {
  return header_bytes != 0 ? compressed_panel_bytes(header_bytes, halves * kHalfColumns * k)
                           : halves * half_bytes(dtype, k);
}

// How many equally long parts the K columns of A lie in: four, if each is long enough to be compressed
// and to be worth its thread. Every product with A is the sum of one sum for each part, in order,
// so that no bit depends on who takes which.
inline int64_t shrink_parts(int64_t k) {
  constexpr int64_t kShortest = 128, kStep = 8;
  int64_t parts = 4;
  while (parts > 1 && (k % (parts * kStep) != 0 || k / parts < kShortest)) parts /= 2;
  return parts;
}

// How a matrix [*, K] lies in panels of `panel_halves` halves.
struct PanelLayout {
  DType dtype = DType::kFloat32;
  int64_t k = 0;
  const Half* halves = nullptr;
  int64_t num_halves = 0;  // a multiple of panel_halves
  int64_t panel_halves = 2;

  int64_t parts() const { return panel_halves == 1 ? shrink_parts(k) : 1; }
};

// Lays a row-major matrix [N, K] out in panels at `out`.
void pack_matrix(void* out, const void* matrix, int64_t row_stride, const PanelLayout& layout,
                 int num_threads);

// The reverse, into a row-major matrix.
void unpack_matrix(void* matrix, const void* packed, int64_t row_stride, const PanelLayout& layout,
                   int num_threads);

// Rows `index` of the matrix that was packed in one projection: y_t = scale * W[index_t].
struct TakeRowsCall final : Call {
  void* y = nullptr;  // [T,K], of the matrix's dtype
  int64_t y_stride = 0;
  const void* table = nullptr;
  DType dtype = DType::kFloat32;
  bool packed = false;
  int64_t header_bytes = 0;  // of compressed panels, 0 where they are not
  int64_t row_stride = 0;    // of a table that is not packed
  int64_t k = 0;
  int64_t num_rows = 0;      // of the table
  const int32_t* index = nullptr;
  float scale = 1.0f;
  RowCount count;

  void check() const override;
  std::vector<int64_t> check_key() const override;
  void run(Team& team) const override;
};

struct SideMatrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;        // from row to row, elements
  int64_t user_stride = 0;   // from user to user, elements: factors only
  int64_t header_bytes = 0;  // of compressed panels, 0 where they are not
};

struct ModulatedLinearCall final : Call {
  void* y = nullptr;
  int64_t y_stride = 0;
  DType y_dtype = DType::kFloat32;
  const void* x = nullptr;
  int64_t x_stride = 0;
  DType dtype = DType::kFloat32;  // of x, weight and bias
  const void* weight = nullptr;   // packed
  int64_t header_bytes = 0;       // of its panels where they are compressed, 0 where they are not
  const void* bias = nullptr;     // [N] or null
  SideMatrix lora_a;              // [S*R,K] in panels of one half; factors [U,S*R,K] row-major
  SideMatrix lora_b;              // [N,R] packed like the weight; factors [U,N,R] row-major
  SideMatrix rows;                // [U,S*R] or [U,S,R,R], a user's part contiguous
  const int32_t* slots = nullptr;
  const Half* halves = nullptr;
  float* low_rank = nullptr;  // [T,S*R] scratch
  float* partial = nullptr;   // [kMostRows,parts,S*R] scratch
  float* own = nullptr;       // [threads,kMostRows,S*R] scratch
  float* unmixed = nullptr;   // [T,S*R] scratch; core only
  float* widened = nullptr;   // [T,K] scratch; x of bf16 only
  int64_t num_halves = 0;     // even
  int64_t num_splits = 0;
  int64_t in_features = 0;
  int64_t rank = 0;
  int64_t num_users = 0;
  Family family = Family::kNone;
  Epilogue epilogue = Epilogue::kNone;
  RowCount count;

  // Whether there is a low-rank term whose A and B, packed, are the same for all rows.
  bool has_common_factors() const {
    return family != Family::kNone && family != Family::kFactors;
  }
  bool reads_slots() const {
    return slots != nullptr && family != Family::kNone && family != Family::kStatic;
  }
  int64_t width() const { return num_splits * rank; }
  int64_t num_panels() const { return num_halves / 2; }
  bool compressed() const {
    return header_bytes != 0 || lora_a.header_bytes != 0 || lora_b.header_bytes != 0;
  }
  int64_t panel_bytes() const { return cpu::panel_bytes(dtype, in_features, header_bytes); }
  const char* panel(int64_t index) const {
    return static_cast<const char*>(weight) + index * panel_bytes();
  }
  int64_t shrink_parts() const { return cpu::shrink_parts(in_features); }
  int64_t part_columns() const { return in_features / shrink_parts(); }
  int64_t shrink_bytes() const {
    return cpu::panel_bytes(lora_a.dtype, part_columns(), lora_a.header_bytes, 1);
  }
  // Part after part of one half after the other.
  const char* shrink_panel(int64_t index) const {
    return static_cast<const char*>(lora_a.data) + index * shrink_bytes();
  }
  int64_t expand_bytes() const {
    return cpu::panel_bytes(lora_b.dtype, rank, lora_b.header_bytes);
  }
  const char* expand_panel(int64_t index) const {
    return static_cast<const char*>(lora_b.data) + index * expand_bytes();
  }
  int64_t shrink_halves() const { return (width() + kHalfColumns - 1) / kHalfColumns; }
  Span shrink_span(int64_t first, int64_t num) const {
    return {shrink_panel(first), num * shrink_bytes()};
  }
  // Where in its user's row the modulation of row t has the number `index`.
  const void* user_row(int64_t t, int64_t index) const {
    return advance(rows.data, rows.dtype, slots[t] * rows.stride + index);
  }
  // The panel a thread of the team begins with, or nearly, where rows are few.
  Span first_panel(const Team& team) const {
    return {panel(team.share(num_panels()).first), panel_bytes()};
  }

  void check() const override;
  std::vector<int64_t> check_key() const override;
  FirstReads first_reads(const Team& team) const override;
  void run(Team& team) const override;
};

}  // namespace fssa::cpu
