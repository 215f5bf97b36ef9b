// What only the CUDA compiler and the runtime can say.
#pragma once

#include "common/device_limits.h"

namespace inverse_flow {

// Limits of the current device; returns the text of an error, or null.
const char* device_limits(DeviceLimits& limits);

// The GPU architectures this module holds code for, as the compiler's list of 10 x compute capability ("800,900").
const char* compiled_archs();
// CUDA_VERSION of the toolkit: 1000 x major + 10 x minor.
int compiled_cuda_version();

}  // namespace inverse_flow
