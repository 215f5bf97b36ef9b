// The weight gradient on tensor cores, from 16 channels per group, in float32: matrix products with the output channels
// as rows, the input channels as columns, and the pixels of a tile as the inner dimension, one for each tap.
// tile.cuh has the sums, the tile, and what becomes of the sums.
//
// A warp owns 16 outputs x 8 inputs and the up to kFragmentTaps taps of the block's window: every tap is the same tile
// of right, read a fixed distance away. Eight pixels are a step: a lane loads four values of left, once for all taps,
// and two of right for each tap, splits them (mma.cuh) and multiplies three times. Pixels are counted without
// margin; `positions` says where in right each stands. Teams of warps take every teams-th step. Sums are kept a tile at
// a time before they join the total, as the tensor core rounds each of its additions towards zero. Barriers: one a
// tile (it is complete, the one before was used), after the last tile, two for each halving of the teams, and after the
// sums are gathered. Bytes: a step of a 9-tap warp loads 22
// words a lane for 27 products of 1024 multiply-adds; shared memory gives a warp's words in a cycle, a scheduler's
// tensor core takes at least four for a product, so the products bind. Fragments meet 32 different banks but where a
// step goes over the end of a row.
#pragma once

#include "../common/mma.cuh"
#include "tile.cuh"

namespace inverse_flow {

// The pixels that fill the last step up: zero in left of both buffers; where their right is does not matter.
__device__ inline void place_pixels(const GradientPlan& plan, unsigned char* shared) {
  int32_t* const positions = reinterpret_cast<int32_t*>(shared + plan.positions_offset);
  const int pixels = plan.pixels();
  const int padded = static_cast<int>(round_up(pixels, kFragmentPixels));
  for (int pixel = threadIdx.x; pixel < padded; pixel += blockDim.x) {
    const int line = pixel / plan.tile_w;
    const int image = line / plan.tile_h;
    positions[pixel] = pixel < pixels ? right_pixel(plan, image, line - image * plan.tile_h, pixel - line * plan.tile_w)
                                      : right_pixel(plan, 0, 0, 0);
  }
  const int filled = padded - pixels;
  for (int item = threadIdx.x; item < kTileBuffers * plan.block_outputs * filled; item += blockDim.x) {
    const int row = item / filled;
    const int output = row % plan.block_outputs;
    float* const left = reinterpret_cast<float*>(shared + row / plan.block_outputs * plan.buffer_bytes);
    left[output * plan.left_pitch + pixels + item - row * filled] = 0;
  }
}

template <typename State, bool kTf32>
__global__ void __launch_bounds__(kGradientTensorThreads, 2)
    weight_gradient_tensor_kernel(const __grid_constant__ GradientArguments<State> args) {
  static_assert(sizeof(State) == sizeof(float));
  const GradientPlan& plan = args.plan;
  const GradientBlock block = gradient_block(args);

  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int item = warp % plan.items;
  const int team = warp / plan.items;
  const int input_fragments = plan.block_inputs / kFragmentInputs;
  const int first_input = item % input_fragments * kFragmentInputs;
  const int first_output = item / input_fragments * kFragmentOutputs;
  // Names as in mma.cuh.
  const int g = lane / 4;
  const int t = lane % 4;

  unsigned char* const shared = dynamic_shared_memory();
  float* const gathered = reinterpret_cast<float*>(shared);
  const int32_t* const positions = reinterpret_cast<const int32_t*>(shared + plan.positions_offset);
  ChannelSum<float> channel_sum(plan, args.shape.transposed);

  const int taps = plan.window_h * plan.window_w;
  // A tap's value stands a pixel before that of the tap to its left, and behind the window's last column of taps (a bit
  // of row_ends) a row less the window's columns further.
  unsigned row_ends = 0;
  INVERSE_FLOW_UNROLL
  for (int v = 0; v < kFragmentTaps; ++v) row_ends |= (v % plan.window_w == plan.window_w - 1 ? 1u : 0u) << v;
  const int steps = static_cast<int>(divide_up(plan.pixels(), kFragmentPixels));
  place_pixels(plan, shared);

  float total[kFragmentTaps * 4] = {};
  for_each_tile(args, block, shared, [&](const unsigned char* buffer) {
    const float* const left = reinterpret_cast<const float*>(buffer);
    const float* const right = reinterpret_cast<const float*>(buffer + plan.right_offset);
    if (block.sums_channels) channel_sum.add_tile(plan, args.shape.transposed, left, right);
    if (team < plan.teams) {
      float sum[kFragmentTaps][4] = {};
      for (int step = team; step < steps; step += plan.teams) {
        const int pixel = step * kFragmentPixels + t;
        const float* l = left + (first_output + g) * plan.left_pitch + pixel;
        const float* other_l = l + 8 * plan.left_pitch;
        const Split<kTf32, 4> a({l[0], other_l[0], l[4], other_l[4]});
        int place = positions[pixel] + (first_input + g) * plan.right_pitch;
        int later_place = positions[pixel + 4] + (first_input + g) * plan.right_pitch;
        INVERSE_FLOW_UNROLL
        for (int v = 0; v < kFragmentTaps; ++v) {
          if (v < taps) multiply_split(sum[v], a, Split<kTf32, 2>({right[place], right[later_place]}));
          // Of constants, here and not ahead of the loop: a register more would spill.
          const int distance = (row_ends >> v & 1) != 0 ? plan.right_columns() - plan.window_w + 1 : 1;
          place -= distance;
          later_place -= distance;
        }
      }
      INVERSE_FLOW_UNROLL
      for (int v = 0; v < kFragmentTaps * 4; ++v) total[v] += sum[v / 4][v % 4];
    }
  });

  meet(total, gathered, team, plan.teams, item * kWarp + lane, plan.items * kWarp);
  store_the_rest(args, block, channel_sum, gathered);
  if (team == 0) {
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < 4; ++i) {
      float* const sums = gathered + sum_place(plan, first_output + g + i / 2 * 8, first_input + 2 * t + i % 2, 0, 0);
      INVERSE_FLOW_UNROLL
      for (int v = 0; v < kFragmentTaps; ++v) {
        if (v < taps) sums[v] = total[v * 4 + i];
      }
    }
  }
  __syncthreads();  // the block's sums are gathered
  store_sums(args, block, gathered);
}

}  // namespace inverse_flow
