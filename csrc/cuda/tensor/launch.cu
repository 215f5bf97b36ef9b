// The solve in the regime "tensor cores", of every image type whose state is float: doubles have no such plan.
#include "../regimes.h"
#include "launch.cuh"

namespace inverse_flow {

const char* launch(const SolveProblem& problem, const TensorPlan& plan, void* stream) {
  switch (problem.image_type) {
    case ElementType::kBFloat16:
      return run_tensor<BFloat16>(problem, plan, stream);
    case ElementType::kHalf:
      return run_tensor<Half>(problem, plan, stream);
    default:
      return run_tensor<float>(problem, plan, stream);
  }
}

}  // namespace inverse_flow
