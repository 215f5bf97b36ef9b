// The other side of csrc/cuda/launch.h: what launch.cu holds, with the emulator for a GPU.
#include "launch.h"

namespace inverse_flow {

// As launch.cu declares them.
const char* launch_solve_float(const SolveProblem&, const SolvePlan&, void* stream);
const char* launch_solve_double(const SolveProblem&, const SolvePlan&, void* stream);
const char* launch_solve_bfloat16(const SolveProblem&, const SolvePlan&, void* stream);
const char* launch_solve_half(const SolveProblem&, const SolvePlan&, void* stream);

// For the binding's test a small GPU: images of a few hundred pixels need several tiles.
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
