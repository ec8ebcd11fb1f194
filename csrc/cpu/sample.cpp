#include "sample.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace fssa::cpu {
namespace {

struct RowStats {
  float largest;
  int32_t index;
  float log_total;  // log sum exp(l - largest)
};

// Of row `b`, from its chunks. The largest logit is looked for in the chunk that has it alone.
RowStats combine(const SampleCall& a, int64_t b) {
  const int64_t num_chunks = a.num_chunks();
  const ChunkStats* stats = a.stats + b * num_chunks;
  int64_t best = 0;
  for (int64_t c = 1; c < num_chunks; ++c) {
    if (stats[c].largest > stats[best].largest) best = c;
  }
  const float top = stats[best].largest;
  double total = 0.0;
  for (int64_t c = 0; c < num_chunks; ++c) {
    if (stats[c].largest == -INFINITY && top != -INFINITY) continue;  // its sum is NaN
    total += static_cast<double>(stats[c].total) * std::exp(double(stats[c].largest) - top);
  }
  const int64_t first = best * kSampleChunk;
  const int64_t last = std::min(first + kSampleChunk, a.vocab_size);
  int64_t index = first;
  while (index < last && !(load(a.logits, a.dtype, b * a.stride + index) == top)) ++index;
  // Where all are NaN none is the largest.
  if (index == last) index = first;
  return {top, static_cast<int32_t>(index), static_cast<float>(std::log(total))};
}

// The heaviest `top_k` of the `count` indices in `kept` (0: all of them), and of those the heaviest
// whose predecessors hold less than a share top_p of their mass; how many are left. Of equal weights
// the smaller index counts as the heavier.
int64_t keep_heaviest(const float* w, int32_t top_k, float top_p, double total, int32_t* kept,
                      int64_t count) {
  const auto heavier = [&](int32_t a, int32_t b) {
    return w[a] > w[b] || (w[a] == w[b] && a < b);
  };
  if (top_k > 0 && top_k < count) {
    std::nth_element(kept, kept + top_k, kept + count, heavier);
    count = top_k;
    total = 0.0;
    for (int64_t j = 0; j < count; ++j) total += w[kept[j]];
  }
  if (top_p < 1.0f) {
    std::sort(kept, kept + count, heavier);
    double before = 0.0;
    int64_t num = 0;
    while (num < count && before < top_p * total) before += w[kept[num++]];
    count = std::min(count, std::max<int64_t>(num, 1));
  }
  std::sort(kept, kept + count);
  return count;
}

// One token from `size` weights w >= 0 whose largest is 1: the kept ones in order of index, until
// their sum passes a share `uniform` of the kept mass. `kept` has room for all of them.
int32_t draw(const float* w, int64_t size, int32_t top_k, float top_p, float min_p, float uniform,
             int32_t fallback, int32_t* kept) {
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i) total += w[i];
  if (!(total < INFINITY)) return fallback;  // NaN or infinity among the logits
  // Below this weight the tail as a whole is lighter than what top_p leaves out.
  double bound = 0.0;
  if (top_p < 1.0f && top_k <= 0) bound = (1.0 - top_p) * total / static_cast<double>(size);
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (w[i] > 0.0f && w[i] >= bound) kept[count++] = static_cast<int32_t>(i);
  }
  if (top_k > 0 || top_p < 1.0f) count = keep_heaviest(w, top_k, top_p, total, kept, count);
  total = 0.0;
  for (int64_t j = 0; j < count; ++j) total += w[kept[j]] >= min_p ? w[kept[j]] : 0.0f;
  double left = uniform * total;
  int32_t last = fallback;
  for (int64_t j = 0; j < count; ++j) {
    const int32_t i = kept[j];
    if (w[i] < min_p) continue;
    last = i;
    left -= w[i];
    if (left < 0.0) break;
  }
  return last;
}

}  // namespace

void SampleCall::check() const {
  IndexCheck{"sample", "forced", forced, -1, vocab_size}.run(count.get());
}

std::vector<int64_t> SampleCall::check_key() const {
  return {key(forced), vocab_size, key(count.variable), count.fixed};
}

void SampleCall::run(Team& team) const {
  const int64_t batch = count.get(), chunks = num_chunks();
  const Kernels& set = kernels();
  const Range pieces = team.share(batch * chunks);
  for (int64_t i = pieces.first; i < pieces.last; ++i) {
    const int64_t first = i % chunks * kSampleChunk;
    stats[i] = set.chunk_stats(logits, dtype, i / chunks * stride + first,
                               std::min(kSampleChunk, vocab_size - first));
  }
  team.barrier();
  const Range rows = team.share(batch);
  float* w = weights + team.index() * vocab_size;
  for (int64_t b = rows.first; b < rows.last; ++b) {
    const RowStats row = combine(*this, b);
    int32_t token = row.index;
    if (forced[b] >= 0) {
      token = forced[b];
    } else if (temperature[b] > 0.0f) {
      set.softmax_weights(logits, dtype, b * stride, vocab_size, row.largest,
                          1.0f / temperature[b], w);
      token = draw(w, vocab_size, top_k[b], top_p[b], min_p[b], uniform[b], row.index,
                   kept + team.index() * vocab_size);
    }
    tokens[b] = token;
    logprobs[b] = load(logits, dtype, b * stride + token) - row.largest - row.log_total;
  }
}

}  // namespace fssa::cpu
