// Which instruction set the CPU kernels run with, decided once, when first asked.
#pragma once

#include <string>
#include <vector>

#include "sweep.h"

#if defined(__x86_64__)
#define INVERSE_FLOW_X86 1
#else
#define INVERSE_FLOW_X86 0
#endif

namespace inverse_flow::cpu {

struct Isa {
  const char* name;
  KernelSet kernels;
};

// The best set compiled into this library that this processor has, or the one named by the environment variable
// INVERSE_FLOW_CPU_ISA. Throws std::runtime_error when that names one that is unknown, not compiled in, or not
// supported by the processor.
const Isa& isa_in_use();

// The names of those compiled into this library, the plainest first.
std::vector<std::string> compiled_isas();

}  // namespace inverse_flow::cpu
