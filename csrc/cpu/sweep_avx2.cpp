// The CPU kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#define INVERSE_FLOW_ISA avx2
#define INVERSE_FLOW_TARGET "avx2,fma,f16c"
#define INVERSE_FLOW_VECTOR_BYTES 32
#define INVERSE_FLOW_HAS_F16C 1
#include "sweep_impl.h"
#endif
