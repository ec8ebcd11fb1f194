// Kernel of the modulated linear, by tiles of rows and panels of columns. A row's bits do not depend
// on its neighbours: whatever tile it is in, its sums are the same chains.
namespace FSSA_ISA {

// y = the sums of kRows rows of one half.
template <int kRows, int kHalves, typename Y>
FSSA_INLINE void store_half(Y* y, int64_t stride, int64_t valid, const Vec (&acc)[kRows][kHalves],
                            int h) {
  if (valid == kHalfColumns) {
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) store(y + r * stride, acc[r][h]);
  } else {
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) store_first(y + r * stride, acc[r][h], valid);
  }
}

// y = activation(gate) up for kRows rows of a panel whose halves are the two. Both in memory: the
// loop over them is too long to be unrolled.
template <int kRows>
FSSA_INLINE void store_activated(const ModulatedLinearCall& a, int64_t t, const Half& half,
                                 const Vec (&sums)[2][kRows]) {
  for (int r = 0; r < kRows; ++r) {
    const Vec gate = a.epilogue == Epilogue::kSiluMul ? silu(sums[0][r]) : gelu_tanh(sums[0][r]);
    store_as(a.y, a.y_dtype, (t + r) * a.y_stride + half.column, mul(gate, sums[1][r]),
             half.valid);
  }
}

// More of y than this no cache keeps until it is written again: logits.
constexpr int64_t kKeptBytes = 1024 * 1024;

// Makes the lines this core's that kRows rows of a panel are stored to, while their products are taken:
// each from its beginning on, since halves of bf16 share them. Most of them others have read since they
// were stored last. Where y is more than a cache keeps, none has
// its lines: each store would wait for the one before it, requests wait for nothing. Of a single tile a
// step was slower with these.
template <int kRows>
FSSA_INLINE void own_stored(const ModulatedLinearCall& a, int64_t t, int64_t panel) {
  const int64_t size = size_of(a.y_dtype), num_tokens = a.count.get();
  const bool kept = num_tokens * a.y_stride * size <= kKeptBytes;
  if (!kept && num_tokens <= kMaxRows) return;
  const Half* half = a.halves + 2 * panel;
  for (int h = 0; h < (a.epilogue == Epilogue::kNone ? 2 : 1); ++h, ++half) {
    char* y = static_cast<char*>(a.y) + (t * a.y_stride + half->column) * size;
    for (int64_t i = bytes_to_line(y); i < half->valid * size; i += kLineBytes) {
      for (int r = 0; r < kRows; ++r) {
        char* const line = y + r * a.y_stride * size + i;
        kept ? claim(line) : prefetch_to_write(line);
      }
    }
  }
}

// acc += x W^T for rows [t, t + kRows) and kHalves halves of a panel, from half `first` on.
template <typename T, int kRows, int kHalves, typename X>
FSSA_INLINE void multiply_panel(const ModulatedLinearCall& a, const Input<X>& input, int64_t t,
                                int64_t panel, int first, Vec (&acc)[kRows][kHalves],
                                Ahead& ahead) {
  const auto rows = input.template rows<kRows>(t);
  if constexpr (kReadsCompressed && kHalves == 2 && sizeof(T) == 2) {
    if (a.header_bytes != 0) {
      accumulate_compressed(rows, a.panel(panel), a.header_bytes, a.in_features, acc, ahead);
      return;
    }
  }
  accumulate<kStepBytes / 2 * kHalves>(rows, half_at<T>(a.panel(panel), 0, first), a.in_features,
                                       acc, ahead);
}

// Rows [t, t + kRows) of one panel, from the product to the stored result, as many halves at a time
// as the registers hold sums of. `ready` says where v is, once the product is done and before the
// low-rank term is needed. Sums are named by constants alone, in loops that are unrolled: so they stay in
// registers.
template <int kRows, typename T, typename X, typename Ready>
FSSA_NOINLINE void tile(const ModulatedLinearCall& a, const Input<X>& input, int64_t t,
                        int64_t panel, const Ready& ready, Ahead& brought) {
  constexpr int kHalves = 2 * kRows <= kMaxSums ? 2 : 1;
  Vec activated[2][kRows];
  Ahead ahead = brought;
  own_stored<kRows>(a, t, panel);
  for (int first = 0; first < 2; first += kHalves) {
    Vec acc[kRows][kHalves];
    FSSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) acc[r][h] = broadcast(0.0f);
    }
    multiply_panel<T>(a, input, t, panel, first, acc, ahead);
    const float* const low_rank = ready();
    if (a.family == Family::kFactors) {
      expand_own(a, low_rank, t, panel, first, acc);
    } else if (a.family != Family::kNone) {
      if (a.lora_b.dtype == DType::kFloat32) {
        expand_packed<kRows, kHalves, float, float>(a, low_rank, t, panel, first, acc, ahead);
      } else {
        expand_packed<kRows, kHalves, X, BFloat16>(a, low_rank, t, panel, first, acc, ahead);
      }
    }
    const Half* halves = a.halves + 2 * panel + first;
    if (a.bias != nullptr) {
      FSSA_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        const Vec bias = load_first_as(a.bias, a.dtype, halves[h].row, halves[h].valid);
        FSSA_UNROLL
        for (int r = 0; r < kRows; ++r) acc[r][h] = add(acc[r][h], bias);
      }
    }
    FSSA_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      const int64_t at = t * a.y_stride + halves[h].column;
      if (a.epilogue != Epilogue::kNone) {
        FSSA_UNROLL
        for (int r = 0; r < kRows; ++r) activated[first + h][r] = acc[r][h];
      } else if (a.y_dtype == DType::kFloat32) {
        store_half(static_cast<float*>(a.y) + at, a.y_stride, halves[h].valid, acc, h);
      } else {
        store_half(static_cast<BFloat16*>(a.y) + at, a.y_stride, halves[h].valid, acc, h);
      }
    }
  }
  brought = ahead;
  if (a.epilogue != Epilogue::kNone) store_activated(a, t, a.halves[2 * panel], activated);
}

template <int kRows, typename T, typename X, typename Ready>
FSSA_INLINE void tile_of(int64_t rows, const ModulatedLinearCall& a, const Input<X>& input,
                         int64_t t, int64_t panel, const Ready& ready, Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      tile_of<kRows - 1, T>(rows, a, input, t, panel, ready, ahead);
      return;
    }
  }
  tile<kRows, T>(a, input, t, panel, ready, ahead);
}

// This thread's part of `tiles`. Each takes as long as `worth` pieces of the shrink, so that whoever
// had more of those gets less of these.
FSSA_INLINE Range product_share(const Team& team, int64_t shrink_pieces, int64_t worth,
                                int64_t tiles) {
  if (worth * tiles < team.size()) return team.share(tiles);
  const int64_t all = worth * tiles + shrink_pieces, size = team.size();
  const auto bound = [&](int64_t index) {
    return (all * index / size - shrink_pieces * index / size) / worth;
  };
  return {bound(team.index()), bound(team.index() + 1)};
}

// The tiles of a product in the order in which they are computed: in chunks of rows whose x stays in
// L2 while the panels pass, and there panel by panel.
struct Tiles {
  static constexpr int64_t kChunkBytes = 256 * 1024;

  int64_t num_panels, tiles, chunks;

  FSSA_INLINE_MEMBER Tiles(int64_t num_panels, int64_t num_tokens, int64_t row_bytes)
      : num_panels(num_panels), tiles(num_tiles(num_tokens)) {
    const int64_t chunk_tiles = larger(1, kChunkBytes / larger(1, row_bytes) / kMaxRows);
    chunks = (tiles + chunk_tiles - 1) / chunk_tiles;
  }

  FSSA_INLINE_MEMBER int64_t size() const { return num_panels * tiles; }
  FSSA_INLINE_MEMBER Range of_chunk(int64_t chunk) const {
    return {tiles * chunk / chunks, tiles * (chunk + 1) / chunks};
  }
};

// A tile that another thread offered, whose panel nobody has brought.
template <typename T, typename X, typename Ready>
FSSA_INLINE void help(const ModulatedLinearCall& a, const Input<X>& input, const Tiles& tiles,
                      const Runs& rows, int64_t index, const Ready& ready, Ahead& ahead) {
  int64_t chunk = 0;
  while (index >= tiles.num_panels * tiles.of_chunk(chunk).last) ++chunk;
  const Range of_chunk = tiles.of_chunk(chunk);
  const int64_t height = of_chunk.last - of_chunk.first;
  const int64_t in_chunk = index - tiles.num_panels * of_chunk.first;
  const int64_t tile = of_chunk.first + in_chunk % height, first = rows.begin(tile);
  tile_of<kMaxRows, T>(rows.begin(tile + 1) - first, a, input, first, in_chunk / height, ready,
                       ahead);
}

// This thread's part of the product, by tiles, and of what others have left. `ready` as in `tile`.
template <typename T, typename X, typename Ready>
FSSA_INLINE void product(const ModulatedLinearCall& a, const Input<X>& input, int64_t num_tokens,
                         Team& team, const Ready& ready) {
  const Tiles tiles(a.num_panels(), num_tokens, a.in_features * static_cast<int64_t>(sizeof(X)));
  // A tile is two halves wide.
  const int64_t pieces = shrink_pieces(a, num_tokens);
  const int64_t shrunk = a.has_common_factors() ? a.shrink_halves() * tiles.tiles * pieces : 0;
  const Range mine = product_share(team, shrunk, 2 * pieces, tiles.size());
  // Where the memory binds, a tile that was brought for one thread would cost another the same
  // again.
  const bool offered = tiles.tiles > 1 && team.size() > 1 && tiles.size() <= Share::kMaxPieces;
  if (offered) team.offer(mine);
  const Runs rows(num_tokens, tiles.tiles);
  PanelReads reads(a, team, num_tokens);
  bool left = true;
  for (int64_t chunk = 0; chunk < tiles.chunks && left; ++chunk) {
    const Range of_chunk = tiles.of_chunk(chunk);
    const int64_t height = of_chunk.last - of_chunk.first;
    const int64_t start = tiles.num_panels * of_chunk.first;
    const int64_t begin = larger(mine.first, start);
    const int64_t end = smaller(mine.last, start + tiles.num_panels * height);
    int64_t panel = (begin - start) / height, tile = of_chunk.first + (begin - start) % height;
    reads.begin(panel, (end - 1 - start) / height, end == mine.last);
    for (int64_t i = begin; i < end && left; ++panel, tile = of_chunk.first) {
      fetch_expand(a, panel);
      Ahead ahead = reads.of(panel);
      for (; tile < of_chunk.last && i < end; ++tile, ++i) {
        left = !offered || team.take() >= 0;
        if (!left) break;
        const int64_t first = rows.begin(tile);
        tile_of<kMaxRows, T>(rows.begin(tile + 1) - first, a, input, first, panel, ready, ahead);
      }
      reads.leave(panel, ahead);
    }
  }
  Ahead ahead = reads.of_queue();
  for (int64_t index = offered ? team.help() : -1; index >= 0; index = team.help()) {
    help<T>(a, input, tiles, rows, index, ready, ahead);
  }
  reads.end(ahead);
}

// This thread's part of x in fp32, for products of bf16 that are taken in fp32: once for every
// number and not once for every sixteen columns it is multiplied with.
FSSA_INLINE void widen_rows(const ModulatedLinearCall& a, int64_t num_tokens, const Team& team) {
  const int64_t k = a.in_features;
  const Range mine = team.share(num_tokens);
  for (int64_t t = mine.first; t < mine.last; ++t) {
    const BFloat16* x = static_cast<const BFloat16*>(a.x) + t * a.x_stride;
    for (int64_t i = 0; i < k; i += 16) {
      store_up_to(a.widened + t * k + i, load_up_to(x + i, k - i), k - i);
    }
  }
}

// More of x than this would not stay in the second-level cache beside the weights that pass it.
constexpr int64_t kFetchedBytes = 256 * 1024;

// Asks for the rows of x, much of which other threads have just written, column by column as they are
// read.
template <typename X>
FSSA_INLINE void fetch_input(const ModulatedLinearCall& a, const Input<X>& input,
                             int64_t num_tokens) {
  constexpr int64_t kLine = 64 / sizeof(X);
  for (int64_t first = 0; first < a.in_features; first += kLine) {
    for (int64_t t = 0; t < num_tokens; ++t) prefetch_second(input.x + t * input.stride + first);
  }
}

template <typename T, typename X>
FSSA_INLINE void modulated_linear_of(const ModulatedLinearCall& a, const Input<X>& input,
                                     int64_t num_tokens, Team& team) {
  const int64_t bytes = num_tokens * a.in_features * static_cast<int64_t>(sizeof(X));
  if (team.size() > 1 && bytes <= kFetchedBytes) fetch_input(a, input, num_tokens);
  const bool modulated = a.family != Family::kNone;
  if (modulated) {
    low_rank(a, input, num_tokens, team);
    team.arrive();
  }
  // The others' part of the low-rank term is waited for when the first product is done: by then
  // they have long had it.
  const float* v = nullptr;
  bool waited = !modulated;
  const auto ready = [&] {
    if (!waited) {
      team.wait();
      v = low_rank_of<X>(a, num_tokens, team);
    }
    waited = true;
    return v;
  };
  product<T>(a, input, num_tokens, team, ready);
  ready();
}

template <typename T>
void modulated_linear(const ModulatedLinearCall& a, Team& team) {
  const int64_t num_tokens = a.count.get();
  if constexpr (sizeof(T) == 2 && kWidenedRows < INT64_MAX) {
    if (num_tokens >= kWidenedRows) {
      widen_rows(a, num_tokens, team);
      team.barrier();
      modulated_linear_of<T>(a, Input<float>{a.widened, a.in_features}, num_tokens, team);
      return;
    }
  }
  const Input<T> input{static_cast<const T*>(a.x), a.x_stride};
  modulated_linear_of<T>(a, input, num_tokens, team);
}

}  // namespace FSSA_ISA
