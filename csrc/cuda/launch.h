// What the binding calls: plain data in, an error text or null out. No torch and no CUDA header on this side.
#pragma once

#include <cstdint>

#include "../params.h"
#include "element_type.h"
#include "orders.h"
#include "plan.h"
#include "plan_gradient.h"

namespace inverse_flow {

struct SolveProblem {
  Shape shape;
  const int64_t* orders;  // one a group
  ElementType image_type;
  const void* input;
  Strides input_strides;
  void* output;
  Strides output_strides;
  const void* weight;  // contiguous
  const void* bias;    // contiguous, of the weight's type; may be null
  ElementType weight_type;
  // x in the state type, contiguous, for half-precision images when state_needed says so or the caller wants it; else
  // null.
  void* state;
  void* workspace;  // solve_workspace_bytes of memory; null if that is 0
  bool allow_tf32;  // tensor cores multiply once, in TF32; else three times, which is as exact as float32
};

struct GradientProblem {
  Shape shape;  // of the solve whose gradient this is
  const int64_t* orders;
  ElementType output_type;
  const void* output;  // x
  Strides output_strides;
  ElementType adjoint_type;
  const void* adjoint;  // u
  Strides adjoint_strides;
  ElementType weight_type;
  void* weight_gradient;  // contiguous
  void* bias_gradient;    // contiguous
  void* workspace;        // gradient_workspace_bytes of memory
  bool allow_tf32;        // as of the solve
};

// Limits of the current device.
const char* device_limits(DeviceLimits& limits);

// Where the parts of the workspace of a solve begin.
struct SolveWorkspace {
  int64_t folded;
  int64_t inversions;
  int64_t bytes;  // 0 when the blocks fold for themselves, and need not wait for each other
};

inline SolveWorkspace solve_workspace(const Shape& shape, const SolvePlan& plan, int64_t state_bytes) {
  if (plan.regime == SolveRegime::kLanes) return {0, 0, lanes_workspace_bytes(shape, plan.lanes)};
  if (plan.fold_in_block) return {0, 0, 0};
  const int64_t inverses = shape.corner == kIdentity || plan.fold_shared_bytes > 0 ? 0 : shape.groups;
  SolveWorkspace part{};
  part.folded = 0;
  part.inversions = round_up(shape.groups * plan.folded_elements(shape.channels) * state_bytes, 16);
  part.bytes = part.inversions + inverses * inversion_bytes(shape.channels);
  return part;
}

// Half-precision images of several tiles: the later tiles read the earlier ones unrounded.
inline bool state_needed(const SolvePlan& plan, bool half_precision) { return half_precision && !plan.single_tile(); }

// None when every block writes its part of the gradient itself.
inline int64_t gradient_workspace_elements(const Shape& shape, const GradientPlan& plan) {
  return plan.is_direct() ? 0 : plan.splits * gradient_elements(shape);
}

// ---- What is launched ----

// The limit of gridDim.x.
constexpr int64_t kMaxGridX = 2147483647;

// Calls body(first group, groups, their orders), chunk by chunk, until an error.
template <typename Body>
const char* for_each_group_chunk(const Shape& shape, const int64_t* orders, Body body) {
  const char* error = nullptr;
  int64_t groups = 0;
  for (int64_t first = 0; first < shape.groups && error == nullptr; first += groups) {
    const GroupOrders chunk = group_orders(orders, first, shape.groups, groups);
    error = body(first, groups, chunk);
  }
  return error;
}

// Launches of one chunk's fold before the solve: the folded taps, and before them corners too large for shared memory.
inline int64_t fold_launches(const Shape& shape, const SolvePlan& plan) {
  if (plan.fold_in_block) return 0;
  return shape.corner != kIdentity && plan.fold_shared_bytes == 0 ? 2 : 1;
}

inline int64_t chunks(const Shape& shape, const int64_t* orders) {
  int64_t count = 0;
  for_each_group_chunk(shape, orders, [&](int64_t, int64_t, const GroupOrders&) -> const char* {
    ++count;
    return nullptr;
  });
  return count;
}

// Launches of a solve, and of the gradient behind one.
inline int64_t solve_launches(const Shape& shape, const SolvePlan& plan, const int64_t* orders) {
  if (plan.regime == SolveRegime::kLanes) {
    // All tiles are one launch; the flags by which they wait for each other are cleared before it.
    return plan.single_tile() ? chunks(shape, orders) * divide_up(shape.batch, kMaxGridX * plan.images)
                              : chunks(shape, orders) + 1;
  }
  const int64_t diagonals = plan.tiles_h + plan.tiles_w - 1;
  const int64_t batches = divide_up(shape.batch, kMaxGridX * plan.images);
  return chunks(shape, orders) * (fold_launches(shape, plan) + diagonals * batches);
}
inline int64_t gradient_launches(const Shape& shape, const GradientPlan& plan, const int64_t* orders) {
  return chunks(shape, orders) * (plan.is_direct() ? 1 : 2);
}

const char* launch_solve(const SolveProblem& problem, const SolvePlan& plan, void* stream);
const char* launch_gradient(const GradientProblem& problem, const GradientPlan& plan, void* stream);

// The GPU architectures this module holds code for, as the compiler's list of 10 x compute capability ("800,900").
const char* compiled_archs();
// CUDA_VERSION of the toolkit: 1000 x major + 10 x minor.
int compiled_cuda_version();

}  // namespace inverse_flow
