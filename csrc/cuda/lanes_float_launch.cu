// The solve of float images in the regime kLanes: one file an image type, so that they compile side by side.
#include "sequence_lanes.cuh"

namespace inverse_flow {

template const char* run_lanes<float>(const SolveProblem&, const SolvePlan&, void*);

}  // namespace inverse_flow
