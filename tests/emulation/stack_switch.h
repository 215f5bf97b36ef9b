// Several stacks in one thread, and the switch from one to another. swapcontext does that everywhere, but asks the
// kernel for the signal mask each time, and AddressSanitizer clears the shadow of a whole stack before it: on x86-64
// the switch is written out instead, several times as fast.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace inverse_flow::emulation {

#ifdef __x86_64__

struct Context {
  void* stack_pointer = nullptr;
};

// Of each file its own, so nothing else need be linked.
asm(R"(
  .pushsection .text
  .type inverse_flow_switch_stack, @function
inverse_flow_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size inverse_flow_switch_stack, . - inverse_flow_switch_stack
  .popsection
)");
extern "C" void inverse_flow_switch_stack(void** from, void* to);

// The context's first switch calls `entry`, which must not return.
inline void start_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  // What the switch pops: six registers and where to go; then the stack is as after a call, 8 bytes off a multiple
  // of 16.
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top;
}

inline void switch_context(Context& from, Context& to) {
  inverse_flow_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

using Context = ucontext_t;

inline void start_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

}  // namespace inverse_flow::emulation
