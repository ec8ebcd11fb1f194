#include "sample.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace fssa::cpu {
namespace {

struct RowStats {
  float largest;
  int32_t index;
  float log_total;  // log sum exp(l - largest)
};

RowStats combine(const ChunkStats* stats, int64_t num_chunks) {
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
  return {top, static_cast<int32_t>(best * kSampleChunk + stats[best].index),
          static_cast<float>(std::log(total))};
}

// The heaviest `top_k` of the indices in `kept` (0: all of them), and of those the heaviest whose
// predecessors hold less than a share top_p of their mass. Of equal weights the smaller index counts
// as the heavier.
void keep_heaviest(const std::vector<float>& w, int32_t top_k, float top_p, double total,
                   std::vector<int32_t>& kept) {
  const auto heavier = [&](int32_t a, int32_t b) {
    return w[a] > w[b] || (w[a] == w[b] && a < b);
  };
  if (top_k > 0 && top_k < static_cast<int64_t>(kept.size())) {
    std::nth_element(kept.begin(), kept.begin() + top_k, kept.end(), heavier);
    kept.resize(top_k);
    total = 0.0;
    for (int32_t i : kept) total += w[i];
  }
  if (top_p < 1.0f) {
    std::sort(kept.begin(), kept.end(), heavier);
    double before = 0.0;
    size_t count = 0;
    while (count < kept.size() && before < top_p * total) before += w[kept[count++]];
    kept.resize(std::max<size_t>(count, 1));
  }
  std::sort(kept.begin(), kept.end());
}

// One token from weights w >= 0 whose largest is 1: the kept ones in order of index, until their
// sum passes a share `uniform` of the kept mass.
int32_t draw(const std::vector<float>& w, int32_t top_k, float top_p, float min_p, float uniform,
             int32_t fallback) {
  double total = 0.0;
  for (float weight : w) total += weight;
  if (!(total < INFINITY)) return fallback;  // NaN or infinity among the logits
  // Below this weight the tail as a whole is lighter than what top_p leaves out.
  double bound = 0.0;
  if (top_p < 1.0f && top_k <= 0) bound = (1.0 - top_p) * total / static_cast<double>(w.size());
  std::vector<int32_t> kept;
  for (size_t i = 0; i < w.size(); ++i) {
    if (w[i] > 0.0f && w[i] >= bound) kept.push_back(static_cast<int32_t>(i));
  }
  if (top_k > 0 || top_p < 1.0f) keep_heaviest(w, top_k, top_p, total, kept);
  total = 0.0;
  for (int32_t i : kept) total += w[i] >= min_p ? w[i] : 0.0f;
  double left = uniform * total;
  int32_t last = fallback;
  for (int32_t i : kept) {
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
  std::vector<float> weights;
  for (int64_t b = rows.first; b < rows.last; ++b) {
    const RowStats row = combine(stats + b * chunks, chunks);
    int32_t token = row.index;
    if (forced[b] >= 0) {
      token = forced[b];
    } else if (temperature[b] > 0.0f) {
      weights.resize(vocab_size);
      set.softmax_weights(logits, dtype, b * stride, vocab_size, row.largest,
                          1.0f / temperature[b], weights.data());
      token = draw(weights, top_k[b], top_p[b], min_p[b], uniform[b], row.index);
    }
    tokens[b] = token;
    logprobs[b] = load(logits, dtype, b * stride + token) - row.largest - row.log_total;
  }
}

}  // namespace fssa::cpu
