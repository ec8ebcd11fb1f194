#include "modulated_linear.cuh"

#include "launch.cuh"
#include "low_rank.cuh"

namespace fssa::cuda {
namespace {

template <typename T, bool kTiles>
void launch_tokens(const LinearArguments& arguments, uintptr_t stream) {
  const LinearPlan& plan = arguments.plan;
  void (*kernel)(LinearArguments) = plan.token_tiles == 1   ? modulated_linear_kernel<T, 1, kTiles>
                                    : plan.token_tiles == 2 ? modulated_linear_kernel<T, 2, kTiles>
                                                            : modulated_linear_kernel<T, 4, kTiles>;
  launch("modulated_linear", kernel, {plan.grid, 1, 1}, plan.threads, plan.shared.total, stream,
         arguments);
}

// The maps of what is copied in tiles: W in boxes of one projection's columns of a tile, A
// likewise, all rows of x.
LinearArguments with_maps(const LinearArguments& arguments, DType dtype) {
  LinearArguments args = arguments;
  const LinearPlan& plan = args.plan;
  const int projections = args.epilogue == Epilogue::kNone ? 1 : 2;
  const int64_t k = args.in_features;
  args.weight_map = map_tiles(dtype, args.weight, args.ends[args.num_projections - 1], k,
                              args.stride_w, plan.block_columns / projections);
  if (plan.in_loop) {
    args.lora_a_map =
        map_tiles(dtype, args.lora_a, static_cast<int64_t>(args.num_projections) * args.rank, k,
                  args.stride_a, plan.low_rows / projections);
  }
  // The distance to a second row that is not there may be anything.
  args.x_map = map_tiles(dtype, args.x, args.num_tokens, k,
                         args.num_tokens > 1 ? args.stride_x : k, 8 * plan.token_tiles);
  return args;
}

}  // namespace

void launch_linear(const LinearArguments& arguments, DType dtype, uintptr_t stream) {
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (arguments.plan.tiles) {
      launch_tokens<T, true>(with_maps(arguments, dtype), stream);
    } else {
      launch_tokens<T, false>(arguments, stream);
    }
  });
}

void launch_low_rank(const LowRankArguments& arguments, DType dtype, uintptr_t stream) {
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch("low_rank", low_rank_kernel<T>, {arguments.num_tokens, arguments.num_projections, 1},
           kLowRankThreads, 4 * arguments.rank, stream, arguments);
  });
}

}  // namespace fssa::cuda
