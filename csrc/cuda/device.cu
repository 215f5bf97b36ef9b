#include <cuda_runtime.h>

#include "device.h"

#define INVERSE_FLOW_TEXT(...) #__VA_ARGS__
#define INVERSE_FLOW_EXPANDED_TEXT(...) INVERSE_FLOW_TEXT(__VA_ARGS__)

namespace inverse_flow {

const char* device_limits(DeviceLimits& limits) {
  int device = 0;
  int shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits.threads_per_block, cudaDevAttrMaxThreadsPerBlock, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  limits.shared_bytes = shared_bytes;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* compiled_archs() { return INVERSE_FLOW_EXPANDED_TEXT(__CUDA_ARCH_LIST__); }
int compiled_cuda_version() { return CUDART_VERSION; }

}  // namespace inverse_flow
