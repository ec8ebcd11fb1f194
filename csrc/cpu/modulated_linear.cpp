#include "modulated_linear.h"

#include "kernels.h"

namespace fssa::cpu {
namespace {

// Calls copy(address of a packed element, row, k) for every element there is.
template <typename T, typename Copy>
void for_each_packed(const void* packed, DType dtype, int64_t k, const Half* halves,
                     int64_t num_halves, int num_threads, const Copy& copy) {
  constexpr int64_t kStep = sizeof(T) == 2 ? 2 : 1;  // consecutive k of one column
  const int64_t padded = (k + kStep - 1) / kStep * kStep;
  run_team(num_threads, [&](Team& team) {
    const Range mine = team.share(num_halves / 2);
    for (int64_t panel = mine.first; panel < mine.last; ++panel) {
      const char* base = static_cast<const char*>(packed) + panel * panel_bytes(dtype, k);
      const T* to = reinterpret_cast<const T*>(base);
      for (int64_t i = 0; i < padded; ++i) {
        for (int64_t lane = 0; lane < kPanelColumns; ++lane) {
          const Half& half = halves[2 * panel + lane / kHalfColumns];
          const int64_t column = lane % kHalfColumns;
          const bool real = column < half.valid && i < k;
          copy(to + (i / kStep * kPanelColumns + lane) * kStep + i % kStep,
               real ? half.row + column : -1, i);
        }
      }
    }
  });
}

template <typename T>
void pack(void* out, const void* matrix, DType dtype, int64_t stride, int64_t k,
          const Half* halves, int64_t num_halves, int num_threads) {
  const T* from = static_cast<const T*>(matrix);
  for_each_packed<T>(out, dtype, k, halves, num_halves, num_threads,
                     [&](const T* at, int64_t row, int64_t i) {
                       *const_cast<T*>(at) = row < 0 ? T{} : from[row * stride + i];
                     });
}

template <typename T>
void unpack(void* matrix, const void* packed, DType dtype, int64_t stride, int64_t k,
            const Half* halves, int64_t num_halves, int num_threads) {
  T* to = static_cast<T*>(matrix);
  for_each_packed<T>(packed, dtype, k, halves, num_halves, num_threads,
                     [&](const T* at, int64_t row, int64_t i) {
                       if (row >= 0) to[row * stride + i] = *at;
                     });
}

}  // namespace

void pack_matrix(void* out, const void* matrix, DType dtype, int64_t row_stride, int64_t k,
                 const Half* halves, int64_t num_halves, int num_threads) {
  (dtype == DType::kFloat32 ? pack<float> : pack<BFloat16>)(out, matrix, dtype, row_stride, k,
                                                            halves, num_halves, num_threads);
}

void unpack_matrix(void* matrix, const void* packed, DType dtype, int64_t row_stride, int64_t k,
                   const Half* halves, int64_t num_halves, int num_threads) {
  (dtype == DType::kFloat32 ? unpack<float> : unpack<BFloat16>)(
      matrix, packed, dtype, row_stride, k, halves, num_halves, num_threads);
}

void TakeRowsCall::check() const {
  IndexCheck{"take_rows", "index", index, 0, num_rows}.run(count.get());
}

std::vector<int64_t> TakeRowsCall::check_key() const {
  return {key(index), num_rows, key(count.variable), count.fixed};
}

void TakeRowsCall::run(Team& team) const { kernels().take_rows(*this, team); }

void ModulatedLinearCall::check() const {
  if (slots == nullptr || family == Family::kNone || family == Family::kStatic) return;
  IndexCheck{"modulated_linear", "slots", slots, 0, num_users}.run(count.get());
}

std::vector<int64_t> ModulatedLinearCall::check_key() const {
  const bool unread = slots == nullptr || family == Family::kNone || family == Family::kStatic;
  return {key(unread ? nullptr : slots), num_users, key(count.variable), count.fixed};
}

const void* ModulatedLinearCall::first_read(const Team& team) const {
  if (family == Family::kNone || family == Family::kFactors) return first_panel(team);
  const Range mine = team.share((width() + kHalfColumns - 1) / kHalfColumns);
  if (mine.first == mine.last) return first_panel(team);
  return static_cast<const char*>(lora_a.data) +
         mine.first / 2 * panel_bytes(lora_a.dtype, in_features);
}

void ModulatedLinearCall::run(Team& team) const { kernels().modulated_linear(*this, team); }

}  // namespace fssa::cpu
