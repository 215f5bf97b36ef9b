// The solve in the regime "block", of every image type.
#include "../regimes.h"
#include "launch.cuh"

namespace inverse_flow {

const char* launch(const SolveProblem& problem, const BlockPlan& plan, void* stream) {
  switch (problem.image_type) {
    case ElementType::kFloat:
      return run_block<float>(problem, plan, stream);
    case ElementType::kDouble:
      return run_block<double>(problem, plan, stream);
    case ElementType::kBFloat16:
      return run_block<BFloat16>(problem, plan, stream);
    default:
      return run_block<Half>(problem, plan, stream);
  }
}

}  // namespace inverse_flow
