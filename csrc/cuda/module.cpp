// Makes the CUDA module importable, and says what it was compiled for.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "device.h"

namespace {

// "800,900" -> ["8.0", "9.0"]
pybind11::list archs() {
  pybind11::list result;
  const std::string text = inverse_flow::compiled_archs();
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const int number = std::stoi(text.substr(begin, end - begin));
    result.append(std::to_string(number / 100) + "." + std::to_string(number / 10 % 10));
    begin = end + 1;
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    const int version = inverse_flow::compiled_cuda_version();
    info["cuda_toolkit"] = std::to_string(version / 1000) + "." + std::to_string(version / 10 % 100);
    info["cuda_archs"] = archs();
    return info;
  });
}
