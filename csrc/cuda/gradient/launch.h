// The gradient of weight and bias, behind the transposed solve.
#pragma once

#include "../common/problem.h"
#include "plan.h"

namespace inverse_flow {

const char* launch_gradient(const GradientProblem& problem, const GradientPlan& plan, void* stream);

}  // namespace inverse_flow
