// What the solve would do with a problem: the very plans that the backends run, as Python dicts. The CUDA plan is made
// here too, without CUDA, from the limits of any GPU.
#include "explain.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace inverse_flow {

namespace {

// (batch, groups, channels a group, height, width, kernel_h, kernel_w)
using Sizes = std::array<int64_t, 7>;

Shape shape_of(const Sizes& sizes, int64_t corner, bool backward) {
  // The backward pass is first of all the transposed solve.
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], static_cast<Corner>(corner), backward};
}

template <class IO, class T>
py::dict plan_cpu_as(const Shape& shape, int64_t threads, bool backward) {
  const cpu::Kernels<IO, T>& kernels = cpu::isa_in_use().kernels;
  py::dict found;
  found["isa"] = cpu::isa_in_use().name;
  found["workers"] = 0;
  if (shape.batch == 0) return found;
  const cpu::Plan plan = cpu::make_plan(shape, backward, kernels.min_lanes, kernels.max_lanes, sizeof(T), threads);
  cpu::Problem<IO, T> problem{};
  problem.shape = shape;
  problem.with_gradient = backward;
  const int64_t line_steps = plan.by_rows ? cpu::band_steps(shape, plan.lanes) : shape.width;
  found["rows"] = plan.by_rows;
  found["lanes"] = plan.lanes;
  found["units"] = plan.units * shape.groups * (plan.by_rows ? shape.batch : 1);
  found["workers"] = plan.workers;
  found["steps"] = plan.by_rows ? line_steps : line_steps * shape.height;
  found["joined"] = plan.by_rows && plan.rows.joined;
  found["thread_bytes"] = cpu::thread_scratch(kernels, plan, problem);
  found["halo_bytes"] = plan.jobs * cpu::halo_elements(shape, plan) * static_cast<int64_t>(sizeof(T));
  found["sum_bytes"] = plan.sets * cpu::sum_sizes(shape, backward).total() * static_cast<int64_t>(sizeof(T));
  return found;
}

py::dict plan_cpu(const Sizes& sizes, int64_t corner, const std::string& type, int64_t threads, bool backward) {
  const Shape shape = shape_of(sizes, corner, backward);
  if (type == "float64") return plan_cpu_as<double, double>(shape, threads, backward);
  if (type == "bfloat16") return plan_cpu_as<cpu::BFloat16, float>(shape, threads, backward);
  if (type == "float16") return plan_cpu_as<cpu::Float16, float>(shape, threads, backward);
  return plan_cpu_as<float, float>(shape, threads, backward);
}

py::dict plan_cuda(const Sizes& sizes, const std::vector<int64_t>& orders, int64_t corner, const std::string& type,
                   bool backward, int32_t threads_per_block, int64_t shared_bytes, int32_t multiprocessors,
                   int32_t forced_regime) {
  const Shape shape = shape_of(sizes, corner, backward);
  const int64_t state_bytes = type == "float64" ? 8 : 4;
  const bool half_precision = type == "bfloat16" || type == "float16";
  const DeviceLimits limits{threads_per_block, shared_bytes, multiprocessors, forced_regime};
  SolvePlan plan{};
  py::dict found;
  found["fits"] = plan_solve(shape, state_bytes, limits, plan);
  if (!found["fits"].cast<bool>() || shape.batch == 0) return found;

  const int64_t diagonal_tiles = std::min(plan.tiles_h, plan.tiles_w);
  int64_t scratch = solve_workspace(shape, plan, state_bytes).bytes;
  if (half_precision && (backward || state_needed(plan, half_precision))) {
    scratch += shape.batch * shape.groups * shape.channels * shape.height * shape.width * state_bytes;
  }
  const bool lanes = plan.regime == SolveRegime::kLanes;
  found["regime"] = static_cast<int32_t>(plan.regime);
  found["tile"] = py::make_tuple(plan.tile_h, plan.tile_w);
  found["tiles"] = py::make_tuple(plan.tiles_h, plan.tiles_w);
  found["images"] = plan.images;
  found["pack"] = plan.pack;
  found["channel_threads"] = plan.channel_threads;
  found["diagonal_threads"] = plan.diagonal_threads;
  found["threads"] = plan.threads;
  found["blocks"] =
      divide_up(shape.batch, plan.images) * shape.groups * (lanes ? plan.tiles_h * plan.tiles_w : diagonal_tiles);
  found["shared_bytes"] = plan.shared_bytes;
  found["weights_in_shared"] = plan.weights_in_shared;
  found["fold_launches"] = fold_launches(shape, plan);
  found["fold_blocks"] = plan.fold_in_block ? 0 : plan.fold_blocks * shape.groups;
  found["folded_bytes"] = plan.folded_elements(shape.channels) * shape.groups * state_bytes;
  found["launches"] = solve_launches(shape, plan, orders.data());
  found["steps"] = lanes ? plan.lanes.steps() : plan.taps_h * plan.taps_w > 1 ? plan.tile_h + plan.tile_w - 1 : 0;
  found["bands"] = lanes ? plan.lanes.bands : 0;
  found["scratch_bytes"] = scratch;
  if (plan.regime == SolveRegime::kTensor) {
    const TensorPlan& tensor = plan.tensor;
    py::dict part;
    part["output_tiles"] = tensor.output_tiles;
    part["k_steps"] = tensor.k_steps;
    part["resident_steps"] = tensor.resident_steps;
    part["splits"] = tensor.splits;
    part["job_warps"] = tensor.job_warps;
    part["finish_warps"] = tensor.finish_warps;
    part["whole_images"] = tensor.whole_images;
    found["tensor"] = part;
  }
  if (!backward) return found;

  // The gradient is that of the plain solve; its plan does not depend on which of the two is transposed.
  const GradientPlan gradient = plan_weight_gradient(shape, state_bytes, limits);
  py::dict second;
  second["tensor_cores"] = gradient.tensor_cores;
  second["channels"] = py::make_tuple(gradient.block_outputs, gradient.block_inputs);
  second["window"] = py::make_tuple(gradient.window_h, gradient.window_w * gradient.strip);
  second["images"] = gradient.images;
  second["tile"] = py::make_tuple(gradient.tile_h, gradient.tile_w);
  second["tiles"] = gradient.pixel_tiles();
  second["teams"] = gradient.teams;
  second["threads"] = gradient.threads;
  second["splits"] = gradient.splits;
  second["blocks"] = gradient.splits * gradient.blocks() * shape.groups;
  second["shared_bytes"] = gradient.shared_bytes;
  second["launches"] = gradient_launches(shape, gradient, orders.data());
  second["scratch_bytes"] = gradient_workspace_elements(shape, gradient) * state_bytes;
  found["gradient"] = second;
  return found;
}

}  // namespace

void define_plans(py::module_& module) {
  module.def("plan_cpu", &plan_cpu);
  module.def("plan_cuda", &plan_cuda);
}

}  // namespace inverse_flow
