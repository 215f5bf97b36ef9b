// What the solve would do with a problem: the very plans that the backends run, as Python dicts. The CUDA plan is made
// here too, without CUDA, from the limits of any GPU. Names are the plans' own.
#include "explain.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cuda/gradient/plan.h"
#include "cuda/regimes.h"

namespace py = pybind11;

namespace inverse_flow {

namespace {

// (batch, groups, channels per group, depth, height, width, kernel_d, kernel_h, kernel_w)
using Sizes = std::array<int64_t, 9>;

Shape shape_of(const Sizes& sizes, int64_t corner, bool backward) {
  // The backward pass is first of all the transposed solve.
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
          sizes[5], sizes[6], sizes[7], sizes[8], static_cast<Corner>(corner),
          backward};
}

// Takes a plan's facts into a dict: several values as a tuple, "part.name" into a dict of the part.
struct Facts {
  py::dict facts;

  template <typename... Values>
  void operator()(const std::string& name, const Values&... values) const {
    const size_t dot = name.find('.');
    if (dot != std::string::npos) {
      const py::str part(name.substr(0, dot));
      if (!facts.contains(part)) facts[part] = py::dict();
      return Facts{facts[part]}(name.substr(dot + 1), values...);
    }
    if constexpr (sizeof...(values) == 1) {
      facts[name.c_str()] = (values, ...);
    } else {
      facts[name.c_str()] = py::make_tuple(values...);
    }
  }
};

template <class IO, class T>
py::dict plan_cpu_as(const Shape& shape, int64_t threads, bool backward) {
  const Facts see;
  see("isa", cpu::isa_in_use().name);
  see("threads", threads);
  if (shape.batch == 0) {
    see("regime", "nothing to do");
    return see.facts;
  }
  const cpu::Kernels<IO, T>& kernels = cpu::isa_in_use().kernels;
  const auto see_part = [&](int64_t images, const Facts& facts) {
    cpu::Problem<IO, T> problem{};
    problem.shape = shape;
    problem.shape.batch = images;
    problem.with_gradient = backward;
    const Shape& part = problem.shape;
    const cpu::Plan plan = cpu::make_plan(part, backward, kernels, threads);
    plan.visit(part, facts);
    const int64_t kept =
        plan.jobs * cpu::halo_elements(part, plan) + plan.sets * cpu::sum_sizes(part, backward).total();
    facts("scratch_bytes", plan.workers * static_cast<int64_t>(cpu::thread_scratch(kernels, plan, problem)) +
                               kept * static_cast<int64_t>(sizeof(T)));
  };
  const int64_t first = cpu::first_part(shape, backward, kernels, threads);
  see_part(first, see);
  if (first < shape.batch) {
    const Facts rest;
    rest("batch", shape.batch - first);
    see_part(shape.batch - first, rest);
    see("rest", rest.facts);
  }
  return see.facts;
}

py::dict plan_cpu(const Sizes& sizes, int64_t corner, const std::string& type, int64_t threads, bool backward) {
  const Shape shape = shape_of(sizes, corner, backward);
  if (type == "float64") return plan_cpu_as<double, double>(shape, threads, backward);
  if (type == "bfloat16") return plan_cpu_as<cpu::BFloat16, float>(shape, threads, backward);
  if (type == "float16") return plan_cpu_as<cpu::Float16, float>(shape, threads, backward);
  return plan_cpu_as<float, float>(shape, threads, backward);
}

// Nothing where no plan fits the GPU.
std::optional<py::dict> plan_cuda(const Sizes& sizes, const std::vector<int64_t>& orders, int64_t corner,
                                  const std::string& type, bool backward, int32_t threads_per_block,
                                  int64_t shared_bytes, int32_t multiprocessors, std::optional<size_t> regime) {
  const Shape shape = shape_of(sizes, corner, backward);
  const int64_t state_bytes = type == "float64" ? 8 : 4;
  const bool half_precision = type == "bfloat16" || type == "float16";
  const DeviceLimits limits{threads_per_block, shared_bytes, multiprocessors};
  const std::optional<SolvePlan> plan = plan_solve(shape, state_bytes, limits, regime);
  if (!plan.has_value()) return std::nullopt;

  const Facts see;
  if (shape.batch == 0) {
    see("regime", "nothing to do");
    see("launches", 0);
    return see.facts;
  }
  visit_plan(shape, *plan, state_bytes, see);
  int64_t launches = solve_launches(shape, *plan, orders.data());
  int64_t scratch = solve_workspace_bytes(shape, *plan, state_bytes);
  if (half_precision && (backward || state_needed(*plan))) {
    scratch += shape.batch * shape.groups * shape.channels * shape.height * shape.width * state_bytes;
  }
  if (backward) {
    // The gradient is that of the plain solve; its plan does not depend on which of the two is transposed.
    const GradientPlan gradient = plan_weight_gradient(shape, state_bytes, limits);
    const int64_t gradient_launches = gradient.launches(shape, orders.data());
    const int64_t gradient_scratch = gradient.workspace_elements(shape) * state_bytes;
    const Facts part;
    gradient.visit(shape, part);
    part("launches", gradient_launches);
    part("scratch_bytes", gradient_scratch);
    see("gradient", part.facts);
    launches += gradient_launches;
    scratch += gradient_scratch;
  }
  see("launches", launches);
  see("scratch_bytes", scratch);
  return see.facts;
}

}  // namespace

void define_plans(py::module_& module) {
  module.def("plan_cpu", &plan_cpu);
  module.def("plan_cuda", &plan_cuda);
}

}  // namespace inverse_flow
