// The matrix that solves a block of steps of a signal at once: see Weights::step and Weights::block.
#pragma once

#include <cstdint>
#include <vector>

#include "prepare.h"

namespace inverse_flow::cpu {

// Prepares a signal's weights for blocks of `block` steps; the other arguments are as for `prepare`. What it takes to
// solve a block is computed in float64 and rounded once, and for float64 itself in about twice the digits. Where a
// block would magnify roundings more than its sums have digits left, the blocks are of one step.
template <class T>
Prepared<T> prepare_blocks(const Shape& shape, const std::vector<int64_t>& orders, const T* weight, const T* bias,
                           int64_t block, const BlockLanes& lanes, const PrepareKernels& kernels);

}  // namespace inverse_flow::cpu
