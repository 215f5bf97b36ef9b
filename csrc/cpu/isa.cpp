#include "isa.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

// The instruction sets that the kernels are compiled for, the plainest first, and whether a processor has them. One
// more is one more row, and a file like sweep_avx2.cpp that compiles the kernels in the namespace of that name.
#define INVERSE_FLOW_PORTABLE(ROW) ROW(portable, true)
#if INVERSE_FLOW_X86
#define INVERSE_FLOW_ISAS(ROW)                                                                                 \
  INVERSE_FLOW_PORTABLE(ROW)                                                                                   \
  ROW(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) \
  ROW(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                       \
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&                  \
                  __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#else
#define INVERSE_FLOW_ISAS(ROW) INVERSE_FLOW_PORTABLE(ROW)
#endif

namespace inverse_flow::cpu {

#define INVERSE_FLOW_DECLARE(name, supported) \
  namespace name {                            \
  KernelSet kernel_set();                     \
  }
INVERSE_FLOW_ISAS(INVERSE_FLOW_DECLARE)

namespace {

struct Row {
  const char* name;
  bool (*supported)();
  // To be called where it is supported only.
  KernelSet (*kernels)();
};

#define INVERSE_FLOW_ROW(name, supported) {#name, [] { return static_cast<bool>(supported); }, &name::kernel_set},
constexpr Row kRows[] = {INVERSE_FLOW_ISAS(INVERSE_FLOW_ROW)};

const Row& choose() {
  const char* const variable = std::getenv("INVERSE_FLOW_CPU_ISA");
  const std::string forced = variable ? variable : "";
  const Row* best = nullptr;
  std::string names;
  for (const Row& row : kRows) {
    if (forced == row.name) {
      if (row.supported()) return row;
      throw std::runtime_error("INVERSE_FLOW_CPU_ISA=" + forced + ", but this processor has no " + forced);
    }
    if (row.supported()) best = &row;
    names += (names.empty() ? "" : ", ") + std::string(row.name);
  }
  if (!forced.empty()) {
    throw std::runtime_error("INVERSE_FLOW_CPU_ISA must be one of " + names + ", got " + forced);
  }
  return *best;
}

}  // namespace

int64_t slab_bytes() {
  // Nothing, or zero, where the system does not say; larger ones were no faster with 2 MiB of L2.
  static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE) * 3 / 8, 192 << 10, 400 << 10);
  return bytes;
}

const Isa& isa_in_use() {
  static const Isa isa = [] {
    const Row& row = choose();
    return Isa{row.name, row.kernels()};
  }();
  return isa;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Row& row : kRows) names.push_back(row.name);
  return names;
}

}  // namespace inverse_flow::cpu
