// The solve of bfloat16 images: one file an image type, so that they compile side by side.
#include "sequence.cuh"

namespace inverse_flow {

const char* launch_solve_bfloat16(const SolveProblem& problem, const SolvePlan& plan, void* stream) {
  return run_solve<BFloat16>(problem, plan, stream);
}

}  // namespace inverse_flow
