// CUDA on the CPU, as far as the kernels of csrc/cuda need it: enough to run them, a few blocks side by side, and to
// catch what a GPU would not tell.
//
// A block's threads are fibers. A thread runs until it meets a barrier or a shuffle, or waits for a flag; who runs next
// is drawn from a seeded generator, as is the order of the blocks. So a missing barrier makes the result depend on the
// seed. Shared
// memory is allocated afresh for each block, at its exact size and full of NaN, so that AddressSanitizer sees an index
// past its end and a read of memory that nothing wrote spoils the result. A thread that ends, or waits at another kind
// of barrier, while others wait for it is an error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "stack_switch.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else  // the binding's test runs inside Python, without sanitizers
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_unpoison_memory_region(const volatile void*, size_t) {}
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

inline dim3 threadIdx;
inline dim3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace inverse_flow::emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;
// Blocks of a launch that run at a time: some wait for others, and none may do so in vain.
constexpr size_t kResidentBlocks = 3;
// A thread that has looked at a flag so many times looks at one that nobody will set.
constexpr int64_t kMostWaits = 1 << 20;
constexpr size_t kDepositBytes = 32;  // of a lane, in an exchange: its parts of the operands of an mma
constexpr int kPoison = 0xff;         // repeated, a NaN of every type

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s (block %u %u %u, thread %u)\n", message, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x);
  std::exit(3);
}

class Block {
 public:
  Block(dim3 index, int threads, size_t shared_bytes, std::mt19937_64& random, const std::function<void()>& kernel)
      : threads_(static_cast<size_t>(threads)),
        warps_((threads + kWarpSize - 1) / kWarpSize),
        random_(random),
        kernel_(kernel),
        index_(index),
        running_(threads_.size()) {
    for (size_t i = 0; i < threads_.size(); ++i) {
      prepare_fiber(i);
      runnable_.push_back(i);
    }
    shared_ = static_cast<unsigned char*>(std::malloc(shared_bytes));
    std::memset(shared_, kPoison, shared_bytes);
  }
  ~Block() { std::free(shared_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  unsigned char* shared() { return shared_; }

  bool is_done() const { return running_ == 0; }

  // Lets one thread run until it has to wait.
  void step() {
    current_ = this;
    blockIdx = index_;
    if (runnable_.empty()) release_barrier(running_);
    const size_t choice = random_() % runnable_.size();
    std::swap(runnable_[choice], runnable_.back());
    active_ = runnable_.back();
    runnable_.pop_back();
    resume();
    if (threads_[active_].waits == Wait::kDone) --running_;
    current_ = nullptr;
  }

  // Lets the others go on, those of other blocks too.
  void yield() {
    if (++threads_[active_].yields > kMostWaits) fail("a thread waits for a flag that nobody sets");
    runnable_.push_back(active_);
    leave(false);
  }

  void block_barrier() {
    threads_[active_].waits = Wait::kBlock;
    leave(false);
  }

  // Deposits a value and returns, once all lanes of the warp have come, what they deposited, lane by lane. Valid until
  // the caller's next exchange.
  template <typename T>
  const T* gather(const T& value) {
    static_assert(sizeof(T) <= kDepositBytes && alignof(T) <= alignof(uint64_t));
    Warp& warp = warps_[active_ / kWarpSize];
    const size_t first = active_ / kWarpSize * kWarpSize;
    const size_t lanes = std::min<size_t>(threads_.size() - first, kWarpSize);
    std::memcpy(warp.deposited + (active_ - first) * sizeof(T), &value, sizeof(T));
    if (++warp.arrived == lanes) {
      warp.arrived = 0;
      std::memcpy(warp.exchanged, warp.deposited, sizeof(warp.exchanged));
      for (size_t i = first; i < first + lanes; ++i) {
        threads_[i].waits = Wait::kNothing;
        runnable_.push_back(i);
      }
    } else {
      threads_[active_].waits = Wait::kWarp;
    }
    leave(false);
    return reinterpret_cast<const T*>(warp.exchanged);
  }

  // What this thread may do at once or later, and does at last.
  void put_off(std::function<void()> action) {
    if (random_() % 2 == 0) return action();
    threads_[active_].put_off.push_back(std::move(action));
  }
  void make_up_for() {
    for (const auto& action : threads_[active_].put_off) action();
    threads_[active_].put_off.clear();
  }

  size_t active() const { return active_; }
  static Block& current() { return *current_; }

 private:
  enum class Wait { kNothing, kBlock, kWarp, kDone };
  struct Thread {
    Context context;
    std::unique_ptr<unsigned char[]> stack;
    void* fake_stack = nullptr;
    Wait waits = Wait::kNothing;
    int64_t yields = 0;
    std::vector<std::function<void()>> put_off;
  };
  struct Warp {
    alignas(8) unsigned char deposited[kWarpSize * kDepositBytes];
    alignas(8) unsigned char exchanged[kWarpSize * kDepositBytes];
    size_t arrived = 0;
  };

  // Stacks are kept for the next block.
  static std::vector<std::unique_ptr<unsigned char[]>>& spare_stacks() {
    static std::vector<std::unique_ptr<unsigned char[]>> stacks;
    return stacks;
  }

  void prepare_fiber(size_t i) {
    Thread& thread = threads_[i];
    auto& spare = spare_stacks();
    if (spare.empty()) {
      thread.stack.reset(new unsigned char[kStackBytes]);
    } else {
      thread.stack = std::move(spare.back());
      spare.pop_back();
      __asan_unpoison_memory_region(thread.stack.get(), kStackBytes);  // the last thread left it in mid-call
    }
    start_context(thread.context, thread.stack.get(), kStackBytes, &Block::fiber_main);
  }

  static void fiber_main() {
    Block& block = *current_;
    block.arrive(nullptr);
    block.kernel_();
    block.threads_[block.active_].waits = Wait::kDone;
    block.leave(true);
  }

  // Scheduler to fiber.
  void resume() {
    Thread& thread = threads_[active_];
    threadIdx = {static_cast<unsigned>(active_), 0, 0};
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, thread.stack.get(), kStackBytes);
    switch_context(scheduler_, thread.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
    if (thread.waits == Wait::kDone) spare_stacks().push_back(std::move(thread.stack));
  }

  // Fiber to scheduler.
  void leave(bool for_good) {
    Thread& thread = threads_[active_];
    __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    switch_context(thread.context, scheduler_);
    arrive(threads_[active_].fake_stack);
  }

  void arrive(void* fake_stack) {
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }

  // Nobody can run: that is a barrier all have reached, or a mistake.
  void release_barrier(size_t running) {
    size_t waiting = 0;
    for (size_t i = 0; i < threads_.size(); ++i) waiting += threads_[i].waits == Wait::kBlock;
    if (waiting != running || running != threads_.size()) fail("threads of a block do not meet at the same barrier");
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].waits = Wait::kNothing;
      runnable_.push_back(i);
    }
  }

  static inline Block* current_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::mt19937_64& random_;
  std::vector<size_t> runnable_;
  const std::function<void()>& kernel_;
  dim3 index_;
  size_t running_;
  size_t active_ = 0;
  unsigned char* shared_ = nullptr;
  Context scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// What the driver sets and reads.
struct Device {
  std::mt19937_64 random;
  int64_t launches = 0;
  int64_t largest_shared_bytes = 0;
  int64_t planted = 0;
};
inline Device device;

}  // namespace inverse_flow::emulation

// Whether to make this mistake of planted.py.
#define PLANTED(number) (inverse_flow::emulation::device.planted == (number))

inline void __syncthreads() { inverse_flow::emulation::Block::current().block_barrier(); }

inline void __syncwarp() { inverse_flow::emulation::Block::current().gather(0); }

inline int emulated_lane() {
  using namespace inverse_flow::emulation;
  return static_cast<int>(Block::current().active() % kWarpSize);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane) {
  using namespace inverse_flow::emulation;
  if (mask != 0xffffffffu) fail("only whole warps may shuffle");
  if (source_lane < 0 || source_lane >= kWarpSize) fail("a shuffle from no lane of the warp");
  return Block::current().gather(value)[source_lane];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, emulated_lane() ^ lanes);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const int source = emulated_lane() - static_cast<int>(lanes);
  return __shfl_sync(mask, value, source < 0 ? emulated_lane() : source);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  using namespace inverse_flow::emulation;
  if (mask != 0xffffffffu) fail("only whole warps may reduce");
  const unsigned* lanes = Block::current().gather(value);
  return *std::max_element(lanes, lanes + kWarpSize);
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}

namespace inverse_flow {

inline unsigned char* dynamic_shared_memory() { return emulation::Block::current().shared(); }

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t high_word(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint32_t>(bits >> 32);
}

inline void store_release(int32_t* flag, int32_t value) { *flag = value; }
inline void wait_for_flag(const int32_t* flag) {
  while (*flag == 0) emulation::Block::current().yield();
}

inline double not_a_number() { return std::nan(""); }

inline float half_bits_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  float value = 0;
  if (exponent == 31) {
    value = fraction == 0 ? INFINITY : NAN;
  } else {
    value = std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction + 1024), std::max(exponent, 1) - 25);
  }
  return (bits & 0x8000) ? -value : value;
}

inline uint16_t float_to_half_bits(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
  exponent = std::max(exponent, -13);
  // In units of the last place: at most 2048, which carries over into the exponent as it should.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return static_cast<uint16_t>(sign | (units < 1024 ? units : ((exponent + 13) << 10) + units));
}

inline const char* clear_memory(void* memory, int64_t bytes, void*) {
  ++emulation::device.launches;
  std::memset(memory, 0, static_cast<size_t>(bytes));
  return nullptr;
}

// The launch_kernel of launch_kernel.cuh. The blocks of a launch start in random order, and a few run at a time.
template <typename Arguments>
const char* launch_kernel(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared_bytes,
                          const Arguments& arguments, void*) {
  emulation::Device& device = emulation::device;
  ++device.launches;
  device.largest_shared_bytes = std::max(device.largest_shared_bytes, shared_bytes);
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), device.random);
  const std::function<void()> run = [&] { kernel(arguments); };
  std::vector<std::unique_ptr<emulation::Block>> resident;
  while (!blocks.empty() || !resident.empty()) {
    while (!blocks.empty() && resident.size() < emulation::kResidentBlocks) {
      resident.push_back(std::make_unique<emulation::Block>(blocks.back(), threads, static_cast<size_t>(shared_bytes),
                                                            device.random, run));
      blocks.pop_back();
    }
    auto& block = resident[device.random() % resident.size()];
    block->step();
    if (block->is_done()) {
      std::swap(block, resident.back());
      resident.pop_back();
    }
  }
  return nullptr;
}

}  // namespace inverse_flow
