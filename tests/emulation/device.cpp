// What csrc/cuda/device.cu says on a GPU, with the emulator in its place.
#include "device.h"

namespace inverse_flow {

// For the binding's test a small GPU: images of a few hundred pixels need several tiles.
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
