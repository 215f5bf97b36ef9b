// The regimes of a solve on the GPU, and the choice among them. Each is a room: its plan says whether and how it can do
// a problem, what memory that takes and how many launches; its launch does it. Nothing else asks which regime it is.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>

#include "block/plan.h"
#include "common/problem.h"
#include "lanes/launch.h"
#include "lanes/plan.h"
#include "tensor/plan.h"

namespace inverse_flow {

using SolvePlan = std::variant<BlockPlan, LanesPlan, TensorPlan>;
// Places in it.
constexpr size_t kLanesRegime = 1;
constexpr size_t kTensorRegime = 2;

// Fewer channels would leave most of a 16 x 8 fragment empty. Unmeasured.
constexpr int64_t kMinTensorChannels = 9;

// The regime that was predicted to be fastest (docs/notes/predictions.md; unmeasured), among those that can be used.
// Nothing when not even one pixel fits: more channels in a group than the block's shared memory holds. `forced`: the
// place in SolvePlan of a regime to use, whether it pays or not, where it can be used at all, else the first.
inline std::optional<SolvePlan> plan_solve(const Shape& shape, int64_t state_bytes, const DeviceLimits& device,
                                           std::optional<size_t> forced = std::nullopt) {
  const auto wants = [&](size_t regime) { return forced.value_or(regime) == regime; };
  if (wants(kLanesRegime)) {
    if (const auto plan = plan_lanes(shape, state_bytes, device)) return *plan;
  }
  if (wants(kTensorRegime) && (forced.has_value() || shape.channels >= kMinTensorChannels)) {
    if (const auto plan = plan_tensor(shape, state_bytes, device)) return *plan;
  }
  if (const auto plan = plan_block(shape, state_bytes, device)) return *plan;
  return std::nullopt;
}

// Bytes of the workspace.
inline int64_t solve_workspace_bytes(const Shape& shape, const SolvePlan& plan, int64_t state_bytes) {
  return std::visit([&](const auto& chosen) { return chosen.workspace_bytes(shape, state_bytes); }, plan);
}

// Whether half-precision images need x unrounded beside the output.
inline bool state_needed(const SolvePlan& plan) {
  return std::visit([](const auto& chosen) { return chosen.needs_state(); }, plan);
}

inline int64_t solve_launches(const Shape& shape, const SolvePlan& plan, const int64_t* orders) {
  return std::visit([&](const auto& chosen) { return chosen.launches(shape, orders); }, plan);
}

// Calls see(name, values...) for every fact of the plan.
template <typename See>
void visit_plan(const Shape& shape, const SolvePlan& plan, int64_t state_bytes, const See& see) {
  std::visit([&](const auto& chosen) { chosen.visit(shape, state_bytes, see); }, plan);
}

// In block/launch.cu and tensor/launch.cu; that of a LanesPlan is in lanes/launch.h.
const char* launch(const SolveProblem& problem, const BlockPlan& plan, void* stream);
const char* launch(const SolveProblem& problem, const TensorPlan& plan, void* stream);

// The text of an error, or null.
inline const char* launch_solve(const SolveProblem& problem, const SolvePlan& plan, void* stream) {
  return std::visit([&](const auto& chosen) { return launch(problem, chosen, stream); }, plan);
}

}  // namespace inverse_flow
