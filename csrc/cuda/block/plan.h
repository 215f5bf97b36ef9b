// The plan of the regime "block" (kernel.cuh): a block on a tile of an image, or on several small images. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "../common/device_limits.h"
#include "../common/fold.h"
#include "../common/orders.h"
#include "../common/problem.h"

namespace inverse_flow {

// Several small images share a block until it has this many threads: eight warps hide each other's latency. Unmeasured.
constexpr int32_t kBusyThreads = 256;

struct BlockPlan {
  PackedTaps taps;
  FoldPlan fold;
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
  // Shared memory, in bytes: weights (if any), bias, tile.
  int64_t bias_offset;
  int64_t tile_offset;
  int64_t shared_bytes;

  INVERSE_FLOW_HOST_DEVICE bool single_tile() const { return tiles_h == 1 && tiles_w == 1; }

  // Later tiles read the earlier ones unrounded.
  bool needs_state() const { return !single_tile(); }
  int64_t workspace_bytes(const Shape& shape, int64_t state_bytes) const {
    return fold.workspace_bytes(shape, taps.elements(), state_bytes);
  }
  // One for each diagonal of tiles.
  int64_t launches(const Shape& shape, const int64_t* orders) const {
    const int64_t batches = divide_up(shape.batch, kMaxGridX * images);
    return group_chunks(shape, orders) * (fold.launches(shape) + (tiles_h + tiles_w - 1) * batches);
  }

  // Calls see(name, values...) for every fact of the plan.
  template <typename See>
  void visit(const Shape& shape, int64_t state_bytes, const See& see) const {
    see("regime", std::string(single_tile() ? "images in a block" : "tiles") + ", weights in " +
                      (weights_in_shared ? "shared memory" : "global memory"));
    see("tile", tile_h, tile_w);
    see("tiles", tiles_h, tiles_w);
    see("images", images);
    see("pack", taps.pack);
    see("channel_threads", channel_threads);
    see("diagonal_threads", diagonal_threads);
    see("bands", 0);
    see("steps", taps.taps_h * taps.taps_w > 1 ? tile_h + tile_w - 1 : 0);
    see("threads", threads);
    see("blocks", divide_up(shape.batch, images) * shape.groups * std::min(tiles_h, tiles_w));
    see("shared_bytes", shared_bytes);
    see("weights_in_shared", weights_in_shared);
    see("folded_bytes", taps.elements() * shape.groups * state_bytes);
    see("fold_launches", fold.launches(shape));
    see("fold_blocks", fold.in_block ? 0 : fold.blocks * shape.groups);
  }
};

// Nothing when not even one pixel fits: more channels in a group than the block's shared memory holds.
inline std::optional<BlockPlan> plan_block(const Shape& shape, int64_t state_bytes, const DeviceLimits& device) {
  const int64_t channels = shape.channels;
  const int64_t max_threads = std::min<int64_t>(device.threads_per_block, kMaxThreads);
  BlockPlan plan{};
  // One channel alone is not padded to a full pack, unless the weights must come from global memory.
  plan.taps = packed_taps(shape, channels == 1 ? 1 : 16 / state_bytes);
  int64_t weight_bytes = round_up(plan.taps.elements() * state_bytes, 16);
  const int64_t bias_bytes = round_up(channels * state_bytes, 16);
  // An even stride: neighbours on an anti-diagonal are then an odd number of pixels apart, and so in different banks.
  const auto row_stride = [](int64_t tile_h, int64_t tile_w) {
    return tile_h > 1 && tile_w > 1 ? round_up(tile_w, 2) : tile_w;
  };
  const auto tile_bytes = [&](int64_t tile_h, int64_t tile_w) {
    return tile_h * row_stride(tile_h, tile_w) * plan.taps.inputs() * state_bytes;
  };

  // 1. The whole image with the weights; 2. the whole image without them; 3. tiles, with the weights if these leave
  // at least half of the memory to the tile.
  const bool image_addressable = shape.height * shape.width < (int64_t{1} << 31);
  const int64_t image_bytes = image_addressable ? tile_bytes(shape.height, shape.width) : device.shared_bytes + 1;
  const bool whole_image = image_bytes <= device.shared_bytes;
  plan.weights_in_shared = whole_image ? weight_bytes + bias_bytes + image_bytes <= device.shared_bytes
                                       : weight_bytes <= device.shared_bytes / 2;
  if (!plan.weights_in_shared) {
    plan.taps = packed_taps(shape, 16 / state_bytes);
    weight_bytes = 0;
  }

  int64_t tile_h = shape.height;
  int64_t tile_w = shape.width;
  const int64_t budget = device.shared_bytes - weight_bytes - bias_bytes;
  if (!image_addressable || tile_bytes(tile_h, tile_w) > budget) {
    // A square: the steps of all diagonals together do not depend on its side, and a larger one means fewer launches.
    // But no larger than the threads can follow in one round.
    int64_t side = std::max<int64_t>(max_threads / channels, 1);
    const auto fits = [&] { return tile_bytes(std::min(side, shape.height), std::min(side, shape.width)) <= budget; };
    while (side > 1 && !fits()) --side;
    if (!fits()) return std::nullopt;
    tile_h = std::min(side, shape.height);
    tile_w = std::min(side, shape.width);
  }
  plan.fold = plan_fold(shape, state_bytes, plan.taps.elements(), plan.weights_in_shared, budget, device);
  plan.tile_h = static_cast<int32_t>(tile_h);
  plan.tile_w = static_cast<int32_t>(tile_w);
  plan.row_stride = static_cast<int32_t>(row_stride(tile_h, tile_w));
  plan.tiles_h = divide_up(shape.height, tile_h);
  plan.tiles_w = divide_up(shape.width, tile_w);

  plan.channel_threads = static_cast<int32_t>(std::min(channels, max_threads));
  plan.diagonal_threads = static_cast<int32_t>(
      std::max<int64_t>(std::min(std::min(tile_h, tile_w), max_threads / plan.channel_threads), 1));
  const int64_t threads_per_image = static_cast<int64_t>(plan.channel_threads) * plan.diagonal_threads;
  const int64_t image_tile_bytes = tile_bytes(tile_h, tile_w);
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
  plan.shared_bytes = plan.tile_offset + std::max(plan.images * image_tile_bytes, plan.fold.scratch_bytes);
  return plan;
}

}  // namespace inverse_flow
