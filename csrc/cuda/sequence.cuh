// The launches of one solve, and of one gradient, in order. Written against launch_kernel, which stands in
// launch_kernel.cuh for the GPU and in the emulation for the CPU: so the tests run this very code.
#pragma once

#include "combine_gradients.cuh"
#include "launch.h"
#include "solve_tensor.cuh"
#include "weight_gradient.cuh"
#include "weight_gradient_tensor.cuh"

#ifdef __CUDACC__
#include "launch_kernel.cuh"
#endif

namespace inverse_flow {

// The limit of gridDim.z.
constexpr int64_t kMaxGridZ = 65535;
// Blocks of x of the launch that adds up the gradients: enough to fill a GPU from one group.
constexpr int64_t kCombineBlocks = 512;

inline Strides contiguous_strides(const Shape& shape) {
  return {shape.groups * shape.channels * shape.height * shape.width, shape.height * shape.width, shape.width, 1};
}

// In fold_launch.cu, once for all image types.
const char* launch_fold(const FoldArguments<float>& args, int64_t groups, int threads, void* stream);
const char* launch_fold(const FoldArguments<double>& args, int64_t groups, int threads, void* stream);

// In lanes_*_launch.cu: solves in the regime kLanes.
template <typename Element>
const char* run_lanes(const SolveProblem& problem, const SolvePlan& plan, void* stream);

// The arguments of a solve, but for the groups, images and tiles of a launch.
template <typename Element>
SolveArguments<Element> solve_arguments(const SolveProblem& problem, const SolvePlan& plan) {
  using State = typename StateOf<Element>::Type;
  SolveArguments<Element> args{};
  args.shape = problem.shape;
  args.plan = plan;
  args.input = static_cast<const Element*>(problem.input);
  args.input_strides = problem.input_strides;
  args.output = static_cast<Element*>(problem.output);
  args.output_strides = problem.output_strides;
  if constexpr (sizeof(Element) == sizeof(State)) {
    args.state = args.output;
    args.state_strides = problem.output_strides;
  } else {
    args.state = static_cast<State*>(problem.state);
    args.state_strides = contiguous_strides(problem.shape);
    args.write_state = args.state != nullptr;
  }
  args.weight = problem.weight;
  args.bias = problem.bias;
  args.weight_type = problem.weight_type;
  return args;
}

template <typename Element>
const char* run_solve(const SolveProblem& problem, const SolvePlan& plan, void* stream) {
  using State = typename StateOf<Element>::Type;
  if constexpr (sizeof(State) == sizeof(float)) {
    if (plan.regime == SolveRegime::kLanes) return run_lanes<Element>(problem, plan, stream);
  }
  constexpr int kPack = 16 / sizeof(State);
  const Shape& shape = problem.shape;
  const SolveWorkspace parts = solve_workspace(shape, plan, sizeof(State));
  unsigned char* const workspace = static_cast<unsigned char*>(problem.workspace);
  SolveArguments<Element> args = solve_arguments<Element>(problem, plan);
  if (!plan.fold_in_block) args.folded = reinterpret_cast<const State*>(workspace + parts.folded);

  void (*kernel)(SolveArguments<Element>) = solve_kernel<Element, kPack, false>;
  if (plan.weights_in_shared) {
    kernel = plan.pack == 1 ? solve_kernel<Element, 1, true> : solve_kernel<Element, kPack, true>;
  }
  if constexpr (sizeof(State) == sizeof(float)) {
    if (plan.regime == SolveRegime::kTensor) {
      kernel = problem.allow_tf32 ? solve_tensor_kernel<Element, true> : solve_tensor_kernel<Element, false>;
    }
  }

  return for_each_group_chunk(
      shape, problem.orders, [&](int64_t first_group, int64_t groups, const GroupOrders& orders) -> const char* {
        args.first_group = first_group;
        args.orders = orders;
        if (!plan.fold_in_block) {
          FoldArguments<State> fold{shape,
                                    plan,
                                    orders,
                                    first_group,
                                    problem.weight,
                                    problem.weight_type,
                                    workspace + parts.inversions,
                                    reinterpret_cast<State*>(workspace + parts.folded)};
          const char* error = launch_fold(fold, groups, plan.fold_threads, stream);
          if (error != nullptr) return error;
        }
        // A tile needs those above and to the left of it, which lie on earlier tile diagonals.
        for (int64_t diagonal = 0; diagonal < plan.tiles_h + plan.tiles_w - 1; ++diagonal) {
          const int64_t first_row = std::max<int64_t>(diagonal - (plan.tiles_w - 1), 0);
          const int64_t tiles = std::min(diagonal, plan.tiles_h - 1) - first_row + 1;
          if (tiles > kMaxGridZ) return "inverse_flow: the image is too large for this GPU's tiles";
          args.tile_diagonal = diagonal;
          const int64_t chunk = kMaxGridX * plan.images;
          for (args.first_image = 0; args.first_image < shape.batch; args.first_image += chunk) {
            const int64_t blocks = divide_up(std::min(shape.batch - args.first_image, chunk), plan.images);
            const char* error = launch_kernel(
                kernel, {static_cast<unsigned>(blocks), static_cast<unsigned>(groups), static_cast<unsigned>(tiles)},
                plan.threads, plan.shared_bytes, args, stream);
            if (error != nullptr) return error;
          }
        }
        return nullptr;
      });
}

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
  if (plan.blocks() > kMaxGridZ) return "inverse_flow: too many channels a group for the gradient on this GPU";

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
        const int64_t blocks = std::min(divide_up(entries * plan.combine_lanes, kBusyThreads), kCombineBlocks);
        return launch_kernel(combine_gradients_kernel<State>, {static_cast<unsigned>(blocks), groups_y, 1},
                             kBusyThreads, 0, args, stream);
      });
}

}  // namespace inverse_flow
