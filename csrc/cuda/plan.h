// How a problem is laid over the GPU: problem and device limits in, tile, threads and shared memory out. Plain C++,
// no CUDA and no torch, so that the tests can read every plan on a machine without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "device_limits.h"
#include "plan_lanes.h"
#include "plan_tensor.h"

namespace inverse_flow {

// Registers: 65536 of them over 640 threads leave 96 each; the solve spills with the 64 that 1024 threads would leave.
constexpr int32_t kMaxThreads = 640;
// Several small images share a block until it has this many threads: eight warps hide each other's latency.
constexpr int32_t kBusyThreads = 256;
// A corner this small is inverted by every block for itself, which spares a launch; beyond it the cubic work in
// double precision, repeated a block, would cost more than the launch.
constexpr int32_t kMaxChannelsFoldedInBlock = 16;
// Of those, a corner so small is inverted by one warp, whose barriers are cheaper: it has a lane for every entry that a
// step computes (unit triangular: 4 rows of 8 at most; general: all of them). Beyond, its second round would take
// longer than the barriers of the block.
INVERSE_FLOW_HOST_DEVICE constexpr bool inverted_by_warp(Corner corner, int64_t channels) {
  return channels <= (corner == kUnitTriangular ? 12 : 5);
}

struct SolvePlan {
  SolveRegime regime;
  LanesPlan lanes;    // of kLanes alone
  TensorPlan tensor;  // of kTensor alone
  // Taps that can reach a pixel at all: the kernel clipped to the image.
  int32_t taps_h;
  int32_t taps_w;
  // Channels go through memory `pack` at a time (16 bytes), in `channel_packs` packs, zeros in the rest of the last.
  int32_t pack;
  int32_t channel_packs;
  // The tile that a block keeps in shared memory, rows `row_stride` pixels apart; the image is tiles_h x tiles_w tiles.
  int32_t tile_h;
  int32_t tile_w;
  int32_t row_stride;
  int64_t tiles_h;
  int64_t tiles_w;
  int32_t images;  // whole images in a block; 1 when an image has several tiles
  // Threads of the sweep: channel fastest, then pixel of the diagonal, then image.
  int32_t channel_threads;
  int32_t diagonal_threads;
  int32_t threads;
  bool weights_in_shared;
  bool fold_in_block;  // else a launch before the solve leaves the folded weights in the workspace
  // That launch: blocks a group, and their threads. Each inverts the corner for itself, in shared memory, if it fits
  // there; with 0 bytes yet another launch inverts it in the workspace.
  int32_t fold_blocks;
  int32_t fold_threads;
  int64_t fold_shared_bytes;
  // Shared memory, in bytes: weights (if any), bias, tile.
  int64_t bias_offset;
  int64_t tile_offset;
  int64_t shared_bytes;

  INVERSE_FLOW_HOST_DEVICE bool single_tile() const { return tiles_h == 1 && tiles_w == 1; }
  // Folded weights of one group: taps x inputs x outputs, both padded with zeros to what the regime reads.
  INVERSE_FLOW_HOST_DEVICE int64_t folded_inputs() const {
    return regime == SolveRegime::kTensor ? tensor.padded_inputs() : static_cast<int64_t>(channel_packs) * pack;
  }
  INVERSE_FLOW_HOST_DEVICE int64_t folded_outputs(int64_t channels) const {
    return regime == SolveRegime::kTensor ? tensor.padded_outputs() : channels;
  }
  INVERSE_FLOW_HOST_DEVICE int64_t folded_elements(int64_t channels) const {
    return static_cast<int64_t>(taps_h) * taps_w * folded_inputs() * folded_outputs(channels);
  }
};

// Memory of one corner inversion: the matrix in double with rows an odd number of entries apart, a row and a column,
// two permutations.
INVERSE_FLOW_HOST_DEVICE constexpr int64_t inversion_bytes(int64_t channels) {
  return round_up(channels * ((channels | 1) * 8 + 8 + 8 + 4 + 4), 16);
}

namespace plan_detail {

// An even stride: neighbours on an anti-diagonal are then an odd number of pixels apart, and so in different banks.
inline int32_t row_stride(int64_t tile_h, int64_t tile_w) {
  return static_cast<int32_t>(tile_h > 1 && tile_w > 1 ? round_up(tile_w, 2) : tile_w);
}

inline int64_t tile_bytes(const SolvePlan& plan, int64_t tile_h, int64_t tile_w, int64_t state_bytes) {
  return tile_h * row_stride(tile_h, tile_w) * plan.channel_packs * plan.pack * state_bytes;
}

// Sets what the regimes have in common from the plan of kLanes.
inline void copy_lanes_plan(const Shape& shape, SolvePlan& plan) {
  const LanesPlan& lanes = plan.lanes;
  plan.taps_h = static_cast<int32_t>(shape.kernel_h);
  plan.taps_w = static_cast<int32_t>(shape.kernel_w);
  plan.pack = 1;
  plan.channel_packs = static_cast<int32_t>(shape.channels);
  plan.tile_h = lanes.tile_h;
  plan.tile_w = lanes.tile_w;
  plan.row_stride = lanes.row_stride;
  plan.tiles_h = lanes.tiles_h;
  plan.tiles_w = lanes.tiles_w;
  plan.images = lanes.images;
  plan.channel_threads = lanes.lanes;
  plan.diagonal_threads = lanes.tile_h;
  plan.threads = lanes.threads;
  plan.weights_in_shared = true;
  plan.fold_in_block = true;
  plan.bias_offset = lanes.bias_offset;
  plan.tile_offset = lanes.image_offset;
  plan.shared_bytes = lanes.shared_bytes;
}

}  // namespace plan_detail

// Shared memory of a block that folds for itself: the inversion, and a copy of the group's weights.
inline int64_t fold_in_block_bytes(const Shape& shape, int64_t state_bytes) {
  if (shape.corner == kIdentity) return 0;
  const int64_t weights = shape.channels * shape.channels * shape.kernel_h * shape.kernel_w;
  return inversion_bytes(shape.channels) + weights * state_bytes;
}

namespace plan_detail {

// Who folds: every block for itself, if the corner is small and `scratch_bytes` of its memory are enough, or a launch.
inline void plan_fold(const Shape& shape, int64_t state_bytes, int64_t scratch_bytes, const DeviceLimits& device,
                      SolvePlan& plan) {
  const int64_t threads = std::min<int64_t>(device.threads_per_block, kMaxThreads);
  const int64_t corner_bytes = shape.corner == kIdentity ? 0 : inversion_bytes(shape.channels);
  plan.fold_in_block = plan.weights_in_shared && fold_in_block_bytes(shape, state_bytes) <= scratch_bytes &&
                       (shape.corner == kIdentity || shape.channels <= kMaxChannelsFoldedInBlock);
  plan.fold_shared_bytes = corner_bytes <= device.shared_bytes ? corner_bytes : 0;
  plan.fold_threads = static_cast<int32_t>(threads);
  plan.fold_blocks = static_cast<int32_t>(std::clamp<int64_t>(
      divide_up(device.multiprocessors, shape.groups), 1, divide_up(plan.folded_elements(shape.channels), threads)));
}

// Sets what the regimes have in common from the plan of kTensor.
inline void copy_tensor_plan(const Shape& shape, int64_t state_bytes, const DeviceLimits& device, SolvePlan& plan) {
  const TensorPlan& tensor = plan.tensor;
  plan.taps_h = static_cast<int32_t>(std::min(shape.kernel_h, shape.height));
  plan.taps_w = static_cast<int32_t>(std::min(shape.kernel_w, shape.width));
  plan.pack = kLaneWeights;
  plan.channel_packs = static_cast<int32_t>(divide_up(shape.channels, kLaneWeights));
  plan.tile_h = static_cast<int32_t>(shape.height);
  plan.tile_w = static_cast<int32_t>(shape.width);
  plan.tiles_h = plan.tiles_w = 1;
  plan.images = tensor.images;
  plan.threads = tensor.threads;
  plan.weights_in_shared = tensor.resident_steps == int64_t{plan.taps_h} * plan.taps_w * tensor.k_steps;
  // The scratch of the fold lies where pixels and sums will.
  plan_fold(shape, state_bytes, device.shared_bytes - tensor.x_offset, device, plan);
  const int64_t fold_bytes = plan.fold_in_block ? fold_in_block_bytes(shape, state_bytes) : 0;
  plan.shared_bytes = std::max(tensor.shared_bytes, tensor.x_offset + fold_bytes);
}

// The plan of kBlock; false when not even one pixel fits.
inline bool plan_block(const Shape& shape, int64_t state_bytes, const DeviceLimits& device, SolvePlan& plan) {
  const int64_t channels = shape.channels;
  const int64_t max_threads = std::min<int64_t>(device.threads_per_block, kMaxThreads);
  plan.taps_h = static_cast<int32_t>(std::min(shape.kernel_h, shape.height));
  plan.taps_w = static_cast<int32_t>(std::min(shape.kernel_w, shape.width));

  // One channel alone is not padded to a full pack, unless the weights must come from global memory.
  plan.pack = channels == 1 ? 1 : static_cast<int32_t>(16 / state_bytes);
  plan.channel_packs = static_cast<int32_t>(divide_up(channels, plan.pack));
  int64_t weight_bytes = round_up(plan.folded_elements(channels) * state_bytes, 16);
  const int64_t bias_bytes = round_up(channels * state_bytes, 16);

  // 1. The whole image with the weights; 2. the whole image without them; 3. tiles, with the weights if these leave
  // at least half of the memory to the tile.
  const bool image_addressable = shape.height * shape.width < (int64_t{1} << 31);
  const int64_t image_bytes =
      image_addressable ? tile_bytes(plan, shape.height, shape.width, state_bytes) : device.shared_bytes + 1;
  const bool whole_image = image_bytes <= device.shared_bytes;
  plan.weights_in_shared = whole_image ? weight_bytes + bias_bytes + image_bytes <= device.shared_bytes
                                       : weight_bytes <= device.shared_bytes / 2;
  if (!plan.weights_in_shared) {
    plan.pack = static_cast<int32_t>(16 / state_bytes);
    plan.channel_packs = static_cast<int32_t>(divide_up(channels, plan.pack));
    weight_bytes = 0;
  }

  int64_t tile_h = shape.height;
  int64_t tile_w = shape.width;
  const int64_t budget = device.shared_bytes - weight_bytes - bias_bytes;
  if (tile_bytes(plan, tile_h, tile_w, state_bytes) > budget || !image_addressable) {
    // A square: the steps of all diagonals together do not depend on its side, and a larger one means fewer launches.
    // But no larger than the threads can follow in one round.
    int64_t side = std::max<int64_t>(max_threads / channels, 1);
    const auto fits = [&](int64_t s) {
      return tile_bytes(plan, std::min(s, shape.height), std::min(s, shape.width), state_bytes) <= budget;
    };
    while (side > 1 && !fits(side)) --side;
    tile_h = std::min(side, shape.height);
    tile_w = std::min(side, shape.width);
    if (!fits(side)) return false;
  }
  plan_fold(shape, state_bytes, budget, device, plan);
  const int64_t fold_bytes = plan.fold_in_block ? fold_in_block_bytes(shape, state_bytes) : 0;
  plan.tile_h = static_cast<int32_t>(tile_h);
  plan.tile_w = static_cast<int32_t>(tile_w);
  plan.row_stride = plan_detail::row_stride(tile_h, tile_w);
  plan.tiles_h = divide_up(shape.height, tile_h);
  plan.tiles_w = divide_up(shape.width, tile_w);

  plan.channel_threads = static_cast<int32_t>(std::min(channels, max_threads));
  plan.diagonal_threads = static_cast<int32_t>(
      std::max<int64_t>(std::min(std::min(tile_h, tile_w), max_threads / plan.channel_threads), 1));
  const int64_t threads_per_image = static_cast<int64_t>(plan.channel_threads) * plan.diagonal_threads;
  const int64_t image_tile_bytes = tile_bytes(plan, tile_h, tile_w, state_bytes);
  plan.images = 1;
  if (plan.single_tile()) {
    const int64_t busy = std::min<int64_t>(kBusyThreads, max_threads) / threads_per_image;
    const int64_t share = divide_up(shape.batch * shape.groups, std::max(device.multiprocessors, 1));
    plan.images = static_cast<int32_t>(
        std::max<int64_t>(std::min({busy, share, std::max<int64_t>(shape.batch, 1), budget / image_tile_bytes}), 1));
  }
  // Whole warps, one at least: the pivot search of the fold is the work of a warp.
  plan.threads = static_cast<int32_t>(round_up(threads_per_image * plan.images, 32));
  plan.bias_offset = weight_bytes;
  plan.tile_offset = weight_bytes + bias_bytes;
  plan.shared_bytes = plan.tile_offset + std::max(plan.images * image_tile_bytes, fold_bytes);
  return true;
}

}  // namespace plan_detail

// The regime that was predicted to be fastest (docs/notes/predictions.md; unmeasured), among those that can be used.
inline SolveRegime choose_regime(const Shape& shape, int64_t state_bytes, const DeviceLimits& device, SolvePlan& plan) {
  const auto wants = [&](SolveRegime regime) {
    return device.forced_regime < 0 || device.forced_regime == static_cast<int32_t>(regime);
  };
  const bool is_forced = device.forced_regime >= 0;
  if (wants(SolveRegime::kLanes) &&
      plan_lanes(shape, state_bytes, fold_in_block_bytes(shape, state_bytes), device, plan.lanes)) {
    return SolveRegime::kLanes;
  }
  if (wants(SolveRegime::kTensor) && (is_forced || shape.channels >= kMinTensorChannels) &&
      plan_tensor(shape, state_bytes, device, plan.tensor)) {
    return SolveRegime::kTensor;
  }
  return SolveRegime::kBlock;
}

// False when not even one pixel fits: more channels in a group than the block's shared memory holds.
inline bool plan_solve(const Shape& shape, int64_t state_bytes, const DeviceLimits& device, SolvePlan& plan) {
  plan = {};
  plan.regime = choose_regime(shape, state_bytes, device, plan);
  switch (plan.regime) {
    case SolveRegime::kLanes:
      plan_detail::copy_lanes_plan(shape, plan);
      return true;
    case SolveRegime::kTensor:
      plan_detail::copy_tensor_plan(shape, state_bytes, device, plan);
      return true;
    default:
      return plan_detail::plan_block(shape, state_bytes, device, plan);
  }
}

}  // namespace inverse_flow
