// Rows of a matrix by their numbers: an embedding, packed as the vocabulary head or not.
namespace FSSA_ISA {

// The row of a table that is packed and compressed.
FSSA_INLINE void take_compressed(const TakeRowsCall& a, int64_t row, BFloat16* y) {
  const char* panel = static_cast<const char*>(a.table) +
                      row / kPanelColumns * panel_bytes(a.dtype, a.k, a.header_bytes);
  const int64_t lane = row % kPanelColumns;
  const char* unit = panel + a.header_bytes;
  constexpr int64_t kColumns = kUnitWords / kPanelColumns;
  for (int64_t i = 0; i < a.k; i += kColumns, unit += kUnitBytes) {
    for (int64_t j = 0; j < kColumns; ++j) {
      y[i + j].bits = word_in_unit(panel, unit, j / 2, 2 * lane + j % 2);
    }
  }
  for (const Exception* e = exceptions_of(panel); e->word != kNoWord; ++e) {
    const int64_t in_pair = e->word % kGroupWords;
    if (in_pair / 2 == lane) {
      y[e->word / kGroupWords * 2 + in_pair % 2].bits = static_cast<uint16_t>(e->bits);
    }
  }
}

template <typename T>
void take_rows(const TakeRowsCall& a, Team& team) {
  const Range mine = team.share(a.count.get());
  for (int64_t t = mine.first; t < mine.last; ++t) {
    T* y = static_cast<T*>(a.y) + t * a.y_stride;
    const int64_t row = a.index[t];
    if (!a.packed) {
      const T* from = static_cast<const T*>(a.table) + row * a.row_stride;
      for (int64_t i = 0; i < a.k; ++i) y[i] = from[i];
    } else if (a.header_bytes != 0) {
      take_compressed(a, row, reinterpret_cast<BFloat16*>(y));
    } else {
      const char* panel = static_cast<const char*>(a.table) +
                          row / kPanelColumns * panel_bytes(a.dtype, a.k);
      const int64_t lane = row % kPanelColumns;
      constexpr int64_t kStep = sizeof(T) == 2 ? 2 : 1;
      const T* from = reinterpret_cast<const T*>(panel) + lane * kStep;
      for (int64_t i = 0; i < a.k; ++i) {
        y[i] = from[i / kStep * (kPanelColumns * kStep) + i % kStep];
      }
    }
    if (a.scale != 1.0f) {
      for (int64_t i = 0; i < a.k; i += 16) {
        const int64_t left = a.k - i;
        store_up_to(y + i, mul(load_up_to(y + i, left), broadcast(a.scale)), left);
      }
    }
  }
}

}  // namespace FSSA_ISA
