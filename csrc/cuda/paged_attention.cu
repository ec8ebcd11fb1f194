#include "paged_attention.cuh"

#include "launch.cuh"

namespace fssa::cuda {
namespace {

template <typename T, int kDim>
void launch_dim(const AttentionArguments& arguments, uintptr_t stream) {
  const AttentionPlan& plan = arguments.plan;
  void (*kernel)(AttentionArguments) = plan.head_tiles == 1 ? paged_attention_kernel<T, kDim, 1>
                                                            : paged_attention_kernel<T, kDim, 2>;
  launch("paged_attention", kernel,
         {arguments.num_tokens, arguments.num_kv_heads, plan.num_parts}, plan.threads,
         plan.shared.total, stream, arguments);
}

}  // namespace

void launch_attention(const AttentionArguments& arguments, int head_dim, DType dtype,
                      uintptr_t stream) {
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    switch (head_dim) {
      case 64: return launch_dim<T, 64>(arguments, stream);
      case 128: return launch_dim<T, 128>(arguments, stream);
      default: return launch_dim<T, 256>(arguments, stream);
    }
  });
}

}  // namespace fssa::cuda
