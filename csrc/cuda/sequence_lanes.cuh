// The launches of a solve in the regime kLanes. As sequence.cuh, run by the tests against the emulation.
#pragma once

#include "launch.h"
#include "sequence.cuh"
#include "solve_lanes.cuh"

namespace inverse_flow {

template <typename Element>
using LanesKernel = void (*)(LanesArguments<Element>);

// The kernel for so many channels a group and taps; null if there is none, as lanes_most_channels says.
template <typename Element, int kTaps, int kChannels = lanes_most_channels(kTaps)>
LanesKernel<Element> lanes_kernel_of(int64_t channels) {
  if constexpr (kChannels == 0) {
    return nullptr;
  } else {
    return channels == kChannels ? lanes_kernel<Element, kChannels, kTaps>
                                 : lanes_kernel_of<Element, kTaps, kChannels - 1>(channels);
  }
}

// Whether every kWidePixels pixels of a row, counted from a tile's first column, are one aligned access: mirrored
// columns too, since the width is a multiple.
template <typename T>
bool has_wide_rows(const T* data, const Strides& strides, const Shape& shape, const LanesPlan& plan) {
  constexpr uintptr_t kBytes = kWidePixels * sizeof(T);
  const auto is_multiple = [](int64_t elements) { return elements % kWidePixels == 0; };
  return strides.column == 1 && is_multiple(strides.row) && is_multiple(strides.channel) &&
         is_multiple(strides.batch) && is_multiple(shape.width) && is_multiple(plan.tile_w) &&
         reinterpret_cast<uintptr_t>(data) % kBytes == 0;
}

template <typename Element>
const char* run_lanes(const SolveProblem& problem, const SolvePlan& plan, void* stream) {
  const Shape& shape = problem.shape;
  const LanesPlan& lanes = plan.lanes;
  LanesArguments<Element> args{};
  args.solve = solve_arguments<Element>(problem, plan);
  args.progress = static_cast<int32_t*>(problem.workspace);
  const SolveArguments<Element>& solve = args.solve;
  args.wide_input = has_wide_rows(solve.input, solve.input_strides, shape, lanes);
  args.wide_output = has_wide_rows(solve.output, solve.output_strides, shape, lanes) &&
                     (!solve.write_state || has_wide_rows(solve.state, solve.state_strides, shape, lanes));
  const LanesKernel<Element> kernel = shape.kernel_h == 2   ? lanes_kernel_of<Element, 2>(shape.channels)
                                      : shape.kernel_h == 3 ? lanes_kernel_of<Element, 3>(shape.channels)
                                                            : lanes_kernel_of<Element, 5>(shape.channels);
  const int64_t tiles = shape.batch * lanes.tiles();
  if (!lanes.single_tile()) {
    if (tiles > kMaxGridX) return "inverse_flow: too many tiles for one launch on this GPU";
    const char* error = clear_memory(args.progress, lanes_workspace_bytes(shape, lanes), stream);
    if (error != nullptr) return error;
  }
  return for_each_group_chunk(
      shape, problem.orders, [&](int64_t first_group, int64_t groups, const GroupOrders& orders) -> const char* {
        args.solve.first_group = first_group;
        args.solve.orders = orders;
        const auto launch = [&](int64_t blocks) {
          return launch_kernel(kernel, {static_cast<unsigned>(blocks), static_cast<unsigned>(groups), 1}, lanes.threads,
                               lanes.shared_bytes, args, stream);
        };
        if (!lanes.single_tile()) return launch(tiles);
        const int64_t chunk = kMaxGridX * lanes.images;
        for (args.solve.first_image = 0; args.solve.first_image < shape.batch; args.solve.first_image += chunk) {
          const char* error = launch(divide_up(std::min(shape.batch - args.solve.first_image, chunk), lanes.images));
          if (error != nullptr) return error;
        }
        return nullptr;
      });
}

}  // namespace inverse_flow
