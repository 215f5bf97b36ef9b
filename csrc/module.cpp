// The Python module inverse_flow._C. Importing it registers the operators of ops.cpp and the CPU kernels; what it
// carries itself is only the description of the build, and of what a solve would do (explain.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/isa.h"
#include "explain.h"

namespace py = pybind11;

namespace {

// Why the build left the CUDA module out, as setup.py recorded it; the numbers are its CudaStatus.
std::string cuda_left_out() {
  switch (INVERSE_FLOW_CUDA_STATUS) {
    case 0:
      return "";
    case 1:
      return "the PyTorch of the build had no CUDA";
    case 2:
      return "the build found no CUDA toolkit";
    default:
      return "the build was told FORCE_CUDA=0";
  }
}

py::dict build_info() {
  py::dict info;
  info["torch_built_with"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu_isa"] = inverse_flow::cpu::isa_in_use().name;
  info["cpu_isas"] = inverse_flow::cpu::compiled_isas();
  info["cuda_absent"] = cuda_left_out();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of inverse_flow";
  m.def("build_info", &build_info);
  inverse_flow::define_plans(m);
}
