// Small arithmetic that kernels and their tests share.
#pragma once

#include <cmath>

#include "layout.h"

namespace fssa::cuda {

// act(gate) * up, with tanh(z) = 2 sigmoid(2z) - 1.
FSSA_HOST_DEVICE float silu_mul(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

FSSA_HOST_DEVICE float gelu_tanh_mul(float gate, float up) {
  const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + expf(-2.0f * inner)) * up;
}

}  // namespace fssa::cuda
