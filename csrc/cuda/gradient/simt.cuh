// The weight gradient without tensor cores: few channels, and float64. tile.cuh has the sums, the tile, and
// what becomes of the sums.
//
// A thread owns kSide x kSide channel pairs (16 bytes of channels each way) and a strip: one row of taps, kTapColumns
// columns of them. It walks along a segment of a row of the tile with the last kTapColumns packs of right in registers:
// two loads from shared memory, of a pack of left and a pack of right, serve kSide^2 kTapColumns multiply-adds: 48 in
// float32, so 32 bytes per lane for 48 cycles of a warp's multiply-adds over four schedulers; neither waits for the
// other. Teams of threads take every teams-th segment. Sums are kept a tile at a time before they join the total, which
// keeps float32 rounding small.
// Barriers: one per tile (it is complete, the one before was used), after the last tile, two for each halving of the
// teams, and after the sums are gathered.
#pragma once

#include "tile.cuh"

namespace inverse_flow {

// The sums of a thread: kSide x kSide channel pairs, and kTapColumns taps of each.
template <typename State, int kSide>
struct PairSums {
  using StatePack = Pack<State, kSide>;
  static constexpr int kSums = kSide * kSide * kTapColumns;
  State value[kSums] = {};

  // Walks to the right along so many pixels of left, and of right as many pixels beside them.
  __device__ void add_segment(const GradientPlan& plan, const State* left, const State* right, int columns) {
    // window[v]: the pack of right v columns to the left of the current one.
    StatePack window[kTapColumns];
    INVERSE_FLOW_UNROLL
    for (int v = 1; v < kTapColumns; ++v) {
      window[v - 1] = *reinterpret_cast<const StatePack*>(right - v * plan.right_pitch);
    }
    INVERSE_FLOW_UNROLL_BY(kTapColumns)  // so that the window turns without moves
    for (int column = 0; column < columns; ++column) {
      INVERSE_FLOW_UNROLL
      for (int v = kTapColumns - 1; v > 0; --v) window[v] = window[v - 1];
      window[0] = *reinterpret_cast<const StatePack*>(right);
      add_pixel(*reinterpret_cast<const StatePack*>(left), window);
      left += plan.left_pitch;
      right += plan.right_pitch;
    }
  }

  __device__ void add(const PairSums& other) {
    INVERSE_FLOW_UNROLL
    for (int v = 0; v < kSums; ++v) value[v] += other.value[v];
  }

 private:
  __device__ void add_pixel(const StatePack& left, const StatePack (&window)[kTapColumns]) {
    INVERSE_FLOW_UNROLL
    for (int o = 0; o < kSide; ++o) {
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < kSide; ++c) {
        INVERSE_FLOW_UNROLL
        for (int v = 0; v < kTapColumns; ++v) {
          value[(o * kSide + c) * kTapColumns + v] += left.value[o] * window[v].value[c];
        }
      }
    }
  }
};

template <typename State, int kSide>
__global__ void __launch_bounds__(kGradientThreads, 2)
    weight_gradient_kernel(const __grid_constant__ GradientArguments<State> args) {
  using Sums = PairSums<State, kSide>;
  const GradientPlan& plan = args.plan;
  const GradientBlock block = gradient_block(args);

  const int item = threadIdx.x % plan.items;
  const int team = threadIdx.x / plan.items;
  const int input_packs = plan.block_inputs / kSide;
  const int output_packs = plan.block_outputs / kSide;
  const int input = item % input_packs * kSide;
  const int output = item / input_packs % output_packs * kSide;
  const int strip = item / (input_packs * output_packs);
  const int window_a = strip / plan.window_w;
  const int window_b = strip % plan.window_w * kTapColumns;

  unsigned char* const shared = dynamic_shared_memory();
  State* const gathered = reinterpret_cast<State*>(shared);
  ChannelSum<State> channel_sum(plan, args.shape.transposed);

  Sums total;
  for_each_tile(args, block, shared, [&](const unsigned char* buffer) {
    const State* const left = reinterpret_cast<const State*>(buffer);
    const State* const right = reinterpret_cast<const State*>(buffer + plan.right_offset);
    if (block.sums_channels) channel_sum.add_tile(plan, args.shape.transposed, left, right);
    if (team >= plan.teams) return;
    Sums of_tile;
    for (int piece = team; piece < segments_of(plan); piece += plan.teams) {
      const Segment segment = segment_at(plan, piece);
      const int left_pixel = segment.line * plan.tile_w + segment.first_column;
      const int beside = right_pixel(plan, segment.image, segment.row - window_a, segment.first_column) - window_b;
      of_tile.add_segment(plan, left + left_pixel * plan.left_pitch + output, right + input + beside * plan.right_pitch,
                          segment.columns);
    }
    total.add(of_tile);
  });

  meet(total.value, gathered, team, plan.teams, item, plan.items);
  store_the_rest(args, block, channel_sum, gathered);
  if (team == 0) {
    INVERSE_FLOW_UNROLL
    for (int v = 0; v < Sums::kSums; ++v) {
      const int pair = v / kTapColumns;
      gathered[sum_place(plan, output + pair / kSide, input + pair % kSide, window_a, window_b + v % kTapColumns)] =
          total.value[v];
    }
  }
  __syncthreads();  // the block's sums are gathered
  store_sums(args, block, gathered);
}

}  // namespace inverse_flow
