// The CPU kernels for any processor the compiler targets by default.
#define INVERSE_FLOW_ISA portable
#define INVERSE_FLOW_VECTOR_BYTES 16
#define INVERSE_FLOW_HAS_F16C 0
#include "sweep_impl.h"
