#include "residual_film_rms_norm.cuh"

#include "launch.cuh"

namespace fssa::cuda {

void launch_norm(const NormArguments& arguments, DType dtype, uintptr_t stream) {
  const NormPlan& plan = arguments.plan;
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (plan.blocks_w == 0) {
      launch("residual_film_rms_norm", norm_kernel<T>, {plan.blocks_t, 1, 1}, plan.threads,
             plan.shared_bytes, stream, arguments);
    } else {
      launch("residual_film_rms_norm", norm_shrink_kernel<T>, {plan.blocks_t, plan.blocks_w, 1},
             plan.threads, plan.shared_bytes, stream, arguments);
    }
  });
}

}  // namespace fssa::cuda
