#include "rope_kv_write.h"

#include "kernels.h"

namespace fssa::cpu {

void RopeCall::check() const {
  const int64_t num_tokens = count.get();
  IndexCheck{"rope_kv_write", "positions", positions, 0, num_positions}.run(num_tokens);
  IndexCheck{"rope_kv_write", "kv_slots", kv_slots, -1, num_kv_slots}.run(num_tokens);
}

std::vector<int64_t> RopeCall::check_key() const {
  return {key(positions),    num_positions,       key(kv_slots),
          num_kv_slots,      key(count.variable), count.fixed};
}

void RopeCall::run(Team& team) const { kernels().rope(*this, team); }

}  // namespace fssa::cpu
