// The launches of one gradient: the sums of each block, and one that adds up those of the splits, if there are several.
#pragma once

#include "../common/launch_kernel.cuh"
#include "combine.cuh"
#include "simt.cuh"
#include "tensor.cuh"

namespace inverse_flow {

// The kernel of a plan: one for each number of channels of a thread, and tensor cores for float32, in two precisions.
template <typename State>
auto gradient_kernel(const GradientPlan& plan, bool allow_tf32) {
  constexpr int kSide = 16 / sizeof(State);
  void (*kernel)(GradientArguments<State>) =
      plan.side == 1 ? weight_gradient_kernel<State, 1> : weight_gradient_kernel<State, kSide>;
  if constexpr (sizeof(State) == sizeof(float)) {
    if (plan.tensor_cores) {
      kernel = allow_tf32 ? weight_gradient_tensor_kernel<State, true> : weight_gradient_tensor_kernel<State, false>;
    }
  }
  return kernel;
}

template <typename State>
const char* run_gradient(const GradientProblem& problem, const GradientPlan& plan, void* stream) {
  const Shape& shape = problem.shape;
  GradientArguments<State> args{};
  args.shape = shape;
  args.plan = plan;
  args.partials = static_cast<State*>(problem.workspace);
  args.left = shape.transposed ? problem.output : problem.adjoint;
  args.left_strides = shape.transposed ? problem.output_strides : problem.adjoint_strides;
  args.left_type = shape.transposed ? problem.output_type : problem.adjoint_type;
  args.right = shape.transposed ? problem.adjoint : problem.output;
  args.right_strides = shape.transposed ? problem.adjoint_strides : problem.output_strides;
  args.right_type = shape.transposed ? problem.adjoint_type : problem.output_type;
  args.weight_gradient = problem.weight_gradient;
  args.bias_gradient = problem.bias_gradient;
  args.gradient_type = problem.weight_type;
  if (plan.blocks() > kMaxGridZ) return "inverse_flow: too many channels per group for the gradient on this GPU";

  return for_each_group_chunk(
      shape, problem.orders, [&](int64_t first_group, int64_t groups, const GroupOrders& orders) -> const char* {
        args.first_group = first_group;
        args.orders = orders;
        const unsigned groups_y = static_cast<unsigned>(groups);
        const char* failed =
            launch_kernel(gradient_kernel<State>(plan, problem.allow_tf32),
                          {static_cast<unsigned>(plan.splits), groups_y, static_cast<unsigned>(plan.blocks())},
                          plan.threads, plan.shared_bytes, args, stream);
        if (failed != nullptr || plan.is_direct()) return failed;
        const int64_t entries = shape.channels * (shape.channels * shape.kernel_h * shape.kernel_w + 1);
        const int64_t blocks = std::min(divide_up(entries * plan.combine_lanes, kCombineThreads), kCombineBlocks);
        return launch_kernel(combine_gradients_kernel<State>, {static_cast<unsigned>(blocks), groups_y, 1},
                             kCombineThreads, 0, args, stream);
      });
}

}  // namespace inverse_flow
