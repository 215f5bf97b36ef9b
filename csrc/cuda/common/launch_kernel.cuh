// One kernel launch on the GPU: opt in to the shared memory, launch, check. And memory cleared before one. On the CPU
// the emulation has both, so the tests run the very launches.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstdint>

namespace inverse_flow {

// Every GPU grants this much without being asked.
constexpr int64_t kSharedBytesWithoutOptIn = 48 * 1024;

// Lets a kernel ask for as much shared memory as the device has. Always the same amount: host threads that launch one
// kernel with different sizes would else take it from each other.
inline cudaError_t opt_in_to_shared_memory(const void* kernel) {
  int device = 0;
  int bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error;
}

// Returns the text of the error, or null.
template <typename Arguments>
const char* launch_kernel(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared_bytes,
                          const Arguments& arguments, void* stream) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedBytesWithoutOptIn) {
    error = opt_in_to_shared_memory(reinterpret_cast<const void*>(kernel));
  }
  if (error == cudaSuccess) {
    kernel<<<grid, dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared_bytes),
             static_cast<cudaStream_t>(stream)>>>(arguments);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* clear_memory(void* memory, int64_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace inverse_flow

#endif
