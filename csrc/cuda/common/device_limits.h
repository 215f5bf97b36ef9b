// What the plans know of the device, and the arithmetic that they share. Plain C++.
#pragma once

#include <cstdint>

#include "../../host_device.h"

namespace inverse_flow {

struct DeviceLimits {
  int32_t threads_per_block;  // at most; a multiple of 32
  int64_t shared_bytes;       // at most, a block, with the opt-in above 48 KiB
  int32_t multiprocessors;
};

INVERSE_FLOW_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INVERSE_FLOW_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace inverse_flow
