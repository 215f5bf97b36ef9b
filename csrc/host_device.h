// Marks the few functions of the plain headers that kernels call too.
#pragma once

#ifdef __CUDACC__
#define INVERSE_FLOW_HOST_DEVICE __host__ __device__
#else
#define INVERSE_FLOW_HOST_DEVICE
#endif
