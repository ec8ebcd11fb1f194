#include "modulated_linear.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fssa::cpu {
namespace {

// Calls copy(address of a packed element, row, k) for every element there is.
template <typename T, typename Copy>
void for_each_packed(const void* packed, const PanelLayout& layout, int num_threads,
                     const Copy& copy) {
  constexpr int64_t kStep = sizeof(T) == 2 ? 2 : 1;  // consecutive k of one column
  const int64_t parts = layout.parts(), k = layout.k / parts;
  const int64_t padded = (k + kStep - 1) / kStep * kStep;
  const int64_t columns = layout.panel_halves * kHalfColumns;
  run_team(num_threads, [&](Team& team) {
    const Range mine = team.share(layout.num_halves / layout.panel_halves * parts);
    for (int64_t panel = mine.first; panel < mine.last; ++panel) {
      const int64_t first = panel / parts * layout.panel_halves, before = panel % parts * k;
      const char* base = static_cast<const char*>(packed) +
                         panel * layout.panel_halves * half_bytes(layout.dtype, k);
      const T* to = reinterpret_cast<const T*>(base);
      for (int64_t i = 0; i < padded; ++i) {
        for (int64_t lane = 0; lane < columns; ++lane) {
          const Half& half = layout.halves[first + lane / kHalfColumns];
          const int64_t column = lane % kHalfColumns;
          const bool real = column < half.valid && i < k;
          copy(to + (i / kStep * columns + lane) * kStep + i % kStep,
               real ? half.row + column : -1, before + i);
        }
      }
    }
  });
}

template <typename T>
void pack(void* out, const void* matrix, int64_t stride, const PanelLayout& layout,
          int num_threads) {
  const T* from = static_cast<const T*>(matrix);
  for_each_packed<T>(out, layout, num_threads, [&](const T* at, int64_t row, int64_t i) {
    *const_cast<T*>(at) = row < 0 ? T{} : from[row * stride + i];
  });
}

template <typename T>
void unpack(void* matrix, const void* packed, int64_t stride, const PanelLayout& layout,
            int num_threads) {
  T* to = static_cast<T*>(matrix);
  for_each_packed<T>(packed, layout, num_threads, [&](const T* at, int64_t row, int64_t i) {
    if (row >= 0) to[row * stride + i] = *at;
  });
}

}  // namespace

void pack_matrix(void* out, const void* matrix, int64_t row_stride, const PanelLayout& layout,
                 int num_threads) {
  (layout.dtype == DType::kFloat32 ? pack<float> : pack<BFloat16>)(out, matrix, row_stride, layout,
                                                                   num_threads);
}

void unpack_matrix(void* matrix, const void* packed, int64_t row_stride, const PanelLayout& layout,
                   int num_threads) {
  (layout.dtype == DType::kFloat32 ? unpack<float> : unpack<BFloat16>)(matrix, packed, row_stride,
                                                                       layout, num_threads);
}

void TakeRowsCall::check() const {
  IndexCheck{"take_rows", "index", index, 0, num_rows}.run(count.get());
}

std::vector<int64_t> TakeRowsCall::check_key() const {
  return {key(index), num_rows, key(count.variable), count.fixed};
}

void TakeRowsCall::run(Team& team) const { kernels().take_rows(*this, team); }

void ModulatedLinearCall::check() const {
  if (compressed() && !kernels().reads_compressed) {
    throw std::invalid_argument(
        std::string("modulated_linear: expected matrices that are not compressed for ") +
        kernels().name + ", got one that was packed for another instruction set");
  }
  if (reads_slots()) {
    IndexCheck{"modulated_linear", "slots", slots, 0, num_users}.run(count.get());
  }
}

std::vector<int64_t> ModulatedLinearCall::check_key() const {
  const void* const read = reads_slots() ? slots : nullptr;
  return {key(read), num_users, key(count.variable), count.fixed, compressed()};
}

FirstReads ModulatedLinearCall::first_reads(const Team& team) const {
  FirstReads reads;
  if (has_common_factors()) {
    // Tile after tile of the shrink reads another half of A, from the first one round to it again. Of
    // a single tile threads read a panel after the other.
    const int64_t rows = kernels().max_rows, tiles = (count.get() + rows - 1) / rows;
    const int64_t parts = shrink_parts(), panels = shrink_halves() * parts;
    const int64_t together = tiles > 1 ? parts : 1;
    const Range share = team.share(panels / together * tiles);
    const Range mine{share.first * together, share.last * together};
    const int64_t first = mine.first % panels, num = std::min(panels, mine.last - mine.first);
    const int64_t before = std::max<int64_t>(0, first + num - panels);
    if (num > 0) reads.add(shrink_span(first, num - before));
    if (before > 0) reads.add(shrink_span(0, before));
  }
  reads.add(first_panel(team));
  return reads;
}

void ModulatedLinearCall::run(Team& team) const { kernels().modulated_linear(*this, team); }

}  // namespace fssa::cpu
