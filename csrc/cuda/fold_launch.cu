// The launches that fold the corner before a solve, for groups too large to be folded by every block.
#include "sequence.cuh"

namespace inverse_flow {

template <typename State>
const char* run_fold(const FoldArguments<State>& args, int64_t groups, int threads, void* stream) {
  const unsigned groups_y = static_cast<unsigned>(groups);
  if (args.shape.corner != kIdentity && args.plan.fold_shared_bytes == 0) {
    const char* error = launch_kernel(invert_corner_kernel<State>, {1, groups_y, 1}, threads, 0, args, stream);
    if (error != nullptr) return error;
  }
  return launch_kernel(fold_taps_kernel<State>, {static_cast<unsigned>(args.plan.fold_blocks), groups_y, 1}, threads,
                       args.plan.fold_shared_bytes, args, stream);
}

const char* launch_fold(const FoldArguments<float>& args, int64_t groups, int threads, void* stream) {
  return run_fold(args, groups, threads, stream);
}

const char* launch_fold(const FoldArguments<double>& args, int64_t groups, int threads, void* stream) {
  return run_fold(args, groups, threads, stream);
}

}  // namespace inverse_flow
