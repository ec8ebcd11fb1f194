#include "advance_step.h"

#include <algorithm>
#include <cmath>

namespace fssa::cpu {

void AdvanceCall::run(Team& team) const {
  const Range rows = team.share(count.get());
  for (int64_t b = rows.first; b < rows.last; ++b) advance(b);
}

void AdvanceCall::advance(int64_t b) const {
  const int64_t step = num_done[b], position = kv_lens[b];
  if (step < 0 || step >= draws.width || position <= 0) return;
  const int32_t token = chosen[b];
  log_tokens.row(b)[step] = token;
  log_logprobs.row(b)[step] = logprobs[b];
  num_done[b] = static_cast<int32_t>(step + 1);

  const int32_t* stops = stop_tokens.row(b);
  const int32_t* stops_end = stops + stop_tokens.width;
  const bool stopped = token >= 0 && std::find(stops, stops_end, token) != stops_end;
  const bool is_last = step + 1 == draws.width;
  const bool is_full = position >= block_tables.width * page_size;
  ended[b] = stopped || is_last || is_full || std::isnan(logprobs[b]);

  tokens[b] = token;
  positions[b] = static_cast<int32_t>(position);
  kv_lens[b] = static_cast<int32_t>(position + 1);
  uniform[b] = draws.row(b)[is_last ? step : step + 1];
  kv_slots[b] = is_full ? -1
                        : static_cast<int32_t>(block_tables.row(b)[position / page_size] *
                                                   page_size +
                                               position % page_size);
}

}  // namespace fssa::cpu
