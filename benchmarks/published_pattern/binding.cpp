#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "pattern.h"

int solve(const Pattern& pattern);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("solve", [](std::uintptr_t y, std::uintptr_t w, std::uintptr_t x, int batch, int channels, int height,
                    int width, int kernel, bool transposed) {
    const int error = solve({reinterpret_cast<const float*>(y), reinterpret_cast<const float*>(w),
                             reinterpret_cast<float*>(x), batch, channels, height, width, kernel, transposed});
    if (error != 0) throw std::runtime_error("published pattern: CUDA error " + std::to_string(error));
  });
}
