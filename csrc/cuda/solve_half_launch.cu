// The solve of half images: one file an image type, so that they compile side by side.
#include "sequence.cuh"

namespace inverse_flow {

const char* launch_solve_half(const SolveProblem& problem, const SolvePlan& plan, void* stream) {
  return run_solve<Half>(problem, plan, stream);
}

}  // namespace inverse_flow
