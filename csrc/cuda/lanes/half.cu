// The solve of half images in the regime "lanes": one file per image type, so that they compile side by side.
#include "launch.cuh"

namespace inverse_flow {

const char* launch_lanes_half(const SolveProblem& problem, const LanesPlan& plan, void* stream) {
  return run_lanes<Half>(problem, plan, stream);
}

}  // namespace inverse_flow
