// The solve in the regime "lanes", by the image type. Doubles have no such kernel, and no such plan.
#pragma once

#include "../common/problem.h"
#include "plan.h"

namespace inverse_flow {

// Each in a file of its own, so that they compile side by side.
const char* launch_lanes_float(const SolveProblem& problem, const LanesPlan& plan, void* stream);
const char* launch_lanes_bfloat16(const SolveProblem& problem, const LanesPlan& plan, void* stream);
const char* launch_lanes_half(const SolveProblem& problem, const LanesPlan& plan, void* stream);

inline const char* launch(const SolveProblem& problem, const LanesPlan& plan, void* stream) {
  switch (problem.image_type) {
    case ElementType::kBFloat16:
      return launch_lanes_bfloat16(problem, plan, stream);
    case ElementType::kHalf:
      return launch_lanes_half(problem, plan, stream);
    default:
      return launch_lanes_float(problem, plan, stream);
  }
}

}  // namespace inverse_flow
