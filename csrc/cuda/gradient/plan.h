// The plan of the gradient of weight and bias, with tensor cores or without. Plain C++.
//
// One layout serves both kernels. A strip is what one accumulator row of a thread (SIMT: kTapColumns neighbouring taps
// of a row) or of a warp (tensor cores: a tap) covers. A block owns some channel pairs, a window of strips, and every
// splits-th pixel tile of the batch. Windows shrink, rather than splits grow, where the blocks' partial sums would take
// more than a tenth of the images' memory; without splits a block writes the gradient itself, and nothing is added up.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/device_limits.h"
#include "../common/orders.h"
#include "../common/problem.h"

namespace inverse_flow {

// SIMT: columns of taps that a thread accumulates side by side, so that one load of `right` serves them all. Three: the
// usual window is filled, and the window of the last three values costs nothing but registers.
constexpr int32_t kTapColumns = 3;
// Columns of a row that a team takes at a time: enough that filling the window of the last values is a small part.
constexpr int32_t kSegmentColumns = 8;
// SIMT: threads of a block. 65536 registers over two blocks of them, which hide each other's loads, leave 168 each, for
// twice 48 sums; and 16 channels with a 3 x 3 window make 48 threads a team.
constexpr int32_t kGradientThreads = 192;
// SIMT: channels of a block, at most; and the tile's pixels.
constexpr int32_t kGradientBlockChannels = 16;
constexpr int64_t kGradientTilePixels = 512;

// Tensor cores: mma.m16n8k8, so a warp owns 16 outputs x 8 inputs, and eight pixels are a step.
constexpr int32_t kFragmentOutputs = 16;
constexpr int32_t kFragmentInputs = 8;
constexpr int32_t kFragmentPixels = 8;
constexpr int32_t kGradientTensorThreads = 256;  // of a block: 128 registers each with two blocks
// Taps of a warp: a 3 x 3 window. Its 36 accumulators, and as many totals, fill half the registers.
constexpr int32_t kFragmentTaps = 9;
// From 16 channels the three TF32 products of padded channels should take less time than one product in float32 does.
// Unmeasured.
constexpr int64_t kMinGradientTensorChannels = 16;
constexpr int64_t kTensorTilePixels = 256;
// The tile that is used, and the next, which is on its way meanwhile.
constexpr int64_t kTileBuffers = 2;
// What a multiprocessor keeps of its shared memory for each block.
constexpr int64_t kReservedSharedBytes = 1024;
// Instructions of a warp of the tensor core kernel, unmeasured: see tensor_cycles. Those of a step and of its taps are
// in the machine code (tools/sass_counts.py: 44 with one tap, 153 with nine); those of a copy were counted by hand.
constexpr double kStepInstructions = 30;
constexpr double kTapInstructions = 14;
constexpr double kCopyInstructions = 6;
// The partial sums may take 1 / kWorkspaceShare of the images' bytes.
constexpr int64_t kWorkspaceShare = 10;

// Elements of the gradients of weight and bias of all groups.
INVERSE_FLOW_HOST_DEVICE inline int64_t gradient_elements(const Shape& shape) {
  return shape.groups * shape.channels * (shape.channels * shape.kernel_h * shape.kernel_w + 1);
}

struct GradientPlan {
  bool tensor_cores;
  int32_t taps_h;
  int32_t taps_w;
  int32_t strip;  // taps of a strip
  int32_t side;   // SIMT: outputs, and inputs, of a thread
  // A block accumulates block_outputs x block_inputs channel pairs times a window of window_h rows of window_w strips.
  int32_t block_outputs;
  int32_t block_inputs;
  int32_t window_h;
  int32_t window_w;
  int64_t output_blocks;
  int64_t input_blocks;
  int64_t windows_h;
  int64_t windows_w;
  // Pixels come in tiles of some rows and columns of some images.
  int32_t images;
  int32_t tile_h;
  int32_t tile_w;
  int64_t image_tiles;
  int64_t tiles_h;
  int64_t tiles_w;
  // State elements, in shared memory, from a pixel to the next (SIMT) or from a channel to the next (tensor cores).
  int32_t left_pitch;
  int32_t right_pitch;
  // Threads (SIMT) or warps (tensor cores) of a team; teams share a tile's pixels.
  int32_t items;
  int32_t teams;
  int32_t threads;
  int64_t splits;         // blocks that share the pixels of one window
  int32_t combine_lanes;  // threads that add up an entry of the splits' sums
  // Shared memory, in bytes: kTileBuffers times left and right, and for tensor cores where in `right` each pixel
  // stands. The sums of teams meet in the same memory.
  int64_t right_offset;
  int64_t buffer_bytes;
  int64_t positions_offset;
  int64_t shared_bytes;
  // Tensor cores: where in `right` the value of the window's tap v stands, in bytes from that of the first tap: before
  // it, so 0 or less.
  int32_t tap_bytes[kFragmentTaps];

  INVERSE_FLOW_HOST_DEVICE int32_t pixels() const { return images * tile_h * tile_w; }
  INVERSE_FLOW_HOST_DEVICE int32_t margin_h() const { return window_h - 1; }
  INVERSE_FLOW_HOST_DEVICE int32_t margin_w() const { return window_w * strip - 1; }
  INVERSE_FLOW_HOST_DEVICE int32_t right_rows() const { return tile_h + margin_h(); }
  INVERSE_FLOW_HOST_DEVICE int32_t right_columns() const { return tile_w + margin_w(); }
  INVERSE_FLOW_HOST_DEVICE int64_t pixel_tiles() const { return image_tiles * tiles_h * tiles_w; }
  INVERSE_FLOW_HOST_DEVICE int64_t blocks() const { return output_blocks * input_blocks * windows_h * windows_w; }
  // The only block of a window writes the gradient itself; else the partial sums of weight and bias lie in a workspace.
  INVERSE_FLOW_HOST_DEVICE bool is_direct() const { return splits == 1; }

  // None when every block writes its part of the gradient itself.
  int64_t workspace_elements(const Shape& shape) const { return is_direct() ? 0 : splits * gradient_elements(shape); }
  int64_t launches(const Shape& shape, const int64_t* orders) const {
    return group_chunks(shape, orders) * (is_direct() ? 1 : 2);
  }

  // Calls see(name, values...) for every fact of the plan.
  template <typename See>
  void visit(const Shape& shape, const See& see) const {
    see("tensor_cores", tensor_cores);
    see("channels", block_outputs, block_inputs);
    see("window", window_h, window_w * strip);
    see("images", images);
    see("tile", tile_h, tile_w);
    see("tiles", pixel_tiles());
    see("teams", teams);
    see("splits", splits);
    see("combine_lanes", combine_lanes);
    see("threads", threads);
    see("blocks", splits * blocks() * shape.groups);
    see("shared_bytes", shared_bytes);
  }
};

namespace plan_detail {

// Shares `total` out evenly over the fewest parts of at most `most`: how large a part is.
inline int32_t even_part(int64_t total, int64_t most) {
  return static_cast<int32_t>(divide_up(total, divide_up(total, most)));
}

inline void set_windows(GradientPlan& plan, int64_t strips_w) {
  plan.windows_h = divide_up(plan.taps_h, plan.window_h);
  plan.windows_w = divide_up(strips_w, plan.window_w);
}

// Shared memory of the tile and the next; sets the pitches and the offsets of its parts.
inline int64_t layout_gradient_tile(GradientPlan& plan, int64_t state_bytes) {
  const int64_t right_pixels = static_cast<int64_t>(plan.images) * plan.right_rows() * plan.right_columns();
  const int64_t left_pixels = round_up(plan.pixels(), plan.tensor_cores ? kFragmentPixels : 1);
  int64_t left_rows = left_pixels;
  int64_t right_rows = right_pixels;
  if (plan.tensor_cores) {
    // An odd multiple of 4 elements: four pixels of the eight channels of a fragment meet 32 banks.
    plan.left_pitch = static_cast<int32_t>((divide_up(left_pixels, 4) | 1) * 4);
    plan.right_pitch = static_cast<int32_t>((divide_up(right_pixels, 4) | 1) * 4);
    left_rows = plan.block_outputs;
    right_rows = plan.block_inputs;
  } else {
    // An odd number of packs: neighbouring pixels meet different banks.
    plan.left_pitch = (plan.block_outputs / plan.side | 1) * plan.side;
    plan.right_pitch = (plan.block_inputs / plan.side | 1) * plan.side;
  }
  plan.right_offset = round_up(left_rows * plan.left_pitch * state_bytes, 16);
  plan.buffer_bytes = plan.right_offset + round_up(right_rows * plan.right_pitch * state_bytes, 16);
  plan.positions_offset = kTileBuffers * plan.buffer_bytes;
  return plan.positions_offset + (plan.tensor_cores ? left_pixels * 4 : 0);
}

// As many splits as the memory for their sums allows; and of those, enough for two blocks per multiprocessor.
inline int64_t most_splits(const Shape& shape) {
  const int64_t image_elements = shape.batch * shape.groups * shape.channels * shape.height * shape.width;
  return std::max<int64_t>(image_elements / kWorkspaceShare / gradient_elements(shape), 1);
}
inline int64_t splits_wanted(const GradientPlan& plan, const Shape& shape, const DeviceLimits& device) {
  return std::min(most_splits(shape), divide_up(2 * device.multiprocessors, plan.blocks() * shape.groups));
}

// The next smaller window, down to one strip: false if there is none. Of its rows, then of its columns, to the next
// divisor, so that no window has taps beyond the last.
inline bool shrink_window(GradientPlan& plan) {
  const int64_t strips_w = divide_up(plan.taps_w, plan.strip);
  if (plan.window_h * plan.window_w == 1) return false;
  int32_t& side = plan.window_h > 1 ? plan.window_h : plan.window_w;
  const int64_t all = plan.window_h > 1 ? plan.taps_h : strips_w;
  do {
    --side;
  } while (all % side != 0);
  set_windows(plan, strips_w);
  return true;
}

// Fills in everything but the channels, the windows and the kernel. False if not even the smallest tile of the smallest
// window fits.
inline bool lay_out_gradient(GradientPlan& plan, const Shape& shape, int64_t state_bytes, const DeviceLimits& device) {
  const int64_t strips_w = divide_up(plan.taps_w, plan.strip);
  const int64_t max_threads =
      std::min<int64_t>(device.threads_per_block, plan.tensor_cores ? kGradientTensorThreads : kGradientThreads);
  const int64_t wanted_splits = splits_wanted(plan, shape, device);

  const int64_t tile_pixels = plan.tensor_cores ? kTensorTilePixels : kGradientTilePixels;
  plan.tile_w = static_cast<int32_t>(std::min<int64_t>(shape.width, 32));
  plan.tile_h = static_cast<int32_t>(std::min<int64_t>(shape.height, std::max<int64_t>(tile_pixels / plan.tile_w, 1)));
  plan.images = 1;
  if (plan.tile_h == shape.height && plan.tile_w == shape.width) {
    // Small images share a tile, unless that leaves splits without work.
    const int64_t share = std::max<int64_t>(shape.batch / wanted_splits, 1);
    plan.images = static_cast<int32_t>(std::clamp<int64_t>(tile_pixels / plan.pixels(), 1, share));
  }
  // Too large: fewer images, then smaller tiles down to a few pixels, then smaller windows, then single pixels.
  // A block alone on its multiprocessor may have all of the memory, else two share it: they fill each other's gaps.
  const auto fits = [&] {
    const bool is_alone = plan.blocks() * shape.groups * wanted_splits <= device.multiprocessors;
    const int64_t limit = is_alone ? device.shared_bytes : (device.shared_bytes - kReservedSharedBytes) / 2;
    return layout_gradient_tile(plan, state_bytes) <= limit;
  };
  const auto halve = [](int32_t& count) { count = (count + 1) / 2; };
  while (!fits() && plan.images > 1) halve(plan.images);
  while (!fits() && plan.tile_h * plan.tile_w > 16) halve(plan.tile_h >= plan.tile_w ? plan.tile_h : plan.tile_w);
  while (!fits() && plan.window_h > 1) halve(plan.window_h);
  while (!fits() && plan.window_w > 1) halve(plan.window_w);
  while (!fits() && plan.tile_h * plan.tile_w > 1) halve(plan.tile_h >= plan.tile_w ? plan.tile_h : plan.tile_w);
  if (layout_gradient_tile(plan, state_bytes) > device.shared_bytes) return false;
  set_windows(plan, strips_w);
  plan.image_tiles = divide_up(shape.batch, plan.images);
  plan.tiles_h = divide_up(shape.height, plan.tile_h);
  plan.tiles_w = divide_up(shape.width, plan.tile_w);
  plan.splits = std::clamp<int64_t>(wanted_splits, 1, std::max<int64_t>(plan.pixel_tiles(), 1));
  // Eight sums of a lane are under way at a time; more lanes only where there are more.
  plan.combine_lanes = 1;
  while (plan.combine_lanes < 32 && plan.combine_lanes * 8 < plan.splits) plan.combine_lanes *= 2;

  int64_t team_threads = 0;
  int64_t sums = 0;  // of a thread
  int64_t pieces = 0;
  if (plan.tensor_cores) {
    plan.items = plan.block_outputs / kFragmentOutputs * (plan.block_inputs / kFragmentInputs);
    team_threads = plan.items * 32;
    sums = kFragmentTaps * 4;
    pieces = divide_up(plan.pixels(), kFragmentPixels);
    for (int32_t v = 0; v < plan.window_h * plan.window_w; ++v) {
      const int32_t before = v / plan.window_w * plan.right_columns() + v % plan.window_w;
      plan.tap_bytes[v] = -before * static_cast<int32_t>(sizeof(float));
    }
  } else {
    plan.items = plan.block_outputs / plan.side * (plan.block_inputs / plan.side) * plan.window_h * plan.window_w;
    team_threads = plan.items;
    sums = plan.side * plan.side * kTapColumns;
    pieces = static_cast<int64_t>(plan.images) * plan.tile_h * divide_up(plan.tile_w, kSegmentColumns);
  }
  plan.teams = static_cast<int32_t>(std::clamp<int64_t>(max_threads / team_threads, 1, pieces));
  // Whole warps; and enough of them to load the tile.
  plan.threads = static_cast<int32_t>(
      round_up(std::max<int64_t>(team_threads * plan.teams, std::min<int64_t>(max_threads, plan.pixels())), 32));
  // The later half of the teams hands its sums to the earlier half, so do the threads that add up the bias, and then
  // the sums are gathered.
  const int64_t meeting = std::max<int64_t>(plan.teams / 2 * team_threads * sums, plan.threads / 2);
  const int64_t gathered = plan.block_outputs * plan.block_inputs * plan.window_h * plan.window_w * plan.strip;
  plan.shared_bytes = std::max(layout_gradient_tile(plan, state_bytes), std::max(meeting, gathered) * state_bytes);
  return plan.shared_bytes <= device.shared_bytes;
}

// Cycles of a multiprocessor that a plan for tensor cores takes, in a rough count that only compares plans. Beside each
// other: loads from L2 at 64 bytes a cycle, and on four schedulers products at 7 cycles, or the instructions of a
// warp's step, of a tap of it, and of a copied value.
inline double tensor_cycles(const GradientPlan& plan, const Shape& shape, const DeviceLimits& device) {
  const int64_t splits = splits_wanted(plan, shape, device);
  const int64_t waves = divide_up(plan.blocks() * shape.groups * splits, device.multiprocessors);
  const double pixels = static_cast<double>(shape.batch * shape.height * shape.width) / static_cast<double>(splits);
  const int64_t fragments = plan.block_outputs / kFragmentOutputs * (plan.block_inputs / kFragmentInputs);
  const double load = 4.0 * (plan.block_outputs + plan.block_inputs) / 64.0;
  const double taps = plan.window_h * plan.window_w;
  const double steps = static_cast<double>(fragments) / kFragmentPixels;
  const double copies = kCopyInstructions * (plan.block_outputs + plan.block_inputs) / 32.0;
  const double instructions = steps * (kStepInstructions + kTapInstructions * taps) + copies;
  return static_cast<double>(waves) * pixels * std::max(load, std::max(3 * 7 * taps * steps, instructions) / 4);
}

// Channels and window of a block: of all that fit its warps, those that take the least time. Larger blocks load less
// and smaller ones keep more multiprocessors busy, which decides where memory allows few splits.
inline GradientPlan choose_fragments(const GradientPlan& start, const Shape& shape, const DeviceLimits& device) {
  const int64_t max_warps = std::min(device.threads_per_block, kGradientTensorThreads) / 32;
  const int64_t outputs = divide_up(shape.channels, kFragmentOutputs);
  const int64_t inputs = divide_up(shape.channels, kFragmentInputs);
  GradientPlan best{};
  for (int64_t o = 1; o <= std::min(outputs, max_warps); ++o) {
    for (int64_t i = 1; i <= std::min(inputs, max_warps / o); ++i) {
      GradientPlan plan = start;
      plan.block_outputs = static_cast<int32_t>(o * kFragmentOutputs);
      plan.block_inputs = static_cast<int32_t>(i * kFragmentInputs);
      plan.output_blocks = divide_up(outputs, o);
      plan.input_blocks = divide_up(inputs, i);
      plan.window_w = even_part(plan.taps_w, kFragmentTaps);
      plan.window_h = even_part(plan.taps_h, kFragmentTaps / plan.window_w);
      set_windows(plan, plan.taps_w);
      do {
        if (best.block_outputs == 0 || tensor_cycles(plan, shape, device) < tensor_cycles(best, shape, device)) {
          best = plan;
        }
      } while (shrink_window(plan));
    }
  }
  return best;
}

}  // namespace plan_detail

inline GradientPlan plan_weight_gradient(const Shape& shape, int64_t state_bytes, const DeviceLimits& device) {
  GradientPlan plan{};
  const int64_t max_threads = std::min<int64_t>(device.threads_per_block, kGradientThreads);
  plan.taps_h = static_cast<int32_t>(std::min(shape.kernel_h, shape.height));
  plan.taps_w = static_cast<int32_t>(std::min(shape.kernel_w, shape.width));

  if (state_bytes == 4 && shape.channels >= kMinGradientTensorChannels) {
    GradientPlan tensor = plan;
    tensor.tensor_cores = true;
    tensor.strip = 1;
    tensor = plan_detail::choose_fragments(tensor, shape, device);
    if (plan_detail::lay_out_gradient(tensor, shape, state_bytes, device)) return tensor;
  }

  plan.strip = kTapColumns;
  // Packs of 16 bytes; one channel alone is not padded.
  plan.side = shape.channels == 1 ? 1 : static_cast<int32_t>(16 / state_bytes);
  const int64_t strips_w = divide_up(plan.taps_w, kTapColumns);
  const int64_t all_packs = divide_up(shape.channels, plan.side);
  int64_t packs = plan_detail::even_part(all_packs, kGradientBlockChannels / plan.side);
  while (packs * packs > max_threads) --packs;
  for (;; --packs) {
    int64_t output_packs = packs;
    plan.block_inputs = static_cast<int32_t>(packs * plan.side);
    plan.input_blocks = divide_up(all_packs, packs);
    plan.output_blocks = divide_up(all_packs, output_packs);
    plan.window_w = plan_detail::even_part(strips_w, max_threads / (packs * packs));
    plan.window_h = plan_detail::even_part(plan.taps_h, max_threads / (packs * packs * plan.window_w));
    plan_detail::set_windows(plan, strips_w);
    // Too few blocks for the multiprocessors: fewer outputs each, which also saves loads, then smaller windows.
    const auto too_few = [&] {
      return plan.blocks() * shape.groups * plan_detail::most_splits(shape) < device.multiprocessors;
    };
    while (too_few() && output_packs > 1) {
      do {
        --output_packs;
      } while (all_packs % output_packs != 0);
      plan.output_blocks = divide_up(all_packs, output_packs);
    }
    while (too_few() && plan_detail::shrink_window(plan)) {
    }
    plan.block_outputs = static_cast<int32_t>(output_packs * plan.side);
    if (plan_detail::lay_out_gradient(plan, shape, state_bytes, device) || packs == 1) return plan;
  }
}

}  // namespace inverse_flow
