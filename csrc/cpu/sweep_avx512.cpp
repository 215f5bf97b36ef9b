// The CPU kernels for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#define INVERSE_FLOW_ISA avx512
#define INVERSE_FLOW_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define INVERSE_FLOW_VECTOR_BYTES 64
#define INVERSE_FLOW_HAS_F16C 1
#include "sweep_impl.h"
#endif
