// Turns the weight tensor into what the kernels read, and their sums back into its gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "sweep.h"

namespace inverse_flow::cpu {

template <class T>
struct Prepared {
  std::vector<T> taps;
  std::vector<T> corner;  // empty when M = I
  std::vector<T> bias;    // empty without one
  // By prepare_blocks alone, and then without taps and corner.
  std::vector<T> steps;
  std::vector<double> blocks;
  int64_t block_steps;
  Weights<T> group(const Shape& shape, int64_t group) const;
};

// `weight` is contiguous, (groups * channels, channels, kernel_d, kernel_h, kernel_w); `bias` has one entry per channel
// or is null. What is inverted of M, and what the inverse is folded into (see Weights), is computed in float64 and
// rounded once, and for float64 itself in about twice the digits. Throws std::runtime_error when an M is singular.
template <class T>
Prepared<T> prepare(const Shape& shape, const std::vector<int64_t>& orders, const T* weight, const T* bias,
                    const PrepareKernels& kernels);

// Inverts the n x n row-major corner tap of a group whose first channel is given. Throws std::runtime_error when it is
// singular.
void invert_corner(std::vector<double>& matrix, int64_t n, int64_t first_channel, const PrepareKernels& kernels);

// Scatters the sums of one group (see Gradients) into the weight's gradient, adding, and leaving what the corner kind
// does not read at zero. `shape` is that of the solve that made the sums.
template <class T>
void add_weight_gradient(const Shape& shape, int64_t order, const T* sums, T* group_gradient);

}  // namespace inverse_flow::cpu
