// Device code of attention over pages for single queries; see paged_attention.h.
//
// Keys are the 16 rows of the matrix instruction in k q^T, whose 8 columns are the heads of a
// group; heads are the rows in w v, whose 16 rows are then mostly empty, which costs nothing: the
// kernel waits for memory.
#pragma once

#include "numbers.cuh"
#include "paged_attention.h"
#include "rows.cuh"

namespace fssa::cuda {

// Where a key and its value lie in the caches, in elements; negative where nothing is read.
struct Place {
  int64_t key;
  int64_t value;
};
constexpr int64_t kUnseen = -1;
constexpr int64_t kNoPage = -2;

template <typename T, int kDim, int kHeadTiles>
class AttentionBlock {
 public:
  FSSA_DEVICE explicit AttentionBlock(const AttentionArguments& arguments)
      : args(arguments),
        plan(arguments.plan),
        memory(shared_memory()),
        scores(reinterpret_cast<float*>(memory + plan.shared.scores)),
        places(reinterpret_cast<Place*>(memory + plan.shared.places)),
        states(reinterpret_cast<SoftmaxState*>(memory + plan.shared.state)),
        words(reinterpret_cast<int*>(states + 16)),
        token(block_x()),
        kv_head(block_y()),
        part(block_z()),
        warp(thread_index() / 32),
        g(thread_index() % 32 / 4),
        c(thread_index() % 4) {}

  FSSA_DEVICE void run() {
    find_request();
    const int first = begin / kKeysPerSplit, stop = divide_up(end, kKeysPerSplit);
    const int active = stop - first < plan.num_parts ? stop - first : plan.num_parts;
    if (part >= (active > 1 ? active : 1)) return;
    load_queries();
    clear(total_out);
    SoftmaxState mine[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
    for (int split = first + part; split < stop; split += plan.num_parts) {
      attend(split);
      if (active > 1) {
        leave(split);
      } else {
        merge_into(mine);
      }
    }
    if (active <= 1) {
      finish(mine);
    } else if (is_last(active)) {
      merge_parts(first, stop);
    }
  }

 private:
  static constexpr int kTiles = kDim / 32;  // of eight columns, of a warp's share of the result

  FSSA_DEVICE static void clear(float (&sums)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
    }
  }

  // The request whose row this is, and the positions [begin, end) that it sees: none if it belongs
  // to nobody. What does not fit makes the result NaN: bounds that do not rise from 0 to at most T
  // everybody's, a length the request's.
  FSSA_DEVICE void find_request() {
    if (thread_index() < 2) words[thread_index()] = 0;
    sync_block();
    for (int b = thread_index(); b <= args.batch; b += num_threads()) {
      const int start = load(args.q_indptr + b);
      const int before = b == 0 ? 0 : load(args.q_indptr + b - 1);
      if (start <= token) atomic_add(words, 1);
      if (start < before || start > args.num_tokens || (b == 0 && start != 0)) {
        atomic_add(words + 1, 1);
      }
    }
    sync_block();
    const int found = words[0] - 1;
    const bool sound = words[1] == 0;
    request = begin = end = 0;
    nothing = sound ? 0.0f : not_a_number();
    // Everybody has read the words.
    sync_block();
    if (!sound || found >= args.batch) return;
    request = found;
    const int start = load(args.q_indptr + found), stop = load(args.q_indptr + found + 1);
    const int kv_len = load(args.kv_lens + found);
    if (stop - start > kv_len || kv_len > args.max_keys) {
      nothing = not_a_number();
      return;
    }
    end = kv_len - stop + token + 1;
    begin = end > args.window ? end - args.window : 0;
  }

  FSSA_DEVICE void load_queries() {
    const Words4 zeros{{0, 0, 0, 0}};
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const int head = 8 * t + g;
      const T* q = static_cast<const T*>(args.q) + token * args.stride_q +
                   (kv_head * plan.group + head) * args.stride_q_head + 8 * c;
#pragma unroll
      for (int j = 0; j < kDim / 32; ++j) {
        queries[t][j] = head < plan.group ? load_words(q + 32 * j) : zeros;
      }
    }
  }

  // out and states: the softmax over the keys of one split, of all heads of the group.
  FSSA_DEVICE void attend(int split) {
    const int origin = split * kKeysPerSplit;
    const int low = begin > origin ? begin - origin : 0;
    const int high = end - origin < kKeysPerSplit ? end - origin : kKeysPerSplit;
    const int tiles = divide_up(high, 16);
    find_places(origin, low, high);
    // Everybody is done with the split before, too, whose keys and values are overwritten.
    sync_block();
    copy_keys(16 * tiles);
    copy_values(16 * tiles);
    copy_wait<1>();
    sync_block();
    score(tiles);
    sync_block();
    weigh(16 * tiles);
    copy_wait<0>();
    sync_block();
    mix(tiles);
  }

  FSSA_DEVICE void find_places(int origin, int low, int high) {
    for (int i = thread_index(); i < kKeysPerSplit; i += num_threads()) {
      Place place{kUnseen, kUnseen};
      if (i >= low && i < high) {
        const int j = origin + i;
        const int page = load(args.block_tables + request * args.stride_table + j / args.page_size);
        place = {kNoPage, kNoPage};
        if (page >= 0 && page < args.num_pages) {
          const int64_t within = j % args.page_size;
          place = {page * args.stride_k_page + within * args.stride_k +
                       kv_head * args.stride_k_head,
                   page * args.stride_v_page + within * args.stride_v +
                       kv_head * args.stride_v_head};
        }
      }
      places[i] = place;
    }
  }

  FSSA_DEVICE void copy_keys(int keys) {
    constexpr int kChunks = kDim / 8;
    const int chunk = thread_index() % kChunks;
    for (int i = thread_index() / kChunks; i < keys; i += num_threads() / kChunks) {
      const int64_t at = places[i].key;
      if (at >= 0) {
        copy_async(memory + row_offset(i, plan.shared.key_bytes) + 16 * chunk,
                   static_cast<const T*>(args.k_cache) + at + 8 * chunk);
      }
    }
    copy_commit();
  }

  // Values that nobody sees are zero: they are multiplied by a weight of zero, which NaN survives.
  FSSA_DEVICE void copy_values(int keys) {
    constexpr int kChunks = kDim / 8;
    const int chunk = thread_index() % kChunks;
    for (int i = thread_index() / kChunks; i < keys; i += num_threads() / kChunks) {
      const int64_t at = places[i].value;
      char* target = memory + plan.shared.values + i * plan.shared.value_pitch + 16 * chunk;
      if (at >= 0) {
        copy_async(target, static_cast<const T*>(args.v_cache) + at + 8 * chunk);
      } else {
        *reinterpret_cast<Words4*>(target) = {{0, 0, 0, 0}};
      }
    }
    copy_commit();
  }

  // scores [head][key] = scale q . k in powers of two.
  FSSA_DEVICE void score(int tiles) {
    for (int tile = warp; tile < tiles; tile += kAttentionWarps) {
      const char* low = memory + row_offset(16 * tile + g, plan.shared.key_bytes) + 16 * c;
      const char* high = memory + row_offset(16 * tile + g + 8, plan.shared.key_bytes) + 16 * c;
      float sums[kHeadTiles][4];
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][i] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kDim / 32; ++j) {
        const Left keys{read_words(low + 64 * j), read_words(high + 64 * j)};
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) multiply_add_rows<T>(sums[t], keys, queries[t][j]);
      }
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = 16 * tile + g + 8 * (i / 2), head = 8 * t + 2 * c + i % 2;
          const int64_t at = places[key].key;
          float score = sums[t][i] * args.log2_scale;
          if (at == kUnseen) score = -INFINITY;
          if (at == kNoPage) score = not_a_number();
          scores[head * plan.shared.scores_pitch + key] = score;
        }
      }
    }
  }

  // weights [head][key] = 2^(score - largest score), and the heads' states.
  FSSA_DEVICE void weigh(int keys) {
    for (int head = warp; head < plan.group; head += kAttentionWarps) {
      const float* row = scores + head * plan.shared.scores_pitch;
      const int lane = thread_index() % 32;
      float peak = -INFINITY;
      for (int i = lane; i < keys; i += 32) peak = fmaxf(peak, row[i]);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) peak = fmaxf(peak, shuffle_xor(peak, mask));
      const float base = peak == -INFINITY ? 0.0f : peak;
      float total = 0.0f;
      T* weights = weights_row(head);
      for (int i = lane; i < keys; i += 32) {
        const float weight = exp2f(row[i] - base);
        total += weight;
        T rounded;
        from_float(weight, rounded);
        weights[i] = rounded;
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
      if (lane == 0) states[head] = {peak, total};
    }
  }

  FSSA_DEVICE T* weights_row(int head) {
    return reinterpret_cast<T*>(memory + plan.shared.weights + head * plan.shared.weights_pitch);
  }

  // out = weights v, in a warp the columns from warp * kDim / 4 on.
  FSSA_DEVICE void mix(int tiles) {
    clear(out);
    const int lane = thread_index() % 32;
    const char* low = reinterpret_cast<const char*>(weights_row(g)) + 4 * c;
    const char* high = reinterpret_cast<const char*>(weights_row(g + 8)) + 4 * c;
    const char* values = memory + plan.shared.values + lane % 16 * plan.shared.value_pitch +
                         2 * (warp * (kDim / 4) + 8 * (lane / 16));
    for (int tile = 0; tile < tiles; ++tile) {
      const int at = 32 * tile;
      const uint32_t a[4] = {word(low + at), kHeadTiles > 1 ? word(high + at) : 0,
                             word(low + at + 16), kHeadTiles > 1 ? word(high + at + 16) : 0};
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t matrices[4];
        load_matrices_transposed(matrices, values + 16 * tile * plan.shared.value_pitch + 16 * n);
        const uint32_t left[2] = {matrices[0], matrices[1]};
        const uint32_t right[2] = {matrices[2], matrices[3]};
        multiply_add<T>(out[n], a, left);
        multiply_add<T>(out[n + 1], a, right);
      }
    }
  }

  FSSA_DEVICE static uint32_t word(const char* shared) {
    return *reinterpret_cast<const uint32_t*>(shared);
  }

  FSSA_DEVICE void merge_into(SoftmaxState (&mine)[2]) {
#pragma unroll
    for (int half = 0; half < kHeadTiles; ++half) {
      const int head = g + 8 * half;
      if (head >= plan.group) continue;
      const MergeFactors factors = merge(mine[half], states[head].peak, states[head].total);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          total_out[n][i] = merged(total_out[n][i], out[n][i], factors);
        }
      }
    }
  }

  FSSA_DEVICE int64_t row_of(int head) const {
    return static_cast<int64_t>(token) * args.num_heads + kv_head * plan.group + head;
  }

  FSSA_DEVICE int column_of(int n) const { return warp * (kDim / 4) + 8 * n + 2 * c; }

  FSSA_DEVICE void finish(const SoftmaxState (&mine)[2]) {
#pragma unroll
    for (int half = 0; half < kHeadTiles; ++half) {
      const int head = g + 8 * half;
      if (head >= plan.group) continue;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          put(head, column_of(n) + i, total_out[n][2 * half + i], mine[half].total);
        }
      }
    }
  }

  FSSA_DEVICE void put(int head, int column, float sum, float total) {
    T result;
    from_float(total == 0.0f ? nothing : sum / total, result);
    store(static_cast<T*>(args.out) + row_of(head) * kDim + column, result);
  }

  FSSA_DEVICE float* peaks() const { return args.partial + plan.num_partials * kDim; }

  // Leaves one split for the last block to merge.
  FSSA_DEVICE void leave(int split) {
#pragma unroll
    for (int half = 0; half < kHeadTiles; ++half) {
      const int head = g + 8 * half;
      if (head >= plan.group) continue;
      const int64_t at = row_of(head) * plan.num_splits + split;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          store(args.partial + at * kDim + column_of(n) + i, out[n][2 * half + i]);
        }
      }
      if (warp == 0 && c == 0) {
        store(peaks() + at, states[head].peak);
        store(peaks() + plan.num_partials + at, states[head].total);
      }
    }
  }

  FSSA_DEVICE bool is_last(int active) {
    fence_device();
    sync_block();
    int* counter = args.counters + token * args.num_kv_heads + kv_head;
    if (thread_index() == 0) {
      words[2] = atomic_add(counter, 1) == active - 1;
      if (words[2]) store(counter, 0);
    }
    sync_block();
    if (words[2]) fence_device();
    return words[2];
  }

  FSSA_DEVICE void merge_parts(int first, int stop) {
    for (int i = thread_index(); i < plan.group * kDim; i += num_threads()) {
      const int head = i / kDim, column = i % kDim;
      SoftmaxState state{-INFINITY, 0.0f};
      float sum = 0.0f;
      const int64_t row = row_of(head) * plan.num_splits;
#pragma unroll 4
      for (int split = first; split < stop; ++split) {
        const float* peak = peaks() + row + split;
        const float more = load_shared_by_blocks(args.partial + (row + split) * kDim + column);
        const MergeFactors factors = merge(state, load_shared_by_blocks(peak),
                                           load_shared_by_blocks(peak + plan.num_partials));
        sum = merged(sum, more, factors);
      }
      put(head, column, sum, state.total);
    }
  }

  const AttentionArguments& args;
  const AttentionPlan& plan;
  char* memory;
  float* scores;
  Place* places;
  SoftmaxState* states;
  int* words;
  int token, kv_head, part;
  int warp, g, c;
  int request, begin, end;
  float nothing;  // the result of a row without keys
  Words4 queries[kHeadTiles][kDim / 32];
  float out[kTiles][4], total_out[kTiles][4];
};

template <typename T, int kDim, int kHeadTiles>
FSSA_GLOBAL(32 * kAttentionWarps, 1)
paged_attention_kernel(const FSSA_GRID_CONSTANT AttentionArguments arguments) {
  AttentionBlock<T, kDim, kHeadTiles>(arguments).run();
}

}  // namespace fssa::cuda
