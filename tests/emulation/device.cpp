// The other side of the binding for its test: all kernels, and what device.cu says, with the emulator for a GPU.
#include "device.h"

#include "block/launch.cu"
#include "gradient/launch.cu"
#include "lanes/bfloat16.cu"
#include "lanes/float.cu"
#include "lanes/half.cu"
#include "tensor/launch.cu"

namespace inverse_flow {

// A small GPU: images of a few hundred pixels need several tiles.
const char* device_limits(DeviceLimits& limits) {
  limits = {128, 6 * 1024, 4};
  return nullptr;
}

}  // namespace inverse_flow

// What PyTorch with CUDA would answer: the default stream.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
