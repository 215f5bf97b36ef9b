// How a problem is laid over the GPU: problem and device limits in, tile, threads and shared memory out. Plain C++,
// no CUDA and no torch, so that the tests can read every plan on a machine without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "limits.h"
#include "plan_tensor.h"

namespace inverse_flow {

// Which kernel solves: solve.cuh (any problem), solve_tensor.cuh.
enum class SolveRegime : int32_t { kBlock, kLanes, kTensor };

// Registers: 65536 of them over 640 threads leave 96 each; the solve spills with the 64 that 1024 threads would leave.
constexpr int32_t kMaxThreads = 640;
// Several small images share a block until it has this many threads: eight warps hide each other's latency.
constexpr int32_t kBusyThreads = 256;
// A corner this small is inverted by every block for itself, which spares a launch; beyond it the cubic work in
// double precision, repeated a block, would cost more than the launch.
constexpr int32_t kMaxChannelsFoldedInBlock = 16;

struct SolvePlan {
  SolveRegime regime;
  TensorPlan tensor;  // of kTensor, whose one tile is the image
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

// Scratch of one corner inversion beside the matrix: a row and a column in double, two permutations, one pivot.
INVERSE_FLOW_HOST_DEVICE constexpr int64_t inversion_scratch_bytes(int64_t channels) {
  return channels * (8 + 8 + 4 + 4) + 8;
}

namespace plan_detail {

// An even stride: neighbours on an anti-diagonal are then an odd number of pixels apart, and so in different banks.
inline int32_t row_stride(int64_t tile_h, int64_t tile_w) {
  return static_cast<int32_t>(tile_h > 1 && tile_w > 1 ? round_up(tile_w, 2) : tile_w);
}

inline int64_t tile_bytes(const SolvePlan& plan, int64_t tile_h, int64_t tile_w, int64_t state_bytes) {
  return tile_h * row_stride(tile_h, tile_w) * plan.channel_packs * plan.pack * state_bytes;
}

}  // namespace plan_detail

// The regime that the cost model (docs/cost-model.md) finds fastest, among those that can be used.
inline SolveRegime choose_regime(const Shape& shape, int64_t state_bytes, const DeviceLimits& device) {
  TensorPlan tensor{};
  const bool tensor_fits = plan_tensor(shape, state_bytes, device, tensor);
  if (device.forced_regime == static_cast<int32_t>(SolveRegime::kTensor) && tensor_fits) return SolveRegime::kTensor;
  if (device.forced_regime >= 0) return SolveRegime::kBlock;
  return tensor_fits && shape.channels >= kMinTensorChannels ? SolveRegime::kTensor : SolveRegime::kBlock;
}

// False when not even one pixel fits: more channels in a group than the block's shared memory holds.
inline bool plan_solve(const Shape& shape, int64_t state_bytes, const DeviceLimits& device, SolvePlan& plan) {
  using plan_detail::tile_bytes;
  const int64_t channels = shape.channels;
  const int64_t max_threads = std::min<int64_t>(device.threads_per_block, kMaxThreads);
  plan.regime = SolveRegime::kBlock;
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
  int64_t fold_bytes = shape.corner == kIdentity ? 0 : channels * channels * 8 + inversion_scratch_bytes(channels);
  plan.fold_in_block = plan.weights_in_shared && fold_bytes <= budget &&
                       (shape.corner == kIdentity || channels <= kMaxChannelsFoldedInBlock);
  plan.fold_shared_bytes = fold_bytes <= device.shared_bytes ? fold_bytes : 0;
  plan.fold_threads = static_cast<int32_t>(max_threads);
  if (!plan.fold_in_block) fold_bytes = 0;
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

  plan.regime = choose_regime(shape, state_bytes, device);
  if (plan.regime == SolveRegime::kTensor) {
    plan_tensor(shape, state_bytes, device, plan.tensor);
    const TensorPlan& tensor = plan.tensor;
    // The scratch of the inversion lies where pixels and sums will.
    plan.weights_in_shared = tensor.resident_steps == int64_t{plan.taps_h} * plan.taps_w * tensor.k_steps;
    plan.fold_in_block = plan.weights_in_shared && plan.fold_shared_bytes <= tensor.shared_bytes - tensor.x_offset &&
                         (shape.corner == kIdentity || channels <= kMaxChannelsFoldedInBlock);
    plan.pack = kLaneWeights;
    plan.channel_packs = static_cast<int32_t>(divide_up(channels, plan.pack));
    plan.tile_h = static_cast<int32_t>(shape.height);
    plan.tile_w = static_cast<int32_t>(shape.width);
    plan.tiles_h = plan.tiles_w = 1;
    plan.channel_threads = plan.diagonal_threads = 0;
    plan.images = tensor.images;
    plan.threads = tensor.threads;
    plan.shared_bytes = tensor.shared_bytes;
  }
  plan.fold_blocks = static_cast<int32_t>(std::clamp<int64_t>(divide_up(device.multiprocessors, shape.groups), 1,
                                                              divide_up(plan.folded_elements(channels), max_threads)));
  return true;
}

// ---- The weight gradient ----

// Columns of taps that a thread accumulates side by side in registers: one load serves them all.
constexpr int32_t kTapColumns = 4;

struct GradientPlan {
  int32_t taps_h;
  int32_t taps_w;
  // A block accumulates, over its share of the pixels, block_outputs x block_inputs channel pairs times a window of
  // window_h x window_w taps.
  int32_t block_outputs;
  int32_t block_inputs;
  int32_t window_h;
  int32_t window_w;
  int64_t output_blocks;
  int64_t input_blocks;
  int64_t windows_h;
  int64_t windows_w;
  // Pixels come in tiles; teams of threads share a tile's rows.
  int32_t tile_h;
  int32_t tile_w;
  int64_t tiles_h;
  int64_t tiles_w;
  int32_t teams;
  int32_t threads;
  int64_t splits;  // blocks that share the pixels of one window; their partial sums are added in a second launch
  int64_t right_offset;
  int64_t shared_bytes;

  INVERSE_FLOW_HOST_DEVICE int64_t items() const {  // threads of a team
    return static_cast<int64_t>(block_outputs) * block_inputs * window_h * divide_up(window_w, kTapColumns);
  }
  INVERSE_FLOW_HOST_DEVICE int64_t window_pitch() const { return round_up(window_w, kTapColumns); }
  INVERSE_FLOW_HOST_DEVICE int64_t pixel_tiles(int64_t batch) const { return batch * tiles_h * tiles_w; }
  INVERSE_FLOW_HOST_DEVICE int64_t blocks() const { return output_blocks * input_blocks * windows_h * windows_w; }
};

// Most outputs of one block (registers: eight accumulators a thread, and a window), and the shared memory that any
// GPU gives without opting in.
constexpr int32_t kGradientThreads = 512;
constexpr int32_t kGradientBlockChannels = 16;
constexpr int64_t kGradientSharedBytes = 48 * 1024;

inline GradientPlan plan_weight_gradient(const Shape& shape, int64_t state_bytes, const DeviceLimits& device) {
  GradientPlan plan{};
  const int64_t max_threads = std::min<int64_t>(device.threads_per_block, kGradientThreads);
  plan.taps_h = static_cast<int32_t>(std::min(shape.kernel_h, shape.height));
  plan.taps_w = static_cast<int32_t>(std::min(shape.kernel_w, shape.width));
  int64_t block_channels = std::min<int64_t>(shape.channels, kGradientBlockChannels);
  while (block_channels * block_channels > max_threads) --block_channels;
  plan.block_outputs = plan.block_inputs = static_cast<int32_t>(block_channels);
  plan.output_blocks = plan.input_blocks = divide_up(shape.channels, block_channels);

  const int64_t pairs = block_channels * block_channels;
  const bool whole_rows = pairs * divide_up(plan.taps_w, kTapColumns) <= max_threads;
  plan.window_w = whole_rows ? plan.taps_w : kTapColumns;
  const int64_t row_items = pairs * divide_up(plan.window_w, kTapColumns);
  plan.window_h = static_cast<int32_t>(std::clamp<int64_t>(max_threads / row_items, 1, plan.taps_h));

  const int64_t shared_limit = std::min(kGradientSharedBytes, device.shared_bytes);
  const auto right_pixels = [&] { return (plan.tile_h + plan.window_h - 1) * (plan.tile_w + plan.window_pitch() - 1); };
  const auto bytes = [&] {
    return round_up(static_cast<int64_t>(plan.tile_h) * plan.tile_w * plan.block_outputs * state_bytes, 16) +
           right_pixels() * plan.block_inputs * state_bytes;
  };
  plan.tile_h = static_cast<int32_t>(std::min<int64_t>(shape.height, 16));
  plan.tile_w = static_cast<int32_t>(std::min<int64_t>(shape.width, 32));
  // Too large: first smaller tiles, down to a few pixels, then smaller windows, then single pixels.
  while (bytes() > shared_limit && plan.tile_h * plan.tile_w > 16) {
    if (plan.tile_h >= plan.tile_w) {
      plan.tile_h = (plan.tile_h + 1) / 2;
    } else {
      plan.tile_w = (plan.tile_w + 1) / 2;
    }
  }
  while (bytes() > shared_limit && plan.window_h > 1) plan.window_h = (plan.window_h + 1) / 2;
  if (bytes() > shared_limit) plan.window_w = std::min(plan.window_w, kTapColumns);
  while (bytes() > shared_limit && plan.tile_w > 1) plan.tile_w = (plan.tile_w + 1) / 2;
  while (bytes() > shared_limit && plan.tile_h > 1) plan.tile_h = (plan.tile_h + 1) / 2;

  plan.windows_h = divide_up(plan.taps_h, plan.window_h);
  plan.windows_w = divide_up(plan.taps_w, plan.window_w);
  plan.tiles_h = divide_up(shape.height, plan.tile_h);
  plan.tiles_w = divide_up(shape.width, plan.tile_w);
  const int64_t busy = std::min<int64_t>(kBusyThreads, max_threads);
  plan.teams = static_cast<int32_t>(std::clamp<int64_t>(busy / plan.items(), 1, plan.tile_h));
  plan.threads = static_cast<int32_t>(round_up(plan.items() * plan.teams, 32));
  // Two blocks a multiprocessor in all, but none without a pixel tile.
  const int64_t wanted = divide_up(2 * device.multiprocessors, plan.blocks() * shape.groups);
  plan.splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(plan.pixel_tiles(shape.batch), 1));
  plan.right_offset = round_up(static_cast<int64_t>(plan.tile_h) * plan.tile_w * plan.block_outputs * state_bytes, 16);
  // The teams' sums meet in the same memory.
  plan.shared_bytes = std::max(bytes(), plan.teams * plan.items() * kTapColumns * state_bytes);
  return plan;
}

}  // namespace inverse_flow
