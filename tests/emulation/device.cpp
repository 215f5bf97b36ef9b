// The other side of csrc/cuda/launch.h for the binding's test: what launch.cu holds, with the emulator for a GPU.
#include "fold_launch.cu"
#include "gradient_launch.cu"
#include "lanes_bfloat16_launch.cu"
#include "lanes_float_launch.cu"
#include "lanes_half_launch.cu"
#include "solve_bfloat16_launch.cu"
#include "solve_double_launch.cu"
#include "solve_float_launch.cu"
#include "solve_half_launch.cu"

namespace inverse_flow {

// A small GPU: images of a few hundred pixels need several tiles.
const char* device_limits(DeviceLimits& limits) {
  limits = {128, 6 * 1024, 4, -1};
  return nullptr;
}

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

}  // namespace inverse_flow

// What PyTorch with CUDA would answer: the default stream.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
