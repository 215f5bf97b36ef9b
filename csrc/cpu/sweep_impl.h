// The CPU kernels, written once and compiled for each instruction set of isa.cpp by a file of its name. That file says
// the namespace, INVERSE_FLOW_ISA, what the compiler may use, INVERSE_FLOW_TARGET, if more than by default, the bytes
// of a vector, and whether halves are converted by F16C.
//
//   for each line (sweep.h), for each step of it:
//     r = y - bias - sum over taps of W_tap * x at (step - tap)      micro-kernel `add_products`, taps x channels
//     x = M^-1 r                                                     on the sums, in registers
//   where M is general and its channels are one block, its inverse is in the taps, and y - bias is one more of them:
//     x = M^-1 (y - bias) - sum over taps of (M^-1 W_tap) * x at (step - tap)
//   and, for the weight gradient, once a slab of lines is solved:
//     dW_tap -= sum over steps and lanes of u at (step - tap) * other
//
// A micro-kernel keeps 6 output channels x 2 vectors of lanes in registers: per input channel 2 vector loads and 6
// broadcasts feed 12 multiply-adds. The state (x, or u) lies as [step][channel][lane], so every tap is a pointer at a
// fixed distance. Images are packed through 8 x 8 transposes, a slab of rows or a stretch of steps at a time.
// Operations: taps * C^2 multiply-adds per pixel. Bytes: each image read once and written once; the state stays in L2.
//
// No include guard on purpose. Only the parts of this very code are under the target pragma: the headers before it are
// shared with code that runs everywhere.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "sweep.h"

#define INVERSE_FLOW_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#define INVERSE_FLOW_PRAGMA(...) INVERSE_FLOW_PRAGMA_TEXT(__VA_ARGS__)
#if defined(INVERSE_FLOW_TARGET) && defined(__clang__)
INVERSE_FLOW_PRAGMA(clang attribute push(__attribute__((target(INVERSE_FLOW_TARGET))), apply_to = function))
#elif defined(INVERSE_FLOW_TARGET)
INVERSE_FLOW_PRAGMA(GCC push_options)
INVERSE_FLOW_PRAGMA(GCC target(INVERSE_FLOW_TARGET))
#endif

namespace inverse_flow::cpu::INVERSE_FLOW_ISA {

#include "vector.h"

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
// The size of equal pieces, of at most `most`, that `total` is cut into.
constexpr int64_t even_piece(int64_t total, int64_t most) {
  const int64_t pieces = (total + most - 1) / most;
  return (total + pieces - 1) / pieces;
}
INVERSE_FLOW_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INVERSE_FLOW_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out 64-byte-aligned pieces of the caller's scratch; with a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(width as a constant), for a width of 1 to kMost.
template <int kMost, class F>
INVERSE_FLOW_INLINE void with_width(int64_t width, F f) {
  if constexpr (kMost > 1) {
    if (width < kMost) return with_width<kMost - 1>(width, f);
  }
  f(Constant<kMost>{});
}

// Calls f(first channel, width as a constant) for each block of at most kMost channels.
template <int kMost, class F>
INVERSE_FLOW_INLINE void for_blocks(int64_t channels, bool backwards, F f) {
  const int64_t blocks = (channels + kMost - 1) / kMost;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = (backwards ? blocks - 1 - i : i) * kMost;
    with_width<kMost>(smaller(kMost, channels - first), [&](auto width) INVERSE_FLOW_INLINED { f(first, width); });
  }
}

// Packing works on eight lanes, so a line has at least that many; two vectors hide the latency of the multiply-adds. A
// line has one of these numbers of lanes, or of those between them that are twice one another.
constexpr int kMinLanes = 8;
template <class T>
constexpr int kMaxLanesOf = 2 * INVERSE_FLOW_VECTOR_BYTES / static_cast<int>(sizeof(T)) > kMinLanes
                                ? 2 * INVERSE_FLOW_VECTOR_BYTES / static_cast<int>(sizeof(T))
                                : kMinLanes;

// Calls f(lanes of a line as a constant).
template <class T, int kMost = kMaxLanesOf<T>, class F>
static void with_lanes(int64_t lanes, F f) {
  if constexpr (kMost > kMinLanes) {
    if (lanes < kMost) return with_lanes<T, kMost / 2>(lanes, f);
  }
  f(Constant<kMost>{});
}

#include "outer_sums.h"
#include "packing.h"
#include "solve_steps.h"
#include "sweep_images.h"
#include "sweep_outputs.h"
#include "sweep_rows.h"

template <class IO, class T>
static void images(const Problem<IO, T>& problem, int64_t first, int64_t count, int64_t lanes, void* scratch,
                   Gradients<T> gradients) {
  with_lanes<T>(lanes, [&](auto width) {
    sweep_images<IO, T, decltype(width)::value>(problem, first, count, scratch, gradients);
  });
}

template <class IO, class T>
static void rows(const Problem<IO, T>& problem, const Bands<T>& bands, int64_t band, void* scratch,
                 Gradients<T> gradients) {
  with_lanes<T>(bands.plan.lanes, [&](auto width) {
    RowsSweep<IO, T, decltype(width)::value>(problem, bands, band, scratch, gradients).run();
  });
}

template <class IO, class T>
static Kernels<IO, T> kernels() {
  return {kMinLanes,
          kMaxLanesOf<T>,
          {kWide<T>, kWide<double>},
          kMostSignals,
          &images_scratch<IO, T>,
          &rows_scratch<IO, T>,
          &outputs_scratch<IO, T>,
          &images<IO, T>,
          &rows<IO, T>,
          &outputs<IO, T>};
}

static void subtract_rows(double* matrix, const double* row, const double* factors, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    const double factor = factors[i];
    if (factor == 0) continue;
    double* const to = matrix + i * columns;
#pragma GCC ivdep
    for (int64_t k = 0; k < columns; ++k) to[k] -= factor * row[k];
  }
}

static void subtract_row_exactly(double* row, double* low, const double* other, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    // A fused multiply-add of zero, since the compiler may fuse a plain product with the sum below: what the product
    // and the sum were rounded by is known exactly only when each is rounded by itself.
    const double product = __builtin_fma(-factor, other[i], 0.0);
    const double sum = row[i] + product;
    const double added = sum - row[i];
    low[i] += ((row[i] - (sum - added)) + (product - added)) + __builtin_fma(-factor, other[i], -product);
    row[i] = sum;
  }
}

KernelSet kernel_set() {
  return {kernels<float, float>(),
          kernels<double, double>(),
          kernels<BFloat16, float>(),
          kernels<Float16, float>(),
          {&subtract_rows, &subtract_row_exactly}};
}

}  // namespace inverse_flow::cpu::INVERSE_FLOW_ISA

#if defined(INVERSE_FLOW_TARGET) && defined(__clang__)
INVERSE_FLOW_PRAGMA(clang attribute pop)
#elif defined(INVERSE_FLOW_TARGET)
INVERSE_FLOW_PRAGMA(GCC pop_options)
#endif
