// The plans of both backends, for inverse_flow.explain.
#pragma once

#include <pybind11/pybind11.h>

namespace inverse_flow {

// Adds `plan_cpu` and `plan_cuda` to the module.
void define_plans(pybind11::module_& module);

}  // namespace inverse_flow
