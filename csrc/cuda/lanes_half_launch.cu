// The solve of half images in the regime kLanes: one file an image type, so that they compile side by side.
#include "sequence_lanes.cuh"

namespace inverse_flow {

template const char* run_lanes<Half>(const SolveProblem&, const SolvePlan&, void*);

}  // namespace inverse_flow
