// The launches of a solve in the regime "tensor cores": one, and before it, if the blocks do not fold, those of the
// fold.
#pragma once

#include "../common/fold_launch.cuh"
#include "kernel.cuh"

namespace inverse_flow {

template <typename Element>
const char* run_tensor(const SolveProblem& problem, const TensorPlan& plan, void* stream) {
  const Shape& shape = problem.shape;
  SolveArguments<Element, TensorPlan> args{};
  set_problem(args, problem, plan);
  if (!plan.fold.in_block) args.folded = static_cast<const float*>(problem.workspace);
  const auto kernel = problem.allow_tf32 ? solve_tensor_kernel<Element, true> : solve_tensor_kernel<Element, false>;
  return for_each_group_chunk(
      shape, problem.orders, [&](int64_t first_group, int64_t groups, const GroupOrders& orders) -> const char* {
        args.first_group = first_group;
        args.orders = orders;
        if (!plan.fold.in_block) {
          const char* error = launch_fold<float>(problem, plan.fold, plan.taps, first_group, groups, orders, stream);
          if (error != nullptr) return error;
        }
        const int64_t chunk = kMaxGridX * plan.images;
        for (args.first_image = 0; args.first_image < shape.batch; args.first_image += chunk) {
          const int64_t blocks = divide_up(std::min(shape.batch - args.first_image, chunk), plan.images);
          const char* error = launch_kernel(kernel, {static_cast<unsigned>(blocks), static_cast<unsigned>(groups), 1},
                                            plan.threads, plan.shared_bytes, args, stream);
          if (error != nullptr) return error;
        }
        return nullptr;
      });
}

}  // namespace inverse_flow
