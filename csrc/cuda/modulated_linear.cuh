// Device code of the modulated linear for few rows; see modulated_linear.h for how work is cut.
//
// The matrix instruction's 16 rows are rows of W or of A, its 8 columns rows of x: few rows of x
// then waste little of it. A warp holds 16 rows of the tile and multiplies them by all rows of x;
// rows of eight stand in the instruction in the order of row_of_lanes.
#pragma once

#include "epilogue.h"
#include "modulated_linear.h"
#include "numbers.cuh"
#include "rows.cuh"

namespace fssa::cuda {

template <typename T, int kTokenTiles, bool kTiles>
class LinearBlock {
 public:
  FSSA_DEVICE explicit LinearBlock(const LinearArguments& arguments)
      : args(arguments),
        plan(arguments.plan),
        memory(shared_memory() +
               (-reinterpret_cast<uintptr_t>(shared_memory()) & (kTileAlignment - 1))),
        sums(reinterpret_cast<float*>(memory + plan.shared.sums)),
        low(reinterpret_cast<float*>(memory + plan.shared.low)),
        lora_b(reinterpret_cast<float*>(memory + plan.shared.lora_b)),
        barriers(reinterpret_cast<uint64_t*>(memory + plan.shared.barriers)),
        paired(args.epilogue != Epilogue::kNone),
        columns(paired ? plan.block_columns / 2 : plan.block_columns),
        rank(args.rank),
        rank_pitch(round_up(rank, 8)),
        begin(first_unit(block_x(), plan.units(), plan.grid)),
        end(first_unit(block_x() + 1, plan.units(), plan.grid)) {}

  FSSA_DEVICE void run() {
    if constexpr (kTiles) {
      if (thread_index() == 0) {
        for (int s = 0; s < plan.stages; ++s) barrier_init(barriers + s, 1);
        fence_barrier_init();
      }
      sync_block();
    }
    for (int ahead = 0; ahead < plan.stages - 1; ++ahead) issue(begin + ahead, ahead);
    int stage = 0;
    uint32_t parity = 0;
    for (int unit = begin; unit < end; ++unit) {
      const int tile = unit / plan.units_per_tile;
      const int step = unit - tile * plan.units_per_tile;
      if (unit == begin || step == 0) start_tile(tile);
      wait(stage, parity);
      // Everybody has this stage, and is done with the one before, which is filled anew.
      sync_block();
      issue(unit + plan.stages - 1, stage == 0 ? plan.stages - 1 : stage - 1);
      multiply(stage);
      if (unit + 1 == end || step + 1 == plan.units_per_tile) {
        const int first_step = unit - step < begin ? begin - (unit - step) : 0;
        finish_tile(tile, first_step, step + 1);
      }
      if (++stage == plan.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    if constexpr (!kTiles) copy_wait<0>();
  }

 private:
  // The row of x, A or W that lies in row `row` of a stage, or null: rows of W, of A, then of x.
  FSSA_DEVICE const T* source_of(int row, const TilePlace& place) const {
    if (row < plan.block_columns) {
      const int half = row >= columns;
      const int column = row - half * columns;
      if (column >= place.columns) return nullptr;
      const int64_t at = place.first + column + half * args.ends[0];
      return static_cast<const T*>(args.weight) + at * args.stride_w;
    }
    row -= plan.block_columns;
    if (row < plan.low_rows) {
      const int padded = paired ? plan.low_rows / 2 : plan.low_rows;
      const int second = row >= padded;
      const int r = row - second * padded;
      if (r >= rank) return nullptr;
      const int64_t at = static_cast<int64_t>(place.projection + second) * rank + r;
      return static_cast<const T*>(args.lora_a) + at * args.stride_a;
    }
    row -= plan.low_rows;
    return static_cast<const T*>(args.x) + row * args.stride_x;
  }

  FSSA_DEVICE TilePlace place(int tile) const {
    return place_of(tile, args.ends, paired ? 1 : args.num_projections, columns);
  }

  // Where half of a stage begins.
  FSSA_DEVICE char* half_of(int stage, int half) const {
    return memory + stage * plan.shared.stage_bytes +
           half * (plan.shared.stage_bytes / kHalves);
  }

  // Starts the copies of a unit into a stage. What lies past the end of K becomes zero. Rows that
  // are not there are not copied, or are another's: products of one row say nothing about
  // another's, and nobody looks at those of such a row.
  FSSA_DEVICE void issue(int unit, int stage) {
    if (unit < end) {
      const int tile = unit / plan.units_per_tile;
      const int k = (unit - tile * plan.units_per_tile) * kBlockK;
      if constexpr (kTiles) {
        if (thread_index() == 0) issue_tiles(place(tile), k, stage);
      } else {
        issue_chunks(place(tile), k, stage);
      }
    }
    if constexpr (!kTiles) copy_commit();
  }

  FSSA_DEVICE void issue_tiles(const TilePlace& here, int k, int stage) {
    uint64_t* barrier = barriers + stage;
    barrier_arrive_expecting(barrier, plan.shared.stage_bytes);
    const int projections = paired ? 2 : 1;
    const int low_rows = plan.low_rows / projections;
    for (int half = 0; half < kHalves; ++half) {
      char* target = half_of(stage, half);
      const int at = k + half * (kTileRowBytes / 2);
      for (int p = 0; p < projections; ++p) {
        copy_tile(target, args.weight_map, at, here.first + p * args.ends[0], barrier);
        target += columns * kTileRowBytes;
      }
      for (int p = 0; p < projections && low_rows > 0; ++p) {
        copy_tile(target, args.lora_a_map, at, (here.projection + p) * rank, barrier);
        target += low_rows * kTileRowBytes;
      }
      copy_tile(target, args.x_map, at, 0, barrier);
    }
  }

  FSSA_DEVICE void issue_chunks(const TilePlace& here, int k, int stage) {
    constexpr int kChunks = kHalves * kTileRowBytes / 16;
    const int chunk = thread_index() % kChunks;
    const bool there = k + 8 * chunk < args.in_features;
    char* target = half_of(stage, chunk / 8);
    const int rows = plan.block_columns + plan.low_rows + args.num_tokens;
    for (int row = thread_index() / kChunks; row < rows; row += num_threads() / kChunks) {
      const T* source = source_of(row, here);
      if (source != nullptr) {
        copy_async_or_zero(target + tile_offset(row, chunk % 8),
                           there ? source + k + 8 * chunk : source, there);
      }
    }
  }

  FSSA_DEVICE void wait(int stage, uint32_t parity) {
    if constexpr (kTiles) {
      barrier_wait(barriers + stage, parity);
    } else {
      switch (plan.stages) {
        case 2: copy_wait<0>(); break;
        case 3: copy_wait<1>(); break;
        case 4: copy_wait<2>(); break;
        case 5: copy_wait<3>(); break;
        default: copy_wait<4>(); break;
      }
    }
  }

  // What the term needs besides the sums, brought while W is on its way.
  FSSA_DEVICE void start_tile(int tile) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[t][i] = 0.0f;
    }
    if (args.family == Family::kNone) return;
    const TilePlace here = place(tile);
    if (args.family != Family::kFactors) {
      const int all = plan.block_columns * rank_pitch;
      for (int i = thread_index(); i < all; i += num_threads()) {
        const int row = i / rank_pitch, r = i - row * rank_pitch;
        const int half = row >= columns;
        const int column = row - half * columns;
        float value = 0.0f;
        if (r < rank && column < here.columns) {
          const int64_t at = here.first + column + half * args.ends[0];
          value = load_number<T>(args.lora_b, args.lora_b_is_float, at * args.stride_b + r);
        }
        lora_b[r * plan.shared.lora_b_pitch + row] = value;
      }
    }
    const int width = plan.shared.low_pitch;
    for (int i = thread_index(); i < args.num_tokens * width; i += num_threads()) {
      const int t = i / width, column = i - t * width;
      const int second = column >= rank_pitch;
      const int r = column - second * rank_pitch;
      const int at = (here.projection + second) * rank + r;
      float value = 0.0f;
      if (r < rank) {
        value = 1.0f;
        if (!plan.in_loop) {
          value = load(args.low + t * args.stride_low + at);
        } else if (args.family == Family::kGated) {
          const int slot = load(args.slots + t);
          value = slot >= 0 && slot < args.num_users
                      ? load_number<T>(args.rows, args.rows_is_float, slot * args.stride_rows + at)
                      : not_a_number();
        }
      }
      low[t * width + column] = value;
    }
  }

  // sums += [W; A] x^T over one stage.
  FSSA_DEVICE void multiply(int stage) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const int row = row_of_lanes(lane / 4), c = lane % 4;
    const int rows = plan.block_columns + plan.low_rows;
#pragma unroll
    for (int j = 0; j < kBlockK / 32; ++j) {
      const char* half = half_of(stage, j / 2) + tile_offset(row, 4 * (j % 2) + c);
      // Eight rows on, the 16 bytes lie at the same place of their row.
      const char* weights = half + 16 * warp * kTileRowBytes;
      const Left left{read_words(weights), read_words(weights + 8 * kTileRowBytes)};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        multiply_add_rows<T>(acc[t], left, read_words(half + (rows + 8 * t) * kTileRowBytes));
      }
    }
  }

  FSSA_DEVICE void finish_tile(int tile, int first_step, int last_step) {
    const TilePlace here = place(tile);
    spill_sums();
    sync_block();
    if (args.family != Family::kNone) {
      if (plan.in_loop) {
        modulate(here);
        sync_block();
      }
      // A u made beforehand is added once.
      if (plan.in_loop || first_step == 0) expand(here);
      sync_block();
    }
    if (first_step == 0 && last_step == plan.units_per_tile) {
      write(here);
    } else {
      share(tile, here);
    }
  }

  FSSA_DEVICE void spill_sums() {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * t + row_of_lanes(2 * c + i % 2);
        const int row = 16 * warp + row_of_lanes(g) + 8 * (i / 2);
        if (token < args.num_tokens) sums[token * plan.shared.sums_pitch + row] = acc[t][i];
      }
    }
  }

  // low = u as the row's user sees it: times g, which stands there; or M u.
  FSSA_DEVICE void modulate(const TilePlace& here) {
    const int width = plan.shared.low_pitch;
    const int padded = paired ? plan.low_rows / 2 : plan.low_rows;
    for (int i = thread_index(); i < args.num_tokens * width; i += num_threads()) {
      const int t = i / width, column = i - t * width;
      const int second = column >= rank_pitch;
      const int r = column - second * rank_pitch;
      if (r >= rank) continue;
      const float* u =
          sums + t * plan.shared.sums_pitch + plan.block_columns + second * padded;
      if (args.family == Family::kCore) {
        const int slot = load(args.slots + t);
        float total = not_a_number();
        if (slot >= 0 && slot < args.num_users) {
          const int64_t at = slot * args.stride_rows +
                             (static_cast<int64_t>(here.projection + second) * rank + r) * rank;
          total = 0.0f;
          for (int j = 0; j < rank; ++j) {
            total = fmaf(load_number<T>(args.rows, args.rows_is_float, at + j), u[j], total);
          }
        }
        low[i] = total;
      } else {
        low[i] *= u[r];
      }
    }
  }

  // sums += low B^T. Two threads share a column of the tile, each takes half of the rows of x.
  FSSA_DEVICE void expand(const TilePlace& here) {
    constexpr int kRows = 4 * kTokenTiles;
    const int part = thread_index() / plan.block_columns;
    const int row = thread_index() - part * plan.block_columns;
    const int half = row >= columns;
    if (part >= 2 || row - half * columns >= here.columns) return;
    const int first = part * kRows;
    const float* low_row = low + first * plan.shared.low_pitch + half * rank_pitch;
    float* sum = sums + first * plan.shared.sums_pitch + row;
    float total[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      total[i] = first + i < args.num_tokens ? sum[i * plan.shared.sums_pitch] : 0.0f;
    }
    if (args.family == Family::kFactors) {
      const int64_t at = here.first + row - half * columns + half * args.ends[0];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i < args.num_tokens) {
          total[i] = add_own(total[i], low_row + i * plan.shared.low_pitch, first + i, at);
        }
      }
    } else {
      for (int r = 0; r < rank_pitch; r += 8) {
        float b[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) b[j] = lora_b[(r + j) * plan.shared.lora_b_pitch + row];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (first + i < args.num_tokens) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              total[i] = fmaf(low_row[i * plan.shared.low_pitch + r + j], b[j], total[i]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i < args.num_tokens) sum[i * plan.shared.sums_pitch] = total[i];
    }
  }

  // total + the row's own B at a column times its u.
  FSSA_DEVICE float add_own(float total, const float* u, int token, int64_t column) {
    const int slot = load(args.slots + token);
    if (slot < 0 || slot >= args.num_users) return not_a_number();
    const int64_t at = slot * args.stride_b_user + column * args.stride_b;
    for (int r = 0; r < rank; ++r) {
      total = fmaf(u[r], load_number<T>(args.lora_b, args.lora_b_is_float, at + r), total);
    }
    return total;
  }

  // The result of a whole tile: bias, epilogue, one rounding.
  FSSA_DEVICE void write(const TilePlace& here) {
    for (int i = thread_index(); i < args.num_tokens * columns; i += num_threads()) {
      const int t = i / columns, column = i - t * columns;
      if (column >= here.columns) continue;
      const float* sum = sums + t * plan.shared.sums_pitch + column;
      put(here, t, column, sum[0], paired ? sum[columns] : 0.0f);
    }
  }

  FSSA_DEVICE void put(const TilePlace& here, int token, int column, float value, float up) {
    const int at = here.first + column;
    if (args.bias != nullptr) {
      value += to_float(load(static_cast<const T*>(args.bias) + at));
      if (paired) up += to_float(load(static_cast<const T*>(args.bias) + args.ends[0] + at));
    }
    if (args.epilogue == Epilogue::kSiluMul) value = silu_mul(value, up);
    if (args.epilogue == Epilogue::kGeluTanhMul) value = gelu_tanh_mul(value, up);
    T result;
    from_float(value, result);
    store(static_cast<T*>(args.y) + static_cast<int64_t>(token) * args.out_columns + at, result);
  }

  // Leaves this block's part of a tile; the last block to come adds all parts in the order of K.
  FSSA_DEVICE void share(int tile, const TilePlace& here) {
    const int units = plan.units();
    const int64_t size = static_cast<int64_t>(8) * kTokenTiles * plan.block_columns;
    float* mine = args.partial + size * partial_slot(block_x(), tile, units, plan.units_per_tile,
                                                     plan.grid);
    const int width = plan.block_columns;
    for (int i = thread_index(); i < args.num_tokens * width; i += num_threads()) {
      const int t = i / width, row = i - t * width;
      store(mine + i, sums[t * plan.shared.sums_pitch + row]);
    }
    fence_device();
    sync_block();
    const int first = tile * plan.units_per_tile;
    const int from = owner_of(first, units, plan.grid);
    const int to = owner_of(first + plan.units_per_tile - 1, units, plan.grid);
    int* last = reinterpret_cast<int*>(memory + plan.shared.flag);
    if (thread_index() == 0) *last = atomic_add(args.counters + tile, 1) == to - from;
    sync_block();
    if (!*last) return;
    fence_device();
    for (int i = thread_index(); i < args.num_tokens * columns; i += num_threads()) {
      const int t = i / columns, column = i - t * columns;
      if (column >= here.columns) continue;
      float value = 0.0f, up = 0.0f;
      for (int block = from; block <= to; ++block) {
        const float* part =
            args.partial +
            size * partial_slot(block, tile, units, plan.units_per_tile, plan.grid) + t * width +
            column;
        value += load_shared_by_blocks(part);
        if (paired) up += load_shared_by_blocks(part + columns);
      }
      put(here, t, column, value, up);
    }
    if (thread_index() == 0) store(args.counters + tile, 0);
  }

  const LinearArguments& args;
  const LinearPlan& plan;
  char* memory;
  float* sums;
  float* low;
  float* lora_b;
  uint64_t* barriers;
  bool paired;
  int columns;  // of the result, in a tile
  int rank, rank_pitch;
  int begin, end;  // units of this block
  float acc[kTokenTiles][4];
};

template <typename T, int kTokenTiles, bool kTiles>
FSSA_GLOBAL(kMaxLinearThreads, 1)
modulated_linear_kernel(const FSSA_GRID_CONSTANT LinearArguments arguments) {
  // The launcher takes the tensor copy engine where there is one.
  if constexpr (kTiles == kHasTileCopies || kEmulated) {
    LinearBlock<T, kTokenTiles, kTiles>(arguments).run();
  }
}

}  // namespace fssa::cuda
