// The gradients of weight and bias, in both state types.
#include "launch.cuh"
#include "launch.h"

namespace inverse_flow {

const char* launch_gradient(const GradientProblem& problem, const GradientPlan& plan, void* stream) {
  return problem.output_type == ElementType::kDouble ? run_gradient<double>(problem, plan, stream)
                                                     : run_gradient<float>(problem, plan, stream);
}

}  // namespace inverse_flow
