// The little that the kernels need from CUDA beyond plain C++. The same kernels compile for the GPU, and for the
// CPU against tests/emulation/cuda_emulation.h, which defines the keywords, the barriers and the shuffles. Every
// line of PTX stands here, beside its emulated twin.
#pragma once

#include <cstdint>

#include "../../host_device.h"

#ifdef __CUDACC__
#define INVERSE_FLOW_UNROLL _Pragma("unroll")
#define INVERSE_FLOW_UNROLL_BY(n) _Pragma(INVERSE_FLOW_TEXT(unroll n))
#define INVERSE_FLOW_TEXT(text) #text
#else
#include "cuda_emulation.h"
#define INVERSE_FLOW_UNROLL
#define INVERSE_FLOW_UNROLL_BY(n)
#endif

namespace inverse_flow {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

#ifdef __CUDACC__

__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

__device__ inline float half_bits_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline uint16_t float_to_half_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ inline float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
// Sign, exponent and the upper 20 bits of the fraction.
__device__ inline uint32_t high_word(double value) { return static_cast<uint32_t>(__double2hiint(value)); }
__device__ inline double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

// What blocks tell each other: whoever has waited for a flag sees all that its store_release came after, in other
// threads too if barriers order them.
__device__ inline void store_release(int32_t* flag, int32_t value) {
  asm volatile("st.release.gpu.b32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
}
// Only the last read acquires: each that does empties L1. Between reads the others get the multiprocessor. A build with
// INVERSE_FLOW_MOST_POLLS, as that of `make gpu-check`, ends the kernel with an error where a flag is never set.
__device__ inline void wait_for_flag(const int32_t* flag) {
  int32_t value;
#ifdef INVERSE_FLOW_MOST_POLLS
  int32_t polls = 0;
#endif
  while (true) {
    asm volatile("ld.relaxed.gpu.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    if (value != 0) break;
#ifdef INVERSE_FLOW_MOST_POLLS
    if (++polls == INVERSE_FLOW_MOST_POLLS) __trap();
#endif
    __nanosleep(32);
  }
  asm volatile("ld.acquire.gpu.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
}

// Memory that no thread writes while the kernel runs may take the read-only path.
__device__ inline float load_readonly(const float* p) { return __ldg(p); }
__device__ inline double load_readonly(const double* p) { return __ldg(p); }

#endif

// kSize consecutive elements that move in one instruction.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T value[kSize];
};

#ifdef __CUDACC__
__device__ inline Pack<float, 4> load_readonly(const Pack<float, 4>* p) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline Pack<double, 2> load_readonly(const Pack<double, 2>* p) {
  const double2 v = __ldg(reinterpret_cast<const double2*>(p));
  return {{v.x, v.y}};
}

// A pack into global memory in one instruction: an assignment may become a store for each element.
template <typename T, int kSize>
__device__ inline void store_pack(Pack<T, kSize>* p, const Pack<T, kSize>& pack) {
  constexpr int kBytes = sizeof(T) * kSize;
  if constexpr (kBytes == 16) {
    uint4 words;
    memcpy(&words, &pack, kBytes);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    uint2 words;
    memcpy(&words, &pack, kBytes);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};"
                 :
                 : "l"(__cvta_generic_to_global(p)), "r"(words.x), "r"(words.y)
                 : "memory");
  } else {
    static_assert(kSize == 1);
    *p = pack;
  }
}
#else
template <typename T, int kSize>
void store_pack(Pack<T, kSize>* p, const Pack<T, kSize>& pack) {
  *p = pack;
}
template <typename T>
T load_readonly(const T* p) {
  return *p;
}
#endif

}  // namespace inverse_flow
