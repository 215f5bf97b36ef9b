// Adds up what the splits of the weight gradient left in the workspace, in a fixed order, and rounds once.
//
// Some lanes of a warp, a power of two, own an entry of the gradient: each adds its share of the splits, in order, and
// then they add up by halves, with shuffles. More lanes where there are more splits, so that a lane has about eight
// loads, all under way at once. No barriers. Bytes: the partial sums once. Entries that the solve never read are
// exactly 0: what the corner kind leaves out, and taps beyond the image.
#pragma once

#include "tile.cuh"

namespace inverse_flow {

constexpr int32_t kCombineThreads = 256;
// Blocks of x of the launch: enough to fill a GPU from one group.
constexpr int64_t kCombineBlocks = 512;

// Grid: (blocks of entries, groups). The entries of a group: its weights, then its biases.
template <typename State>
__global__ void __launch_bounds__(kCombineThreads)
    combine_gradients_kernel(const __grid_constant__ GradientArguments<State> args) {
  const Shape& shape = args.shape;
  const int lanes = args.plan.combine_lanes;
  const int64_t group = args.first_group + blockIdx.y;
  const int order = args.orders[blockIdx.y];
  const int64_t taps = shape.kernel_h * shape.kernel_w;
  const int64_t weights = shape.channels * shape.channels * taps;
  const int64_t entries = weights + shape.channels;
  const int64_t all_entries = gradient_elements(shape);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;
  const int in_warp = threadIdx.x % kWarp;
  // Of the warp's first lane, as all lanes take part in the shuffles.
  const int64_t warp_entry = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x - in_warp) / lanes;
  for (int64_t first = warp_entry; first < entries; first += stride) {
    const int64_t entry = first + in_warp / lanes;
    const bool is_bias = entry >= weights;
    bool is_read = entry < entries;
    if (!is_bias) {
      const int64_t pair = entry / taps;
      const int64_t tap = entry - pair * taps;
      const int64_t row = tap / shape.kernel_w;
      const int64_t a = tap_row(shape.kernel_h, order, row);
      const int64_t b = tap_column(shape.kernel_w, order, tap - row * shape.kernel_w);
      const bool is_corner = a == 0 && b == 0;
      const int64_t o = pair / shape.channels;
      is_read =
          a < shape.height && b < shape.width && (!is_corner || corner_is_read(shape, o, pair - o * shape.channels));
    }
    const int64_t place =
        is_bias ? shape.groups * weights + group * shape.channels + entry - weights : group * weights + entry;
    State sum = 0;
    if (is_read) {
      INVERSE_FLOW_UNROLL_BY(8)
      for (int64_t split = in_warp % lanes; split < args.plan.splits; split += lanes) {
        sum += args.partials[split * all_entries + place];
      }
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
    if (in_warp % lanes != 0 || entry >= entries) continue;
    if (is_bias) {
      store_element(args.bias_gradient, group * shape.channels + entry - weights, args.gradient_type, -sum);
    } else {
      // 0 - sum: what is not read is 0, and not -0.
      store_element(args.weight_gradient, place, args.gradient_type, State(0) - sum);
    }
  }
}

}  // namespace inverse_flow
