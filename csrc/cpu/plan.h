// How a solve is laid over the CPU: the regime, how the work is cut up, and the memory that takes. No torch: the
// binding runs what this says, and inverse_flow.explain prints it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "sweep.h"

namespace inverse_flow::cpu {

enum class Regime { kImages, kRows, kOutputs };

// How the work is cut up. Lanes are images where that fills the vectors and the threads, else the rows of a band. The
// lanes of a signal are the outputs of a block of steps, unless images as lanes take less.
struct Plan {
  Regime regime;
  RowsPlan rows;        // of rows as lanes
  OutputsPlan outputs;  // of outputs as lanes
  int64_t lanes;
  int64_t units;    // pieces of a group that run independently (images, outputs), or bands of an image (rows)
  int64_t jobs;     // what the threads share: bands (rows), or ranges of neighbouring units (images, outputs)
  int64_t workers;  // threads that have a job
  int64_t sets;     // partial sums of the gradients that are kept apart

  // Calls see(name, value) for every fact of the plan that inverse_flow.explain tells.
  template <class See>
  void visit(const Shape& shape, const See& see) const {
    const bool by_rows = regime == Regime::kRows;
    const bool by_outputs = regime == Regime::kOutputs;
    see("regime", by_rows ? "rows as lanes" : by_outputs ? "outputs as lanes" : "images as lanes");
    see("workers", workers);
    see("lanes", lanes);
    see("units", units * shape.groups * (by_rows ? shape.batch : 1));
    see("steps", by_rows      ? band_steps(shape, lanes)
                 : by_outputs ? (shape.width + outputs.block - 1) / outputs.block
                              : shape.height * shape.width);
    see("joined", by_rows && rows.joined);
    see("block", by_outputs ? outputs.block : 1);
  }
};

// Whether `threads` that share an image can sweep joined bands. The band that a thread joins to its line begins a
// period after the one before it, and a stretch and a band behind the band above it, which is another thread's; that
// one waits in turn for the band above, and so on around to this very thread. With a period as long as all these delays
// together somebody is always ahead of who waits for him.
inline bool joined_lines_fit(const Shape& shape, int64_t band, int64_t stretch, int64_t threads) {
  return band_period(shape) >= threads * (stretch + band);
}

// How an image is swept by bands of so many rows. Long stretches are packed in long runs, which the hardware prefetches
// (see kSlabBytes), but `threads` that share an image each start a band and a stretch after the one above.
inline RowsPlan plan_rows(const Shape& shape, bool with_gradient, int64_t band, int64_t state_bytes, int64_t threads) {
  const int64_t steps = band_steps(shape, band);
  const int64_t in_cache = kSlabBytes / (shape.channels * band * state_bytes);
  const auto stretch = [&](int64_t most) { return std::max(std::min(most, in_cache) / kStretch * kStretch, kStretch); };
  RowsPlan plan{band, (shape.height + band - 1) / band, 0, 0, false};
  // Of what a thread may be ahead or behind, half is left to chance.
  const int64_t apart = band_period(shape) / threads - band;
  plan.stretch = stretch(threads > 1 ? apart / 2 : apart);
  // A line of several threads' gradients would depend on who claimed which band.
  plan.joined =
      plan.bands > 1 && joined_lines_fit(shape, band, plan.stretch, threads) && !(with_gradient && threads > 1);
  if (!plan.joined) plan.stretch = stretch(threads > 1 ? steps / threads - band : steps + kStretch - 1);
  // Of a window as long as a band, summing the lanes at the end is little beside the products.
  plan.window = with_gradient ? (steps + plan.stretch - 1) / plan.stretch * plan.stretch : plan.stretch;
  return plan;
}

inline int64_t pieces(int64_t total, int64_t piece) { return (total + piece - 1) / piece; }

// Units of a group that the threads share evenly, at least so many, at most `most`.
inline int64_t even_units(const Shape& shape, int64_t least, int64_t most, int64_t threads) {
  return shape.groups % threads == 0 ? least : std::min(most, pieces(least, threads) * threads);
}

// Multiply-adds of a vector in the time that a block waits for the one before it: it reads what that one has stored,
// and sums it.
constexpr int64_t kBlockWait = 48;

// Multiply-adds of a vector that a piece of so many signals takes.
inline int64_t outputs_cost(const Shape& shape, int64_t block, int64_t signals, int64_t lanes) {
  const int64_t columns = (shape.kernel_w - 1 + block) * shape.channels;
  const int64_t vectors = pieces(block * shape.channels, lanes);
  // Every multiply-add of one signal loads its weights for itself, and a value; two are loaded in the time of two.
  const int64_t products = columns * vectors * std::max<int64_t>(signals, 2);
  // The matrix is a recurrence in float64, over all columns.
  const int64_t prepared = 2 * columns * vectors * shape.channels * std::min(block, shape.kernel_w);
  return pieces(shape.width, block) * std::max(products, kBlockWait) + prepared;
}

template <class IO, class T>
Plan make_plan(const Shape& shape, bool with_gradient, const Kernels<IO, T>& kernels, int64_t threads) {
  const int64_t min_lanes = kernels.min_lanes;
  const int64_t max_lanes = kernels.max_lanes;
  const int64_t band = shape.height > min_lanes ? max_lanes : min_lanes;
  const int64_t bands = pieces(shape.height, band);
  const int64_t jobs_by_rows = shape.groups * shape.batch * bands;
  // Steps of min_lanes-wide vectors each thread would run.
  const int64_t by_images = pieces(pieces(shape.batch, min_lanes) * shape.groups, threads) * shape.height * shape.width;
  // Bands of one image overlap but for a start-up of one band's width each, so one image fills at most this many.
  const int64_t per_image = std::max<int64_t>(1, std::min(bands, band_steps(shape, band) / (band + kStretch)));
  const int64_t busy = std::max<int64_t>(std::min(threads, shape.batch * shape.groups * per_image), 1);
  const RowsPlan rows = plan_rows(shape, with_gradient, band, sizeof(T), busy);
  const int64_t steps = rows.joined ? pieces(jobs_by_rows, busy) * band_period(shape) + band
                                    : pieces(jobs_by_rows, busy) * band_steps(shape, band);
  const int64_t by_rows = steps * (band / min_lanes);
  if (shape.height == 1 && shape.batch > 0) {
    const int64_t n = kernels.vector_lanes;
    const int64_t units = even_units(shape, pieces(shape.batch, kernels.most_signals), shape.batch, threads);
    OutputsPlan outputs{1, pieces(shape.batch, units)};
    int64_t least = outputs_cost(shape, 1, outputs.signals, n);
    for (int64_t block = 2; block * shape.channels <= kTileVectors * n; ++block) {
      const int64_t cost = outputs_cost(shape, block, outputs.signals, n);
      if (cost >= least) continue;
      least = cost;
      outputs.block = block;
    }
    const int64_t products = shape.channels * shape.channels * shape.kernel_w;
    const char* force = getenv("FORCE");
    if (force ? *force == 'o' : least * pieces(shape.groups * units, threads) < std::min(by_images, by_rows) * products) {
      if (const char* b = getenv("BLOCK")) outputs.block = atoi(b);
      const int64_t jobs = std::min(threads, shape.groups * units);
      return {Regime::kOutputs, {}, outputs, outputs.block * shape.channels, units, jobs, jobs, jobs + shape.groups};
    }
  }
  if (by_rows < by_images) return {Regime::kRows, rows, {}, band, bands, jobs_by_rows, busy, jobs_by_rows};
  // Enough pieces for the threads to share evenly, each as wide as a line can be.
  const int64_t vectors = pieces(shape.batch, min_lanes);
  const int64_t widest = max_lanes / min_lanes;
  const int64_t units = even_units(shape, pieces(vectors, widest), vectors, threads);
  const int64_t lanes = shape.batch <= min_lanes || units == vectors ? min_lanes : max_lanes;
  // A thread works through neighbouring units with one set of sums, and its range may straddle groups.
  const int64_t jobs = std::min(threads, shape.groups * units);
  return {Regime::kImages, {}, {}, lanes, units, jobs, jobs, jobs + shape.groups};
}

// Working memory of one thread, in bytes.
template <class IO, class T>
size_t thread_scratch(const Kernels<IO, T>& kernels, const Plan& plan, const Problem<IO, T>& problem) {
  if (plan.regime == Regime::kRows) return kernels.rows_scratch(problem, plan.rows);
  if (plan.regime == Regime::kOutputs) return kernels.outputs_scratch(problem, plan.outputs);
  // Narrow pieces may keep more rows than wide ones.
  return std::max(kernels.images_scratch(problem, kernels.min_lanes), kernels.images_scratch(problem, plan.lanes));
}

// Elements, in the state type, of the halo below a band; those of all bands are kept.
inline int64_t halo_elements(const Shape& shape, const Plan& plan) {
  return plan.regime == Regime::kRows && plan.units > 1 ? halo_size(shape) : 0;
}

// Elements, in the state type, of one set of sums: the weight's, then the bias's.
struct SumSizes {
  int64_t weight;
  int64_t bias;
  int64_t total() const { return weight + bias; }
};
inline SumSizes sum_sizes(const Shape& shape, bool with_gradient) {
  if (!with_gradient) return {0, 0};
  return {shape.taps() * shape.channels * shape.channels, shape.channels};
}

}  // namespace inverse_flow::cpu
