// Copies into shared memory that nobody waits for until wait_for_copies: PTX, and beside it an emulated twin. What was
// copied may be read after the wait (by the thread that copied it) and a barrier (by others); until then it may be
// there or not.
#pragma once

#include "device.cuh"

namespace inverse_flow {

#ifdef __CUDACC__

// 4, 8 or 16 bytes, aligned to as many. 16 bypass the L1 cache; fewer are parts of a sector that others want too.
template <int kBytes>
__device__ inline void copy_to_shared(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(kBytes) : "memory");
  }
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#else

// At once or as late as the GPU may, at the wait: which, is drawn.
template <int kBytes>
void copy_to_shared(void* shared, const void* global) {
  emulation::Block::current().put_off([=] { std::memcpy(shared, global, kBytes); });
}

inline void wait_for_copies() { emulation::Block::current().make_up_for(); }

#endif

}  // namespace inverse_flow
