// The launches of a solve in the regime "block": one for each diagonal of tiles, since a tile needs those above it and
// to its left, which lie on earlier diagonals; before them, if the blocks do not fold, those of the fold.
#pragma once

#include "../common/fold_launch.cuh"
#include "kernel.cuh"

namespace inverse_flow {

template <typename Element>
const char* run_block(const SolveProblem& problem, const BlockPlan& plan, void* stream) {
  using State = typename StateOf<Element>::Type;
  constexpr int kPack = 16 / sizeof(State);
  const Shape& shape = problem.shape;
  BlockArguments<Element> args{};
  set_problem(args, problem, plan);
  if (!plan.fold.in_block) args.folded = static_cast<const State*>(problem.workspace);
  const auto kernel = !plan.weights_in_shared ? solve_kernel<Element, kPack, false>
                      : plan.taps.pack == 1   ? solve_kernel<Element, 1, true>
                                              : solve_kernel<Element, kPack, true>;
  return for_each_group_chunk(
      shape, problem.orders, [&](int64_t first_group, int64_t groups, const GroupOrders& orders) -> const char* {
        args.first_group = first_group;
        args.orders = orders;
        if (!plan.fold.in_block) {
          const char* error = launch_fold<State>(problem, plan.fold, plan.taps, first_group, groups, orders, stream);
          if (error != nullptr) return error;
        }
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

}  // namespace inverse_flow
