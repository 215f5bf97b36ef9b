// How the corner is folded into the other taps (fold.cuh): who does it, where the result lies. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../params.h"
#include "device_limits.h"

namespace inverse_flow {

// Registers: 65536 of them over 640 threads leave 96 each, which the fold and the solve of a block need.
constexpr int32_t kMaxThreads = 640;
// A corner this small is inverted by every block for itself, which spares a launch; beyond it the cubic work in
// double precision, repeated a block, would cost more than the launch. Where, is unmeasured.
constexpr int32_t kMaxChannelsFoldedInBlock = 16;
// Of those, a corner so small is inverted by one warp, whose barriers are cheaper: it has a lane for every entry that a
// step computes (unit triangular: 4 rows of 8 at most; general: all of them). Beyond, its second round would take
// longer than the barriers of the block. Unmeasured.
INVERSE_FLOW_HOST_DEVICE constexpr bool inverted_by_warp(Corner corner, int64_t channels) {
  return channels <= (corner == kUnitTriangular ? 12 : 5);
}

// Folded weights of a group as threads read them: [tap][pack of input channels][output channel][pack], zeros in the
// rest of the last pack. Threads of neighbouring output channels then read neighbouring packs of 16 bytes.
struct PackedTaps {
  // Taps that can reach a pixel at all: the kernel clipped to the image.
  int32_t taps_h;
  int32_t taps_w;
  int32_t channels;
  // Channels go through memory `pack` at a time (16 bytes), in `channel_packs` packs.
  int32_t pack;
  int32_t channel_packs;

  INVERSE_FLOW_HOST_DEVICE constexpr int64_t inputs() const { return static_cast<int64_t>(channel_packs) * pack; }
  INVERSE_FLOW_HOST_DEVICE constexpr int64_t outputs() const { return channels; }
  INVERSE_FLOW_HOST_DEVICE constexpr int64_t elements() const { return inputs() * outputs() * taps_h * taps_w; }
  // Where the weights of tap (a, b) begin, and behind that the one of output o and input c.
  template <typename Index>
  INVERSE_FLOW_HOST_DEVICE Index tap_place(int32_t a, int32_t b) const {
    return (static_cast<Index>(a) * taps_w + b) * (channel_packs * pack) * channels;
  }
  template <typename Index>
  INVERSE_FLOW_HOST_DEVICE Index pair_place(int32_t o, int32_t c) const {
    const int32_t number = c / pack;
    return (static_cast<Index>(number) * channels + o) * pack + (c - number * pack);
  }
};

inline PackedTaps packed_taps(const Shape& shape, int64_t pack) {
  return {static_cast<int32_t>(std::min(shape.kernel_h, shape.height)),
          static_cast<int32_t>(std::min(shape.kernel_w, shape.width)), static_cast<int32_t>(shape.channels),
          static_cast<int32_t>(pack), static_cast<int32_t>(divide_up(shape.channels, pack))};
}

// Entries from a row to the next of a corner that is inverted: one more than a multiple of four, so that neighbours in
// a column meet different banks, and of those on a diagonal no more than two the same.
INVERSE_FLOW_HOST_DEVICE constexpr int64_t corner_pitch(int64_t channels) { return (channels + 2) / 4 * 4 + 1; }

// Memory of one corner inversion: the matrix in double, a row and a column, two permutations.
INVERSE_FLOW_HOST_DEVICE constexpr int64_t inversion_bytes(int64_t channels) {
  return round_up(channels * (corner_pitch(channels) * 8 + 8 + 8 + 4 + 4), 16);
}

// Shared memory of a block that folds for itself: the inversion, and a copy of the group's weights. More of an identity
// corner than are worth a copy are read where they are.
inline int64_t fold_in_block_bytes(const Shape& shape, int64_t state_bytes) {
  if (shape.corner == kIdentity && shape.channels > kMaxChannelsFoldedInBlock) return 0;
  const int64_t weights = shape.channels * shape.channels * shape.kernel_h * shape.kernel_w;
  return (shape.corner == kIdentity ? 0 : inversion_bytes(shape.channels)) + weights * state_bytes;
}

// Who folds: every block of the solve for itself, or launches before it.
struct FoldPlan {
  bool in_block;
  int64_t scratch_bytes;  // of shared memory, of a block that folds for itself; else 0
  // Those launches: blocks per group, and their threads. Each inverts the corner for itself, in shared memory, if it
  // fits there; with 0 bytes yet another launch inverts it in the workspace.
  int32_t blocks;
  int32_t threads;
  int64_t shared_bytes;

  // Whether the corner has a launch of its own.
  bool inverts_before(const Shape& shape) const { return !in_block && shape.corner != kIdentity && shared_bytes == 0; }
  // Of one chunk of groups.
  int64_t launches(const Shape& shape) const { return in_block ? 0 : inverts_before(shape) ? 2 : 1; }
  // The workspace: the folded weights, of `elements` a group, then the inversions.
  int64_t inversions_offset(const Shape& shape, int64_t elements, int64_t state_bytes) const {
    return round_up(shape.groups * elements * state_bytes, 16);
  }
  int64_t workspace_bytes(const Shape& shape, int64_t elements, int64_t state_bytes) const {
    if (in_block) return 0;
    return inversions_offset(shape, elements, state_bytes) +
           (inverts_before(shape) ? shape.groups * inversion_bytes(shape.channels) : 0);
  }
};

// Every block for itself, if the corner is small and `scratch_bytes` of its memory are enough; `can_fold` says that the
// folded weights, `elements` a group, stay in its memory at all.
inline FoldPlan plan_fold(const Shape& shape, int64_t state_bytes, int64_t elements, bool can_fold,
                          int64_t scratch_bytes, const DeviceLimits& device) {
  const int64_t threads = std::min<int64_t>(device.threads_per_block, kMaxThreads);
  const int64_t corner_bytes = shape.corner == kIdentity ? 0 : inversion_bytes(shape.channels);
  const int64_t in_block_bytes = fold_in_block_bytes(shape, state_bytes);
  FoldPlan plan{};
  plan.in_block = can_fold && in_block_bytes <= scratch_bytes &&
                  (shape.corner == kIdentity || shape.channels <= kMaxChannelsFoldedInBlock);
  plan.scratch_bytes = plan.in_block ? in_block_bytes : 0;
  plan.shared_bytes = corner_bytes <= device.shared_bytes ? corner_bytes : 0;
  plan.threads = static_cast<int32_t>(threads);
  plan.blocks = static_cast<int32_t>(
      std::clamp<int64_t>(divide_up(device.multiprocessors, shape.groups), 1, divide_up(elements, threads)));
  return plan;
}

}  // namespace inverse_flow
