// What the plans know of the device, and the arithmetic that they share. Plain C++.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace inverse_flow {

// How a solve is laid over the GPU.
enum class SolveRegime : int32_t {
  kBlock = 0,   // solve.cuh: a block on a tile, its threads on the channels and pixels of a diagonal
  kLanes = 1,   // solve_lanes.cuh: a warp on a band of rows, a few lanes on each row
  kTensor = 2,  // solve_tensor.cuh: a block on whole images, each diagonal a matrix product on tensor cores
};

struct DeviceLimits {
  int32_t threads_per_block;  // at most; a multiple of 32
  int64_t shared_bytes;       // at most, a block, with the opt-in above 48 KiB
  int32_t multiprocessors;
  // A SolveRegime to use whether it pays or not, where it can be used at all, else kBlock; -1: the plan's own choice.
  int32_t forced_regime = -1;
};

INVERSE_FLOW_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INVERSE_FLOW_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace inverse_flow
