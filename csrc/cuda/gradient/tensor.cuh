// The weight gradient on tensor cores, from 16 channels per group, in float32: matrix products with the output channels
// as rows, the input channels as columns, and the pixels of a tile as the inner dimension, one for each tap.
// tile.cuh has the sums, the tile, and what becomes of the sums.
//
// A warp owns 16 outputs x 8 inputs and the up to kFragmentTaps taps of the block's window: every tap is the same tile
// of right, read a fixed distance away, which the plan knows. Eight pixels are a step: a lane loads four values of
// left, once for all taps, and two of right for each tap, splits them (mma.cuh) and multiplies three times. Pixels are
// counted without margin; `positions` says where in right each stands. Teams of warps take every teams-th step. Each
// number of taps has a loop of its own over the steps, so that the loads of all taps stand side by side and nothing is
// asked between them. Sums are kept a tile at a time before they join the total, as the tensor core rounds each of its
// additions towards zero.
// Shared memory: two buffers of [left: output, pixel] [right: input, pixel with margin], then positions. The sums meet,
// and are gathered, where the buffers were.
// Barriers: one a tile (it is complete, positions and the filled-up step too; the one before was used), after the last
// tile, two for each halving of the teams, and after the sums are gathered.
// Bytes: a step of a 9-tap warp loads 22 words a lane, and where they are, for 27 products of 1024 multiply-adds, in
// 153 instructions; shared memory gives a warp's words in a cycle, a scheduler's tensor core takes at least four for a
// product and is said to take seven, so the products bind. Fragments meet 32 different banks but where a step goes over
// the end of a row.
#pragma once

#include <type_traits>

#include "../common/mma.cuh"
#include "tile.cuh"

namespace inverse_flow {

// Where in right each pixel's value of the first tap stands, in bytes. The pixels that fill the last step up: zero in
// left of both buffers; where their right is does not matter.
__device__ inline void place_pixels(const GradientPlan& plan, unsigned char* shared) {
  int32_t* const positions = reinterpret_cast<int32_t*>(shared + plan.positions_offset);
  const int pixels = plan.pixels();
  const int padded = static_cast<int>(round_up(pixels, kFragmentPixels));
  for (int pixel = threadIdx.x; pixel < padded; pixel += blockDim.x) {
    const int line = pixel / plan.tile_w;
    const int image = line / plan.tile_h;
    const int place = pixel < pixels ? right_pixel(plan, image, line - image * plan.tile_h, pixel - line * plan.tile_w)
                                     : right_pixel(plan, 0, 0, 0);
    positions[pixel] = place * static_cast<int>(sizeof(float));
  }
  const int filled = padded - pixels;
  for (int item = threadIdx.x; item < kTileBuffers * plan.block_outputs * filled; item += blockDim.x) {
    const int row = item / filled;
    const int output = row % plan.block_outputs;
    float* const left = reinterpret_cast<float*>(shared + row / plan.block_outputs * plan.buffer_bytes);
    left[output * plan.left_pitch + pixels + item - row * filled] = 0;
  }
}

// Calls body with the number of taps of a window as a constant.
template <int kTaps = kFragmentTaps, typename Body>
__device__ void with_taps(int taps, const Body& body) {
  if constexpr (kTaps > 1) {
    if (taps < kTaps) return with_taps<kTaps - 1>(taps, body);
  }
  body(std::integral_constant<int, kTaps>());
}

__device__ inline float value_at(const unsigned char* place) { return *reinterpret_cast<const float*>(place); }

// Adds a tile's steps first_step, first_step + plan.teams, ... to a warp's total. left and right are the rows of this
// lane's channels, left and positions begin with its pixel of a step. Places in right are in bytes, so that one
// addition makes an address.
template <bool kTf32, int kTaps>
__device__ void add_steps(const GradientPlan& plan, const float* left, const unsigned char* right,
                          const int32_t* positions, int first_step, float (&total)[kFragmentTaps * 4]) {
  float sum[kTaps][4] = {};
  INVERSE_FLOW_UNROLL_BY(1)
  for (int pixel = first_step * kFragmentPixels; pixel < plan.pixels(); pixel += plan.teams * kFragmentPixels) {
    const float* const l = left + pixel;
    const float* const other_l = l + 8 * plan.left_pitch;
    const Split<kTf32, 4> a({l[0], other_l[0], l[4], other_l[4]});
    const unsigned char* const r = right + positions[pixel];
    const unsigned char* const later_r = right + positions[pixel + 4];
    INVERSE_FLOW_UNROLL
    for (int v = 0; v < kTaps; ++v) {
      const int tap = plan.tap_bytes[v];
      multiply_split(sum[v], a, Split<kTf32, 2>({value_at(r + tap), value_at(later_r + tap)}));
    }
  }
  INVERSE_FLOW_UNROLL
  for (int v = 0; v < kTaps * 4; ++v) total[v] += sum[v / 4][v % 4];
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
  place_pixels(plan, shared);

  float total[kFragmentTaps * 4] = {};
  for_each_tile(args, block, shared, [&](const unsigned char* buffer) {
    const float* const left = reinterpret_cast<const float*>(buffer);
    const float* const right = reinterpret_cast<const float*>(buffer + plan.right_offset);
    if (block.sums_channels) channel_sum.add_tile(plan, args.shape.transposed, left, right);
    if (team >= plan.teams) return;
    const float* const l = left + (first_output + g) * plan.left_pitch + t;
    const float* const r = right + (first_input + g) * plan.right_pitch;
    with_taps(taps, [&](auto constant) {
      add_steps<kTf32, constant.value>(plan, l, reinterpret_cast<const unsigned char*>(r), positions + t, team, total);
    });
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
