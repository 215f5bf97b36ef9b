#include <cuda_runtime.h>

#include "pattern.h"

constexpr int kMaxThreads = 256;

__global__ void solve_channel(Pattern pattern, int diagonal, int channel) {
  for (int image = threadIdx.x; image < pattern.batch; image += blockDim.x) {
    solve_value(pattern, diagonal, channel, blockIdx.x, image);
  }
}

// Returns 0, or the number of the CUDA error.
int solve(const Pattern& pattern) {
  const int threads = pattern.batch < kMaxThreads ? pattern.batch : kMaxThreads;
  return for_each_launch(pattern, [&](int diagonal, int channel, int pixels) -> int {
    solve_channel<<<pixels, threads>>>(pattern, diagonal, channel);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaDeviceSynchronize() : error;
  });
}
