// Which instruction set the CPU kernels run with, decided once, when first asked.
#pragma once

#include <vector>

#if defined(__x86_64__)
#define INVERSE_FLOW_X86 1
#else
#define INVERSE_FLOW_X86 0
#endif

namespace inverse_flow::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// Those compiled into this library, the plainest first.
std::vector<Isa> compiled_isas();

// The best compiled set that this processor has, or the one named by the environment variable INVERSE_FLOW_CPU_ISA.
// Throws std::runtime_error when that names one that is unknown, not compiled in, or not supported by the processor.
Isa isa_in_use();

}  // namespace inverse_flow::cpu
