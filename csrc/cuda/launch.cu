// The choice of the image type, and what only the CUDA compiler and the runtime can say.
#include <cuda_runtime.h>

#include "launch.h"

#define INVERSE_FLOW_TEXT(...) #__VA_ARGS__
#define INVERSE_FLOW_EXPANDED_TEXT(...) INVERSE_FLOW_TEXT(__VA_ARGS__)

namespace inverse_flow {

const char* launch_solve_float(const SolveProblem&, const SolvePlan&, void* stream);
const char* launch_solve_double(const SolveProblem&, const SolvePlan&, void* stream);
const char* launch_solve_bfloat16(const SolveProblem&, const SolvePlan&, void* stream);
const char* launch_solve_half(const SolveProblem&, const SolvePlan&, void* stream);

const char* launch_solve(const SolveProblem& problem, const SolvePlan& plan, void* stream) {
  switch (problem.image_type) {
    case ElementType::kFloat:
      return launch_solve_float(problem, plan, stream);
    case ElementType::kDouble:
      return launch_solve_double(problem, plan, stream);
    case ElementType::kBFloat16:
      return launch_solve_bfloat16(problem, plan, stream);
    default:
      return launch_solve_half(problem, plan, stream);
  }
}

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
