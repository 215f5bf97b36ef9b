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

// The widest access whose places are all aligned: kAccessWidth pixels counted from a tile's first column, mirrored
// columns too, since the width is a multiple; or kAccessWidth channels, counted from a group's first.
template <typename T>
Access access_to(const T* data, const Strides& strides, const Shape& shape, const LanesPlan& plan) {
  constexpr uintptr_t kBytes = kAccessWidth * sizeof(T);
  const auto is_multiple = [](int64_t elements) { return elements % kAccessWidth == 0; };
  if (reinterpret_cast<uintptr_t>(data) % kBytes != 0 || !is_multiple(strides.batch) || !is_multiple(strides.row)) {
    return Access::kValue;
  }
  if (strides.column == 1 && is_multiple(strides.channel) && is_multiple(shape.width) && is_multiple(plan.tile_w)) {
    return Access::kPixels;
  }
  if (strides.channel == 1 && is_multiple(strides.column) && is_multiple(shape.channels)) return Access::kChannels;
  return Access::kValue;
}

template <typename Element>
const char* run_lanes(const SolveProblem& problem, const SolvePlan& plan, void* stream) {
  const Shape& shape = problem.shape;
  const LanesPlan& lanes = plan.lanes;
  LanesArguments<Element> args{};
  args.solve = solve_arguments<Element>(problem, plan);
  args.progress = static_cast<int32_t*>(problem.workspace);
  const SolveArguments<Element>& solve = args.solve;
  args.input_access = access_to(solve.input, solve.input_strides, shape, lanes);
  args.output_access = access_to(solve.output, solve.output_strides, shape, lanes);
  // The state moves with the output: by as many pixels, but channel by channel.
  if (args.output_access == Access::kPixels && solve.write_state &&
      access_to(solve.state, solve.state_strides, shape, lanes) != Access::kPixels) {
    args.output_access = Access::kValue;
  }
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
