// How a solve is laid over the tensor cores of a block: the plan of solve_tensor.cuh. Plain C++, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "device_limits.h"

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
// Fewer channels would leave most of a 16 x 8 fragment empty.
constexpr int64_t kMinTensorChannels = 9;
// The pixels of one channel are in one bank, and 8 pixels x 4 channels are read at a time: a distance of 4 modulo 8
// words between pixels puts them into 32 banks.
constexpr int64_t kPixelPadding = 4;

struct TensorPlan {
  int32_t k_steps;       // of kMmaInputs input channels, a tap
  int32_t output_tiles;  // of kMmaOutputs output channels
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
  // Shared memory, in bytes: weights, bias, taps, x, sums.
  int64_t bias_offset;
  int64_t taps_offset;
  int64_t x_offset;
  int64_t sums_offset;
  int64_t shared_bytes;

  INVERSE_FLOW_HOST_DEVICE int32_t product_warps() const { return splits * job_warps; }
  INVERSE_FLOW_HOST_DEVICE int64_t padded_outputs() const { return static_cast<int64_t>(output_tiles) * kMmaOutputs; }
  INVERSE_FLOW_HOST_DEVICE int64_t padded_inputs() const { return static_cast<int64_t>(k_steps) * kMmaInputs; }
  // Where the weight of output o and input c of the tap at `position` lies: k-step, output tile, lane, and the order
  // of the lane's registers.
  INVERSE_FLOW_HOST_DEVICE int64_t fragment_place(int64_t position, int64_t o, int64_t c) const {
    const int64_t row = o % kMmaOutputs;
    const int64_t column = c % kMmaInputs;
    const int64_t lane = row % 8 * 4 + column % 4;
    const int64_t fragment = (position * k_steps + c / kMmaInputs) * output_tiles + o / kMmaOutputs;
    return fragment * kFragmentElements + lane * kLaneWeights + row / 8 + column / 4 * 2;
  }
};

// Taps (a, b) of a taps_h x taps_w window that are nearer than `distance` = a + b. Taps are kept in the order of their
// distance: first (0, 0), then (0, 1) and (1, 0), which read the diagonal just before, then the others.
INVERSE_FLOW_HOST_DEVICE constexpr int64_t taps_nearer(int64_t taps_h, int64_t taps_w, int64_t distance) {
  const auto triangle = [](int64_t n) { return n > 0 ? n * (n + 1) / 2 : 0; };
  return triangle(distance) - triangle(distance - taps_h) - triangle(distance - taps_w) +
         triangle(distance - taps_h - taps_w);
}
INVERSE_FLOW_HOST_DEVICE constexpr int64_t tap_position(int64_t taps_h, int64_t taps_w, int64_t a, int64_t b) {
  const int64_t first_a = a + b - (taps_w - 1);
  return taps_nearer(taps_h, taps_w, a + b) + a - (first_a > 0 ? first_a : 0);
}

namespace plan_detail {

// Pixels and sums for `images` of a block; false if they do not fit.
inline bool lay_out_pixels(const Shape& shape, int64_t taps_h, int64_t taps_w, int64_t images, bool whole_images,
                           int64_t budget, TensorPlan& plan) {
  const int64_t pitch = plan.padded_inputs() + kPixelPadding;
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
  const int64_t sum_pitch = plan.padded_outputs() + kPixelPadding;
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

// False where the tensor cores cannot be used: other states than float32, no taps but the corner, or diagonals that do
// not fit shared memory.
inline bool plan_tensor(const Shape& shape, int64_t state_bytes, const DeviceLimits& device, TensorPlan& plan) {
  plan = {};
  const int64_t taps_h = std::min(shape.kernel_h, shape.height);
  const int64_t taps_w = std::min(shape.kernel_w, shape.width);
  const int64_t max_warps = std::min(device.threads_per_block, kTensorThreads) / 32;
  if (state_bytes != static_cast<int64_t>(sizeof(float)) || taps_h * taps_w == 1) return false;
  if (shape.channels * static_cast<int64_t>(sizeof(float)) > device.shared_bytes) return false;
  plan.k_steps = static_cast<int32_t>(divide_up(shape.channels, kMmaInputs));
  plan.output_tiles = static_cast<int32_t>(divide_up(shape.channels, kMmaOutputs));
  const int64_t steps = taps_h * taps_w * plan.k_steps;
  const int64_t step_bytes = plan.output_tiles * kFragmentElements * static_cast<int64_t>(sizeof(float));
  const int64_t bias_bytes = round_up(plan.padded_inputs() * static_cast<int64_t>(sizeof(float)), 16);
  const int64_t taps_bytes = round_up(taps_h * taps_w * 8, 16);
  const int64_t budget = device.shared_bytes - bias_bytes - taps_bytes;
  if (budget <= 0) return false;

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
    const int64_t jobs = plan.output_tiles * divide_up(images * diagonal, int64_t{kJobTiles} * kMmaPixels);
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
    if (!lay_out(images, false, budget)) return false;
  }
  // As many as a diagonal has packs of channels for, of those that are left.
  const int64_t packs = images * diagonal * divide_up(shape.channels, int64_t{kLaneWeights});
  plan.finish_warps = static_cast<int32_t>(std::min(divide_up(packs, 32), max_warps - plan.product_warps()));
  plan.threads = (plan.product_warps() + plan.finish_warps) * 32;
  plan.resident_steps = static_cast<int32_t>(std::min(steps, (budget - plan.shared_bytes) / step_bytes));
  plan.bias_offset = plan.resident_steps * step_bytes;
  plan.taps_offset = plan.bias_offset + bias_bytes;
  plan.x_offset = plan.taps_offset + taps_bytes;
  plan.sums_offset += plan.x_offset;
  plan.shared_bytes += plan.x_offset;
  return true;
}

}  // namespace inverse_flow
