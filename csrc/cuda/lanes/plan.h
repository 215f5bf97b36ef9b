// The plan of the regime "lanes" (kernel.cuh): few channels per group, a warp on a band of rows. Plain C++.
//
// The numbers here follow from registers, banks and counted steps; on a GPU they are unmeasured.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../common/device_limits.h"
#include "../common/fold.h"
#include "../common/orders.h"
#include "../common/problem.h"

namespace inverse_flow {

// Most threads of a block. 65536 registers over 256 threads leave 255 each, which hold the weights of a lane. From 9
// channels on a warp has but two rows, so a block has more warps, and a thread 168 registers.
constexpr int32_t kLanesThreads = 256;
constexpr int32_t kManyLanesThreads = 384;
// A tile of an image too large for one block has so many bands, as a multiprocessor has schedulers, one warp for each;
// and more of them if that is less than so many rows: of low bands not all are at work at a time.
constexpr int32_t kLanesTileBands = 4;
constexpr int64_t kLanesLeastTileHeight = 32;
// Bands of a block advance by so many columns between barriers, or by as many as a band has rows. Fewer would cost more
// barriers, more would let a band wait longer for the one above it.
constexpr int32_t kLanesLongestPhase = 8;
// Narrower tiles would spend most steps on filling and draining the lanes.
constexpr int64_t kLanesLeastTileWidth = 16;

// What one access to global memory moves.
enum class Access : int32_t {
  kValue,
  kPixels,    // kAccessWidth neighbours of a row, of one channel
  kChannels,  // kAccessWidth channels of one pixel, as channels_last has them
};
// 16 bytes of float, and 8 of the half types, since twice as many pixels would double what a thread holds in registers.
constexpr int32_t kAccessWidth = 4;
INVERSE_FLOW_HOST_DEVICE constexpr int32_t pixels_of(Access access) {
  return access == Access::kPixels ? kAccessWidth : 1;
}
INVERSE_FLOW_HOST_DEVICE constexpr int32_t channels_of(Access access) {
  return access == Access::kChannels ? kAccessWidth : 1;
}

// Kernels are compiled for square windows of 2, 3 and 5 taps and up to so many channels per group: beyond, the weights
// of a lane no longer fit its registers, or a pixel has more channels than lanes.
INVERSE_FLOW_HOST_DEVICE constexpr int32_t lanes_most_channels(int64_t taps) {
  return taps == 2 ? 8 : taps == 3 ? 12 : taps == 5 ? 2 : 0;
}
// Lanes that share the output channels of a pixel; with 9 to 12 channels the last ones have none.
INVERSE_FLOW_HOST_DEVICE constexpr int32_t lanes_of_pixel(int32_t channels) {
  return channels <= 2 ? 1 : channels <= 4 ? 2 : channels <= 8 ? 8 : 16;
}
// Output channels of a lane.
INVERSE_FLOW_HOST_DEVICE constexpr int32_t outputs_of_lane(int32_t channels) {
  return static_cast<int32_t>(divide_up(channels, lanes_of_pixel(channels)));
}
// Floats of a pixel in shared memory: those of its lanes, or whole accesses of 16 bytes if that is less.
INVERSE_FLOW_HOST_DEVICE constexpr int32_t pitch_of_pixel(int32_t channels) {
  const int32_t lanes = lanes_of_pixel(channels) * outputs_of_lane(channels);
  const int32_t accesses = static_cast<int32_t>(divide_up(channels, 4)) * 4;
  return lanes < accesses ? lanes : accesses;
}
INVERSE_FLOW_HOST_DEVICE constexpr int32_t lanes_threads(int32_t channels) {
  return channels <= 8 ? kLanesThreads : kManyLanesThreads;
}
// Rows of a band: those of a warp.
INVERSE_FLOW_HOST_DEVICE constexpr int32_t rows_of_band(int32_t channels) { return 32 / lanes_of_pixel(channels); }
// Steps of a phase.
INVERSE_FLOW_HOST_DEVICE constexpr int32_t steps_of_phase(int32_t channels) {
  return rows_of_band(channels) < kLanesLongestPhase ? rows_of_band(channels) : kLanesLongestPhase;
}

struct LanesPlan {
  PackedTaps taps;
  int32_t lanes;            // of a pixel
  int32_t channel_pitch;    // floats of a pixel in shared memory
  int32_t rows;             // of a band
  int32_t bands;            // of an image, or of a tile
  int32_t band_warps;       // warps of an image, or of a tile, which take its bands in turn
  int32_t images_per_warp;  // whole images side by side in a warp; 1 if an image has several bands
  int32_t images;           // whole images of a block; 1 when an image has several tiles
  int32_t sweep_warps;
  int32_t threads;
  // The tile of a block. Shared memory holds it with a margin of solved rows above and columns to its left if the image
  // has several tiles; rows are row_stride pixels apart.
  int32_t tile_h;
  int32_t tile_w;
  int32_t margin_h;
  int32_t margin_w;
  int32_t row_stride;
  int64_t tiles_h;
  int64_t tiles_w;
  // Steps go by in phases; every band starts `lag` phases after the band above it.
  int32_t phase_steps;
  int32_t band_phases;
  int32_t lag;
  // Shared memory, in bytes: weights, bias, a pixel of zeros, then the images (before them, in the same place, the
  // fold's scratch).
  int64_t bias_offset;
  int64_t zeros_offset;
  int64_t image_offset;
  int64_t shared_bytes;

  INVERSE_FLOW_HOST_DEVICE bool single_tile() const { return tiles_h == 1 && tiles_w == 1; }
  INVERSE_FLOW_HOST_DEVICE int64_t tiles() const { return tiles_h * tiles_w; }
  // Phases of the whole block; a barrier stands between them if there are several bands.
  INVERSE_FLOW_HOST_DEVICE int32_t phases() const { return band_phases + (bands - 1) * lag; }
  INVERSE_FLOW_HOST_DEVICE int32_t steps() const { return phases() * phase_steps; }
  INVERSE_FLOW_HOST_DEVICE int64_t image_elements() const {
    return static_cast<int64_t>(tile_h + margin_h) * row_stride * channel_pitch;
  }

  // Later tiles read the earlier ones unrounded.
  bool needs_state() const { return !single_tile(); }
  // The tickets of the groups and the flags of the tiles, for images of several tiles.
  int64_t workspace_bytes(const Shape& shape, int64_t) const {
    return single_tile() ? 0 : shape.groups * (1 + shape.batch * tiles()) * static_cast<int64_t>(sizeof(int32_t));
  }
  // All tiles are one launch; the flags by which they wait for each other are cleared before it.
  int64_t launches(const Shape& shape, const int64_t* orders) const {
    const int64_t chunks = group_chunks(shape, orders);
    return single_tile() ? chunks * divide_up(shape.batch, kMaxGridX * images) : chunks + 1;
  }

  // Calls see(name, values...) for every fact of the plan.
  template <typename See>
  void visit(const Shape& shape, int64_t state_bytes, const See& see) const {
    see("regime", single_tile() ? "rows as lanes, images in a block" : "rows as lanes, tiles");
    see("tile", tile_h, tile_w);
    see("tiles", tiles_h, tiles_w);
    see("images", images);
    see("images_per_warp", images_per_warp);
    see("pack", taps.pack);
    see("channel_threads", lanes);
    see("diagonal_threads", tile_h);
    see("bands", bands);
    see("phases", phases());
    see("steps", steps());
    see("threads", threads);
    see("blocks", divide_up(shape.batch, images) * shape.groups * tiles());
    see("shared_bytes", shared_bytes);
    see("weights_in_shared", true);
    see("folded_bytes", taps.elements() * shape.groups * state_bytes);
    see("fold_launches", 0);
    see("fold_blocks", 0);
  }
};

namespace plan_detail {

// Cuts a tile into bands of about the same height: the lower they are, the earlier the next one starts. False when a
// band would have to wait until its warp is ready with the one before.
inline bool set_bands(LanesPlan& plan, int64_t tile_h, int64_t tile_w, int32_t channels, int64_t max_warps) {
  plan.bands = static_cast<int32_t>(divide_up(tile_h, rows_of_band(channels)));
  plan.rows = static_cast<int32_t>(divide_up(tile_h, plan.bands));
  plan.band_warps = static_cast<int32_t>(std::min<int64_t>(plan.bands, max_warps));
  plan.phase_steps = steps_of_phase(channels);
  plan.band_phases = static_cast<int32_t>(divide_up(tile_w + plan.margin_w + plan.rows - 1, plan.phase_steps));
  // The last row of a band is `rows` - 1 steps behind its first, and the band below needs it a phase ahead.
  plan.lag = static_cast<int32_t>(divide_up(plan.rows - 1, plan.phase_steps)) + 1;
  return plan.bands == plan.band_warps || plan.band_phases <= plan.band_warps * plan.lag;
}

}  // namespace plan_detail

// Nothing when the regime has no kernel for the problem, or a block no room.
inline std::optional<LanesPlan> plan_lanes(const Shape& shape, int64_t state_bytes, const DeviceLimits& device) {
  LanesPlan plan{};
  // A kernel clipped by the image is none of those compiled.
  const bool square = shape.kernel_h == shape.kernel_w && shape.kernel_h <= std::min(shape.height, shape.width);
  const int64_t taps = shape.kernel_h;
  if (state_bytes != 4 || !square || shape.channels > lanes_most_channels(taps)) return std::nullopt;
  const int32_t channels = static_cast<int32_t>(shape.channels);
  plan.taps = packed_taps(shape, 1);
  plan.lanes = lanes_of_pixel(channels);
  plan.channel_pitch = pitch_of_pixel(channels);
  const int64_t most_rows = rows_of_band(channels);

  const int64_t max_warps = std::min<int64_t>(device.threads_per_block, lanes_threads(channels)) / 32;
  plan.bias_offset = round_up(taps * taps * channels * channels * state_bytes, 16);
  plan.zeros_offset = plan.bias_offset + round_up(channels * state_bytes, 16);
  plan.image_offset = plan.zeros_offset + round_up(plan.channel_pitch * state_bytes, 16);
  const int64_t budget = device.shared_bytes - plan.image_offset;
  const int64_t fold_bytes = fold_in_block_bytes(shape, state_bytes);
  if (fold_bytes > budget) return std::nullopt;
  // Lanes of neighbouring rows are one column apart. With an even stride their addresses differ by an odd number of
  // pixels, and so fall in different banks.
  const auto bytes = [&](int64_t rows, int64_t columns) {
    return rows * round_up(columns, 2) * plan.channel_pitch * state_bytes;
  };

  int64_t tile_h = shape.height;
  int64_t tile_w = shape.width;
  const bool addressable = shape.height < (int64_t{1} << 20) && shape.width < (int64_t{1} << 20);
  if (!addressable || bytes(tile_h, tile_w) > budget ||
      !plan_detail::set_bands(plan, tile_h, tile_w, channels, max_warps)) {
    // About square: the steps of all tile diagonals together do not depend on its side, and a larger one means fewer
    // waits for other blocks.
    plan.margin_h = plan.margin_w = static_cast<int32_t>(taps - 1);
    const auto cut_into_tiles = [&](int64_t bands) {
      const int64_t side = most_rows * bands;
      tile_h = std::min(side, shape.height);
      tile_w = std::min(side, shape.width);
      const auto fits = [&] { return bytes(tile_h + plan.margin_h, tile_w + plan.margin_w) <= budget; };
      while (tile_w > kLanesLeastTileWidth && !fits()) tile_w = std::max(tile_w / 2, kLanesLeastTileWidth);
      while (tile_h > most_rows && !fits()) tile_h = (tile_h - 1) / most_rows * most_rows;
      if (!fits() || tile_h < plan.margin_h || tile_w < plan.margin_w) return false;
      // As many tiles of about the same size: a remainder of one row or column would take a tile's time of its own.
      tile_h = divide_up(shape.height, divide_up(shape.height, tile_h));
      tile_w = std::min(tile_w, round_up(divide_up(shape.width, divide_up(shape.width, tile_w)), kAccessWidth));
      return plan_detail::set_bands(plan, tile_h, tile_w, channels, max_warps);
    };
    const int64_t tile_bands = std::max<int64_t>(kLanesTileBands, kLanesLeastTileHeight / most_rows);
    // More bands than warps only where none of these has to wait.
    if (!cut_into_tiles(tile_bands) && !cut_into_tiles(std::min(tile_bands, max_warps))) return std::nullopt;
  }
  plan.tile_h = static_cast<int32_t>(tile_h);
  plan.tile_w = static_cast<int32_t>(tile_w);
  plan.row_stride = static_cast<int32_t>(round_up(tile_w + plan.margin_w, 2));
  plan.tiles_h = divide_up(shape.height, tile_h);
  plan.tiles_w = divide_up(shape.width, tile_w);

  plan.images_per_warp = plan.bands == 1 ? static_cast<int32_t>(most_rows / tile_h) : 1;
  plan.images = 1;
  if (plan.single_tile()) {
    // As many images as fill the multiprocessors, and no more than the warps of a block sweep at once.
    const int64_t share = divide_up(shape.batch * shape.groups, std::max(device.multiprocessors, 1));
    const int64_t most = max_warps / plan.band_warps * plan.images_per_warp;
    const int64_t image_bytes = plan.image_elements() * state_bytes;
    plan.images = static_cast<int32_t>(
        std::max<int64_t>(std::min({share, most, std::max<int64_t>(shape.batch, 1), budget / image_bytes}), 1));
  }
  plan.sweep_warps = static_cast<int32_t>(divide_up(plan.images, plan.images_per_warp) * plan.band_warps);
  // Loading and storing are the work of all threads, a pixel each; so is the fold, a weight each.
  const int64_t pixels = static_cast<int64_t>(plan.images) * plan.tile_h * plan.tile_w;
  const int64_t items = std::max(pixels, taps * taps * channels * channels);
  plan.threads =
      static_cast<int32_t>(32 * std::max<int64_t>(plan.sweep_warps, std::min(max_warps, divide_up(items, 32))));

  plan.shared_bytes =
      plan.image_offset + std::max(plan.images * plan.image_elements() * state_bytes, round_up(fold_bytes, 16));
  return plan;
}

}  // namespace inverse_flow
