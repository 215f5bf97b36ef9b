#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace inverse_flow::cpu {

namespace {

bool supported(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#if INVERSE_FLOW_X86
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

Isa choose() {
  const char* forced = std::getenv("INVERSE_FLOW_CPU_ISA");
  Isa best = Isa::kPortable;
  std::string names;
  for (const Isa isa : compiled_isas()) {
    if (forced && std::string(forced) == isa_name(isa)) {
      if (supported(isa)) return isa;
      throw std::runtime_error(std::string("INVERSE_FLOW_CPU_ISA=") + forced + ", but this processor has no " + forced);
    }
    if (supported(isa)) best = isa;
    names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  if (forced && *forced) {
    throw std::runtime_error(std::string("INVERSE_FLOW_CPU_ISA must be one of ") + names + ", got " + forced);
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

std::vector<Isa> compiled_isas() {
#if INVERSE_FLOW_X86
  return {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};
#else
  return {Isa::kPortable};
#endif
}

Isa isa_in_use() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace inverse_flow::cpu
