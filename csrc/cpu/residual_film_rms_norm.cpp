#include "residual_film_rms_norm.h"

#include "kernels.h"

namespace fssa::cpu {

void NormCall::check() const {
  // Not asked of `film`: the memory of a table of no users is null too.
  if (slots == nullptr) return;
  IndexCheck{"residual_film_rms_norm", "slots", slots, 0, num_users}.run(count.get());
}

std::vector<int64_t> NormCall::check_key() const {
  return {key(slots), num_users, key(count.variable), count.fixed};
}

void NormCall::run(Team& team) const { kernels().norm(*this, team); }

}  // namespace fssa::cpu
