// The launches before a solve whose blocks do not fold for themselves: the corner is inverted, by the blocks of the
// fold or, where it does not fit shared memory, by a launch of its own; then the blocks share the entries of a group.
#pragma once

#include "fold.cuh"
#include "launch_kernel.cuh"
#include "problem.h"

namespace inverse_flow {

template <typename StateType, typename Layout>
struct FoldArguments {
  using State = StateType;

  Shape shape;
  Layout layout;
  GroupOrders orders;
  int64_t first_group;
  const void* weight;
  ElementType weight_type;
  bool inverts_before;
  unsigned char* inversions;  // inversion_bytes a group
  State* folded;              // the layout's elements a group

  __device__ int64_t group() const { return first_group + blockIdx.y; }
  __device__ WeightView view() const { return weight_view(shape, weight, weight_type, group(), orders[blockIdx.y]); }
  __device__ Inversion workspace_inversion() const {
    return {inversions + group() * inversion_bytes(shape.channels), static_cast<int>(shape.channels)};
  }
};

// One block per group: for corners that do not fit shared memory.
template <typename Arguments>
__global__ void __launch_bounds__(kMaxThreads, 1) invert_corner_kernel(const __grid_constant__ Arguments args) {
  using State = typename Arguments::State;
  const WeightView weight = args.view();
  const Inversion inversion = args.workspace_inversion();
  const Team team = block_team();
  with_elements<State>(weight.data, weight.type, [&](const auto* source) {
    load_corner<int64_t, kFoldLoads>(weight, source + weight.group_offset, inversion, team);
  });
  invert_corner(weight, inversion, team);
}

// Blocks of x share a group's entries, and each inverts the corner for itself if that fits shared memory: at the same
// time as the others, so it costs no time of its own, and spares a launch.
template <typename Arguments>
__global__ void __launch_bounds__(kMaxThreads, 1) fold_taps_kernel(const __grid_constant__ Arguments args) {
  using State = typename Arguments::State;
  const WeightView weight = args.view();
  Inversion inversion = args.workspace_inversion();
  if (!args.inverts_before && weight.corner != kIdentity) {
    inversion = Inversion(dynamic_shared_memory(), weight.channels);
    const Team team = block_team();
    with_elements<State>(weight.data, weight.type, [&](const auto* source) {
      load_corner<int64_t, kFoldLoads>(weight, source + weight.group_offset, inversion, team);
    });
    invert_corner(weight, inversion, team);
  }
  State* const folded = args.folded + args.group() * args.layout.elements();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  with_elements<State>(weight.data, weight.type, [&](const auto* source) {
    fold_taps<int64_t, kFoldTaps>(weight, source + weight.group_offset, inversion, args.layout, folded, thread,
                                  threads);
  });
}

// Folds a chunk of groups into the workspace.
template <typename State, typename Layout>
const char* launch_fold(const SolveProblem& problem, const FoldPlan& plan, const Layout& layout, int64_t first_group,
                        int64_t groups, const GroupOrders& orders, void* stream) {
  using Arguments = FoldArguments<State, Layout>;
  const Shape& shape = problem.shape;
  auto* const workspace = static_cast<unsigned char*>(problem.workspace);
  const Arguments args{shape,
                       layout,
                       orders,
                       first_group,
                       problem.weight,
                       problem.weight_type,
                       plan.inverts_before(shape),
                       workspace + plan.inversions_offset(shape, layout.elements(), sizeof(State)),
                       reinterpret_cast<State*>(workspace)};
  const auto groups_y = static_cast<unsigned>(groups);
  if (args.inverts_before) {
    const char* error = launch_kernel(invert_corner_kernel<Arguments>, {1, groups_y, 1}, plan.threads, 0, args, stream);
    if (error != nullptr) return error;
  }
  return launch_kernel(fold_taps_kernel<Arguments>, {static_cast<unsigned>(plan.blocks), groups_y, 1}, plan.threads,
                       plan.shared_bytes, args, stream);
}

}  // namespace inverse_flow
