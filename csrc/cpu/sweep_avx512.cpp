// The CPU kernels for AVX-512.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "isa.h"
#include "sweep.h"

#if INVERSE_FLOW_X86
#include <immintrin.h>

// Only what follows may use these instructions: the headers above are shared with code that runs everywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define INVERSE_FLOW_ISA avx512
#define INVERSE_FLOW_VECTOR_BYTES 64
#define INVERSE_FLOW_HAS_F16C 1
#include "sweep_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
