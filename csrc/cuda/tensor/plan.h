// The plan of the regime "tensor cores" (kernel.cuh): a block on whole images of one group. Plain C++.
//
// The thresholds here follow from registers, banks and counted products; on a GPU they are unmeasured.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "../common/device_limits.h"
#include "../common/divisor.h"
#include "../common/fold.h"
#include "../common/orders.h"
#include "../common/problem.h"

namespace inverse_flow {

// The shape of one matrix product: output channels x input channels, and pixels.
constexpr int32_t kMmaOutputs = 16;
constexpr int32_t kMmaInputs = 8;
constexpr int32_t kMmaPixels = 8;
// Weights of one product, and floats of them that a lane holds: 16 bytes.
constexpr int32_t kFragmentElements = kMmaOutputs * kMmaInputs;
constexpr int32_t kLaneWeights = kFragmentElements / 32;
// Registers: 65536 of them over 512 threads leave 128 each, which the sums of four tiles of pixels need.
constexpr int32_t kTensorThreads = 512;
// Tiles of pixels that one warp serves with the same weights.
constexpr int32_t kJobTiles = 4;
// Warps that multiply, where that many can share the jobs: three a quarter of a multiprocessor hide each other's
// latency, and leave warps for finishing.
constexpr int64_t kProductWarps = 12;
// More warps than this on one sum cost more in adding up than they save.
constexpr int32_t kMaxSplits = 8;
// The pixels of one channel are in one bank, and 8 pixels x 4 channels are read at a time: a distance of 4 modulo 8
// words between pixels puts them into 32 banks.
constexpr int64_t kPixelPadding = 4;

// Taps (a, b) of a taps_h x taps_w window that are nearer than `distance` = a + b. Taps are kept in the order of their
// distance, but that the first are (0, 1) and (1, 0), which read the diagonal just before, and (0, 0) comes next.
template <typename Index>
INVERSE_FLOW_HOST_DEVICE constexpr Index taps_nearer(Index taps_h, Index taps_w, Index distance) {
  const auto triangle = [](Index n) { return n > 0 ? n * (n + 1) / 2 : 0; };
  return triangle(distance) - triangle(distance - taps_h) - triangle(distance - taps_w) +
         triangle(distance - taps_h - taps_w);
}
// Place of (0, 0): behind (0, 1) and (1, 0), as far as they are there.
INVERSE_FLOW_HOST_DEVICE constexpr int32_t near_taps(int64_t taps_h, int64_t taps_w) {
  return (taps_h > 1 ? 1 : 0) + (taps_w > 1 ? 1 : 0);
}
template <typename Index>
INVERSE_FLOW_HOST_DEVICE constexpr Index tap_position(Index taps_h, Index taps_w, Index a, Index b) {
  if (a + b == 0) return near_taps(taps_h, taps_w);
  const Index first_a = a + b - (taps_w - 1);
  const Index in_order = taps_nearer(taps_h, taps_w, a + b) + a - (first_a > 0 ? first_a : 0);
  return a + b == 1 ? in_order - 1 : in_order;
}

// Folded weights of a group as the lanes of a warp read them: [tap, in order of distance][k-step][output
// tile][lane][4], zeros where a fragment reaches beyond the channels.
struct FragmentTaps {
  // Taps that can reach a pixel at all: the kernel clipped to the image.
  int32_t taps_h;
  int32_t taps_w;
  int32_t k_steps;       // of kMmaInputs input channels, a tap
  int32_t output_tiles;  // of kMmaOutputs output channels

  INVERSE_FLOW_HOST_DEVICE int64_t inputs() const { return static_cast<int64_t>(k_steps) * kMmaInputs; }
  INVERSE_FLOW_HOST_DEVICE int64_t outputs() const { return static_cast<int64_t>(output_tiles) * kMmaOutputs; }
  INVERSE_FLOW_HOST_DEVICE int64_t elements() const { return inputs() * outputs() * taps_h * taps_w; }
  INVERSE_FLOW_HOST_DEVICE int64_t all_steps() const { return static_cast<int64_t>(taps_h) * taps_w * k_steps; }
  // Where the weights of tap (a, b) begin, and behind that the one of output o and input c, by the order of a lane's
  // registers (mma.cuh).
  template <typename Index>
  INVERSE_FLOW_HOST_DEVICE Index tap_place(int32_t a, int32_t b) const {
    return tap_position<Index>(taps_h, taps_w, a, b) * k_steps * output_tiles * kFragmentElements;
  }
  template <typename Index>
  INVERSE_FLOW_HOST_DEVICE Index pair_place(int32_t o, int32_t c) const {
    const int32_t row = o % kMmaOutputs;
    const int32_t column = c % kMmaInputs;
    const int32_t lane = row % 8 * 4 + column % 4;
    const Index fragment = static_cast<Index>(c / kMmaInputs) * output_tiles + o / kMmaOutputs;
    return fragment * kFragmentElements + lane * kLaneWeights + row / 8 + column / 4 * 2;
  }
};

struct TensorPlan {
  FragmentTaps taps;
  FoldPlan fold;
  int32_t images;        // of a block
  int32_t splits;        // warps that share the k-steps of one job (output tile x kJobTiles tiles of pixels)
  int32_t job_warps;     // jobs that are done at a time
  int32_t finish_warps;  // further warps, which add up the splits' sums meanwhile; 0: all warps do that
  int32_t threads;
  int32_t resident_steps;  // k-steps, of all taps from the nearest on, whose weights are in shared memory
  // x in shared memory, in floats: pixel (row, column) of an image begins at
  // origin + slot(row + column) * slot_stride + row * row_step, slot(d) = d for whole images, d mod slots in a ring.
  bool whole_images;
  int32_t pitch;  // of a pixel
  int32_t slots;
  int32_t slot_stride;
  int32_t row_step;
  int32_t origin;
  int32_t image_stride;
  // The splits' sums: splits x sum_columns pixels x sum_pitch channels.
  int32_t sum_columns;
  int32_t sum_pitch;
  // Shared memory, in bytes: weights, bias, where x of a k-step is, x, sums.
  int64_t bias_offset;
  int64_t sources_offset;
  int64_t x_offset;
  int64_t sums_offset;
  int64_t shared_bytes;
  // What the sweep divides by.
  Divisor by_splits;
  Divisor by_k_steps;
  Divisor by_output_tiles;
  Divisor by_slots;
  Divisor by_packs;  // of channels, of a pixel

  INVERSE_FLOW_HOST_DEVICE int32_t product_warps() const { return splits * job_warps; }
  bool weights_in_shared() const { return resident_steps == taps.all_steps(); }

  // Images are never cut up.
  bool needs_state() const { return false; }
  int64_t workspace_bytes(const Shape& shape, int64_t state_bytes) const {
    return fold.workspace_bytes(shape, taps.elements(), state_bytes);
  }
  int64_t launches(const Shape& shape, const int64_t* orders) const {
    return group_chunks(shape, orders) * (fold.launches(shape) + divide_up(shape.batch, kMaxGridX * images));
  }

  // Calls see(name, values...) for every fact of the plan.
  template <typename See>
  void visit(const Shape& shape, int64_t state_bytes, const See& see) const {
    see("regime", std::string("tensor cores, ") + (whole_images ? "whole images" : "a ring of diagonals") +
                      ", weights in " +
                      (weights_in_shared()  ? "shared memory"
                       : resident_steps > 0 ? "shared and global memory"
                                            : "global memory"));
    see("tile", shape.height, shape.width);
    see("tiles", 1, 1);
    see("images", images);
    see("pack", kLaneWeights);
    see("channel_threads", 0);
    see("diagonal_threads", 0);
    see("bands", 0);
    see("steps", shape.height + shape.width - 1);
    see("threads", threads);
    see("blocks", divide_up(shape.batch, images) * shape.groups);
    see("shared_bytes", shared_bytes);
    see("weights_in_shared", weights_in_shared());
    see("folded_bytes", taps.elements() * shape.groups * state_bytes);
    see("fold_launches", fold.launches(shape));
    see("fold_blocks", fold.in_block ? 0 : fold.blocks * shape.groups);
    see("tensor.output_tiles", taps.output_tiles);
    see("tensor.k_steps", taps.k_steps);
    see("tensor.resident_steps", resident_steps);
    see("tensor.splits", splits);
    see("tensor.job_warps", job_warps);
    see("tensor.finish_warps", finish_warps);
    see("tensor.whole_images", whole_images);
  }
};

namespace plan_detail {

// Pixels and sums for `images` of a block; false if they do not fit.
inline bool lay_out_pixels(const Shape& shape, int64_t taps_h, int64_t taps_w, int64_t images, bool whole_images,
                           int64_t budget, TensorPlan& plan) {
  const int64_t pitch = plan.taps.inputs() + kPixelPadding;
  const int64_t floats = budget / static_cast<int64_t>(sizeof(float));
  const int64_t rows = shape.height + taps_h - 1;
  int64_t image_stride = 0;
  if (shape.height > floats || shape.width > (int64_t{1} << 30)) return false;
  if (whole_images) {
    // An even row: the step to the pixel below on an anti-diagonal is then an odd number of pixels.
    const int64_t row_pixels = round_up(shape.width + taps_w - 1, 2);
    if (row_pixels > floats) return false;
    image_stride = rows * row_pixels * pitch;
    plan.slots = 0;
    plan.slot_stride = static_cast<int32_t>(pitch);
    plan.row_step = static_cast<int32_t>((row_pixels - 1) * pitch);
    plan.origin = static_cast<int32_t>(((taps_h - 1) * row_pixels + taps_w - 1) * pitch);
  } else {
    // The diagonals that the taps reach, the one that is solved, and y of the next.
    const int64_t slots = taps_h + taps_w;
    if (rows * pitch > floats || slots > floats) return false;
    image_stride = slots * rows * pitch;
    plan.slots = static_cast<int32_t>(slots);
    plan.slot_stride = static_cast<int32_t>(rows * pitch);
    plan.row_step = static_cast<int32_t>(pitch);
    plan.origin = static_cast<int32_t>((taps_h - 1) * pitch);
  }
  // Two images side by side in one tile of pixels: half of the banks apart.
  if (images > 1) image_stride = round_up(image_stride, 32) + 16;
  const int64_t columns = round_up(images * std::min(shape.height, shape.width), kMmaPixels);
  const int64_t sum_pitch = plan.taps.outputs() + kPixelPadding;
  const int64_t bytes =
      static_cast<int64_t>(sizeof(float)) * (images * image_stride + plan.splits * columns * sum_pitch);
  if (image_stride > floats || bytes > budget) return false;
  plan.whole_images = whole_images;
  plan.images = static_cast<int32_t>(images);
  plan.pitch = static_cast<int32_t>(pitch);
  plan.image_stride = static_cast<int32_t>(image_stride);
  plan.sum_columns = static_cast<int32_t>(columns);
  plan.sum_pitch = static_cast<int32_t>(sum_pitch);
  plan.x_offset = 0;
  plan.sums_offset = images * image_stride * static_cast<int64_t>(sizeof(float));
  plan.shared_bytes = bytes;
  return true;
}

}  // namespace plan_detail

// Nothing where the tensor cores cannot be used: other states than float32, no taps but the corner, or diagonals that
// do not fit shared memory.
inline std::optional<TensorPlan> plan_tensor(const Shape& shape, int64_t state_bytes, const DeviceLimits& device) {
  TensorPlan plan{};
  const int64_t taps_h = std::min(shape.kernel_h, shape.height);
  const int64_t taps_w = std::min(shape.kernel_w, shape.width);
  const int64_t max_warps = std::min(device.threads_per_block, kTensorThreads) / 32;
  if (state_bytes != static_cast<int64_t>(sizeof(float)) || taps_h * taps_w == 1) return std::nullopt;
  if (shape.channels * static_cast<int64_t>(sizeof(float)) > device.shared_bytes) return std::nullopt;
  plan.taps = {static_cast<int32_t>(taps_h), static_cast<int32_t>(taps_w),
               static_cast<int32_t>(divide_up(shape.channels, kMmaInputs)),
               static_cast<int32_t>(divide_up(shape.channels, kMmaOutputs))};
  const int64_t steps = plan.taps.all_steps();
  const int64_t step_bytes = plan.taps.output_tiles * kFragmentElements * static_cast<int64_t>(sizeof(float));
  const int64_t bias_bytes = round_up(plan.taps.inputs() * static_cast<int64_t>(sizeof(float)), 16);
  const int64_t sources_bytes = round_up((steps + 1) * 8, 16);
  const int64_t budget = device.shared_bytes - bias_bytes - sources_bytes;
  if (budget <= 0) return std::nullopt;

  // Images of a block: what is left over for each when every multiprocessor has one block; and where the weights do
  // not fit, so many that a fragment read through L2 serves a full tile of pixels.
  const int64_t diagonal = std::min(shape.height, shape.width);
  const int64_t share = divide_up(shape.batch * shape.groups, std::max(device.multiprocessors, 1));
  const int64_t filling = steps * step_bytes > budget ? kMmaPixels / diagonal : 1;
  const int64_t most = std::max<int64_t>(kJobTiles * kMmaPixels / diagonal, 1);
  const int64_t wanted =
      std::clamp<int64_t>(std::max(share, filling), 1, std::max<int64_t>(std::min(most, shape.batch), 1));

  // Whole images where all weights fit beside them or half of the memory is left for weights; else a ring.
  const auto lay_out = [&](int64_t images, bool whole_images, int64_t limit) {
    const int64_t jobs = plan.taps.output_tiles * divide_up(images * diagonal, int64_t{kJobTiles} * kMmaPixels);
    const int64_t splits = std::clamp<int64_t>(std::min(max_warps, kProductWarps) / jobs, 1, kMaxSplits);
    for (plan.splits = static_cast<int32_t>(splits); plan.splits > 0; --plan.splits) {
      plan.job_warps = static_cast<int32_t>(std::min(jobs, max_warps / plan.splits));
      if (plan_detail::lay_out_pixels(shape, taps_h, taps_w, images, whole_images, limit, plan)) return true;
    }
    return false;
  };
  const int64_t whole_limit = std::max(budget / 2, budget - steps * step_bytes);
  int64_t images = wanted;
  while (images > 1 && !lay_out(images, true, whole_limit)) --images;
  if (!lay_out(images, true, whole_limit)) {
    images = wanted;
    while (images > 1 && !lay_out(images, false, whole_limit)) --images;
    if (!lay_out(images, false, budget)) return std::nullopt;
  }
  plan.by_splits = Divisor::of(plan.splits);
  plan.by_k_steps = Divisor::of(plan.taps.k_steps);
  plan.by_output_tiles = Divisor::of(plan.taps.output_tiles);
  plan.by_slots = Divisor::of(std::max(plan.slots, 1));
  plan.by_packs = Divisor::of(static_cast<int32_t>(divide_up(shape.channels, int64_t{kLaneWeights})));
  // As many as a diagonal has packs of channels for, of those that are left.
  const int64_t packs = images * diagonal * divide_up(shape.channels, int64_t{kLaneWeights});
  plan.finish_warps = static_cast<int32_t>(std::min(divide_up(packs, 32), max_warps - plan.product_warps()));
  plan.threads = (plan.product_warps() + plan.finish_warps) * 32;
  plan.resident_steps = static_cast<int32_t>(std::min(steps, (budget - plan.shared_bytes) / step_bytes));
  plan.bias_offset = plan.resident_steps * step_bytes;
  plan.sources_offset = plan.bias_offset + bias_bytes;
  plan.x_offset = plan.sources_offset + sources_bytes;
  plan.sums_offset += plan.x_offset;
  plan.shared_bytes += plan.x_offset;
  // The scratch of the fold lies where pixels and sums will.
  plan.fold = plan_fold(shape, state_bytes, plan.taps.elements(), plan.weights_in_shared(),
                        device.shared_bytes - plan.x_offset, device);
  plan.shared_bytes = std::max(plan.shared_bytes, plan.x_offset + plan.fold.scratch_bytes);
  return plan;
}

}  // namespace inverse_flow
