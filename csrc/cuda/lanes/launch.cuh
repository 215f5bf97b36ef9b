// The launches of a solve in the regime "lanes": the flags of the tiles are cleared, then all tiles are one launch.
#pragma once

#include "../common/launch_kernel.cuh"
#include "kernel.cuh"

namespace inverse_flow {

template <typename Element>
using LanesKernel = void (*)(LanesArguments<Element>);

// The kernel for so many channels per group and taps; null if there is none, as lanes_most_channels says.
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
LanesKernel<Element> lanes_kernel_of(const Shape& shape) {
  switch (shape.kernel_h) {
    case 2:
      return lanes_kernel_of<Element, 2>(shape.channels);
    case 3:
      return lanes_kernel_of<Element, 3>(shape.channels);
    default:
      return lanes_kernel_of<Element, 5>(shape.channels);
  }
}

template <typename Element>
const char* run_lanes(const SolveProblem& problem, const LanesPlan& plan, void* stream) {
  const Shape& shape = problem.shape;
  LanesArguments<Element> args{};
  set_problem(args, problem, plan);
  args.progress = static_cast<int32_t*>(problem.workspace);
  args.input_access = access_to(args.input, args.input_strides, shape, plan);
  args.output_access = access_to(args.output, args.output_strides, shape, plan);
  // The state moves with the output: by as many pixels, but channel by channel.
  if (args.output_access == Access::kPixels && args.write_state &&
      access_to(args.state, args.state_strides, shape, plan) != Access::kPixels) {
    args.output_access = Access::kValue;
  }
  const LanesKernel<Element> kernel = lanes_kernel_of<Element>(shape);
  const int64_t tiles = shape.batch * plan.tiles();
  if (!plan.single_tile()) {
    if (tiles > kMaxGridX) return "inverse_flow: too many tiles for one launch on this GPU";
    const char* error = clear_memory(args.progress, plan.workspace_bytes(shape, sizeof(float)), stream);
    if (error != nullptr) return error;
  }
  return for_each_group_chunk(
      shape, problem.orders, [&](int64_t first_group, int64_t groups, const GroupOrders& orders) -> const char* {
        args.first_group = first_group;
        args.orders = orders;
        const auto launch = [&](int64_t blocks) {
          return launch_kernel(kernel, {static_cast<unsigned>(blocks), static_cast<unsigned>(groups), 1}, plan.threads,
                               plan.shared_bytes, args, stream);
        };
        if (!plan.single_tile()) return launch(tiles);
        const int64_t chunk = kMaxGridX * plan.images;
        for (args.first_image = 0; args.first_image < shape.batch; args.first_image += chunk) {
          const char* error = launch(divide_up(std::min(shape.batch - args.first_image, chunk), plan.images));
          if (error != nullptr) return error;
        }
        return nullptr;
      });
}

}  // namespace inverse_flow
