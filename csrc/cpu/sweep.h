// What the CPU backend hands to the kernels of one instruction set. Plain data; no torch.
//
// Both regimes sweep a *line* step by step with the SIMD lanes holding pixels that do not depend on each other:
//
//   images as lanes    a line is an image row, a step a column, a lane an image
//   rows as lanes      a line is a band of rows, a step an anti-diagonal of the band, a lane a row of it
//
// A volume is swept plane after plane; with rows as lanes a line goes through the same rows of all planes.
//
// so one micro-kernel serves both; they differ in where a tap's source lies and in how a lane maps to memory. A signal,
// which is an image of one row, has a regime of its own where the others have too few lanes:
//
//   outputs as lanes   all channels of a block of steps are solved at once, by a matrix of what they depend on
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace inverse_flow::cpu {

// Steps that are packed and unpacked at a time at least: 16 floats are a cache line.
constexpr int64_t kStretch = 16;

// What is packed at a time stays in L2, beside what the taps reach of what came before. Large pieces are read and
// written in long runs of each channel, which the hardware prefetches; runs of a single cache line take twice as long.
int64_t slab_bytes();

// Most lanes a line can have: 2 AVX-512 vectors of float.
constexpr int64_t kMaxLanes = 32;

// Vectors of outputs that are summed together with outputs as lanes.
constexpr int kTileVectors = 2;

// Output channels a micro-kernel keeps in registers: 6 x 2 accumulators, 2 sources and a weight fill the 16 of AVX2.
constexpr int64_t kOutputBlock = 6;

// Image types stored in half the width of the state; only their bits matter here.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The prepared weights of one group, in the state type. Blocks of kOutputBlock output channels (the last may be
// narrower): [block][tap][input channel][output channel of the block], the taps negated, in sweep order (tap_order) and
// without the corner tap. Of one block, the inverse of a general M is folded into them: x = M^-1 y - sum of
// (M^-1 W_tap) x.
template <class T>
struct Weights {
  const T* taps;
  // [block][input channel][output channel of the block]; null when M = I. Of a general M the inverse. Of a unit
  // triangular one the inverses of the blocks on the diagonal, and -M elsewhere, since blocks are substituted.
  const T* corner;
  const T* bias;  // one per channel, or null
  // Of outputs as lanes instead of taps and corner: what the outputs of a block of block_steps steps, [step][channel],
  // are of the (kernel_w - 1) * channels values of x in front of it and, behind those, of the block's own y - bias. In
  // tiles of at most kTileVectors vectors of outputs, the last vector filled up with zeros: [tile][input][output of the
  // tile]. Several steps at once sum larger products than one after the other would, and do so in float64.
  const T* step;        // of blocks of one step, else null
  const double* block;  // of longer ones, else null
  int64_t block_steps;
};

// Whether the inverse of M is folded into the taps, which costs channels^3 * taps multiply-adds before the first pixel:
// little while the channels are one block. With more, M multiplies what the taps of a step leave.
inline bool folds_corner(const Shape& shape) { return shape.corner == kGeneral && shape.channels <= kOutputBlock; }

// An image tensor seen by one group: `data` at batch 0, channel 0 of the group, the mirrored pixel (0, 0); strides of
// mirrored rows and columns are negative. [begin, end) is the memory the tensor spans, for vector loads that read past
// a row's end.
template <class IO>
struct Image {
  IO* data;
  Strides stride;
  const IO* begin;
  const IO* end;
};

template <class IO, class T>
struct Problem {
  Shape shape;
  Weights<T> weights;
  Image<const IO> input;
  Image<IO> output;
  // Only when the weight gradient is wanted: the output of the solve being differentiated.
  Image<const IO> other;
  bool with_gradient;
};

// How rows as lanes are swept. The rows of an image are cut into bands, a lane per row. A line is one band, or `joined`
// ones: a lane that is through with its row goes on with that of a next band, and between the two it passes as many
// zeros as the taps reach to the left. So it does between the planes of a volume.
struct RowsPlan {
  int64_t lanes;    // rows of a band
  int64_t bands;    // of an image
  int64_t stretch;  // steps that are packed, solved and unpacked at a time
  int64_t window;   // steps whose state is kept, and whose gradient is summed, at a time
  bool joined;
};

// How outputs as lanes are swept.
struct OutputsPlan {
  int64_t block;    // steps that are solved at once
  int64_t signals;  // that are swept together at most
};

// Lanes of a vector, in the state type and in float64, that blocks of one step and longer ones are solved in.
struct BlockLanes {
  int64_t step;
  int64_t block;
};

// The bands of all images, which lines claim in order, and what passes from a band to the one below it.
template <class T>
struct Bands {
  RowsPlan plan;
  std::atomic<int64_t>* next;        // to be claimed
  std::atomic<int64_t>* steps_done;  // of each band, counted from its own first
  T* halos;                          // of each band: its last kernel_h - 1 rows

  // The next band, if it is of the same image as `band`; else -1.
  int64_t claim_after(int64_t band) const {
    int64_t claimed = next->load(std::memory_order_relaxed);
    while (claimed / plan.bands == band / plan.bands) {
      if (next->compare_exchange_weak(claimed, claimed + 1)) return claimed;
    }
    return -1;
  }
};

// Partial sums of the gradients, zeroed by the caller: over taps in sweep order and then the corner tap,
// [tap][channel of the solution][channel of `other`]; and [channel].
template <class T>
struct Gradients {
  T* weight;
  T* bias;
};

// The kernels of one instruction set for one state type T and one image type IO.
template <class IO, class T>
struct Kernels {
  // A line has one of these numbers of lanes, or one between that is twice, four times ... the first.
  int64_t min_lanes;
  int64_t max_lanes;
  // With outputs as lanes: the lanes of a vector, and the most signals that are swept together.
  BlockLanes block_lanes;
  int64_t most_signals;
  // Bytes of 64-byte-aligned scratch a call needs.
  size_t (*images_scratch)(const Problem<IO, T>&, int64_t lanes);
  size_t (*rows_scratch)(const Problem<IO, T>&, const RowsPlan&);
  size_t (*outputs_scratch)(const Problem<IO, T>&, const OutputsPlan&);
  // Images first .. first + count of one group; count <= lanes.
  void (*images)(const Problem<IO, T>&, int64_t first, int64_t count, int64_t lanes, void* scratch, Gradients<T>);
  // A line that begins with `band`; if lines are joined, it claims bands of the same image as long as there are any.
  void (*rows)(const Problem<IO, T>&, const Bands<T>&, int64_t band, void* scratch, Gradients<T>);
  // Signals first .. first + count of one group; count <= plan.signals.
  void (*outputs)(const Problem<IO, T>&, const OutputsPlan&, int64_t first, int64_t count, void* scratch, Gradients<T>);
};

// Steps from the start of a plane of a band to that of the next one; from there to that of the next band of its line;
// and those for which a lane is at its row, in all planes.
inline int64_t plane_period(const Shape& shape) { return shape.width + shape.kernel_w - 1; }
inline int64_t band_period(const Shape& shape) { return shape.depth * plane_period(shape); }
inline int64_t row_steps(const Shape& shape) { return band_period(shape) - (shape.kernel_w - 1); }
// Steps of a line that is one band.
inline int64_t band_steps(const Shape& shape, int64_t lanes) { return row_steps(shape) + lanes - 1; }
// How many steps back the taps reach.
inline int64_t reached_steps(const Shape& shape) {
  const int64_t planes = shape.kernel_d < shape.depth ? shape.kernel_d : shape.depth;
  return (planes - 1) * plane_period(shape) + shape.kernel_h + shape.kernel_w - 2;
}
// Elements of a band's halo: [row, the last one first][channel][step].
inline int64_t halo_size(const Shape& shape) { return (shape.kernel_h - 1) * row_steps(shape) * shape.channels; }

// The planes a, rows p and columns q that the taps reach back, in sweep order, without the corner tap: the farthest
// plane first, and in a plane the farthest tap, so that what a step needs of its direct predecessor comes last and the
// steps overlap.
struct TapPosition {
  int64_t a, p, q;
};
inline void tap_order(const Shape& shape, TapPosition* order) {
  for (int64_t a = shape.kernel_d - 1; a >= 0; --a) {
    for (int64_t distance = shape.kernel_h + shape.kernel_w - 2; distance >= (a > 0 ? 0 : 1); --distance) {
      const int64_t farthest = distance < shape.kernel_h ? distance : shape.kernel_h - 1;
      for (int64_t p = farthest; p >= 0 && distance - p < shape.kernel_w; --p) *order++ = {a, p, distance - p};
    }
  }
}

// What preparing a general M does many times, in float64.
struct PrepareKernels {
  // Row i of the matrix of `rows` rows -= factors[i] * row.
  void (*subtract_rows)(double* matrix, const double* row, const double* factors, int64_t rows, int64_t columns);
  // row -= factor * other, `n` values, for a row kept as the sum of two numbers, row + low: as exact as arithmetic of
  // twice the digits.
  void (*subtract_row_exactly)(double* row, double* low, const double* other, double factor, int64_t n);
};

// All kernels of one instruction set. Converts to the Kernels of each pair of types.
struct KernelSet : Kernels<float, float>, Kernels<double, double>, Kernels<BFloat16, float>, Kernels<Float16, float> {
  PrepareKernels prepare;
};

}  // namespace inverse_flow::cpu
