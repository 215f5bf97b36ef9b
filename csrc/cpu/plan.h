// How a solve is laid over the CPU: the regime, how the work is cut up, and the memory that takes. No torch: the
// binding runs what this says, and inverse_flow.explain prints it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "sweep.h"

namespace inverse_flow::cpu {

inline int64_t pieces(int64_t total, int64_t piece) { return (total + piece - 1) / piece; }

enum class Regime { kImages, kRows, kOutputs };

// How the work is cut up. Lanes are images where that fills the vectors and the threads, else the rows of a band; of a
// signal, which has one row, the outputs of a block of steps.
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
    constexpr const char* names[] = {"images as lanes", "rows as lanes", "outputs as lanes"};
    const bool by_rows = regime == Regime::kRows;
    const int64_t block = regime == Regime::kOutputs ? outputs.block : 1;
    see("regime", names[static_cast<int>(regime)]);
    see("workers", workers);
    see("lanes", lanes);
    see("units", units * shape.groups * (by_rows ? shape.batch : 1));
    see("steps", by_rows ? band_steps(shape, lanes) : pieces(shape.pixels(), block));
    see("joined", by_rows && rows.joined);
    see("block", block);
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
  // Nor does a volume join bands: between them it would have to pass as many empty planes as the taps reach back.
  plan.joined = plan.bands > 1 && shape.depth == 1 && joined_lines_fit(shape, band, plan.stretch, threads) &&
                !(with_gradient && threads > 1);
  // A band of a volume is long: a small part of it is enough to be behind.
  const int64_t share = shape.depth > 1 ? 8 * threads : threads;
  if (!plan.joined) plan.stretch = stretch(threads > 1 ? steps / share - band : steps + kStretch - 1);
  // Of a window as long as a band of a plane, summing the lanes at the end is little beside the products; and of one as
  // long as what the taps reach back, so is moving that to its front.
  int64_t window = with_gradient ? shape.width + band - 1 : 0;
  if (shape.depth > 1) window = std::max(window, reached_steps(shape));
  plan.window = std::max((window + plan.stretch - 1) / plan.stretch, int64_t{1}) * plan.stretch;
  return plan;
}

// Units of a group that the threads share evenly: at least so many, at most `most`.
inline int64_t even_units(const Shape& shape, int64_t least, int64_t most, int64_t threads) {
  return shape.groups % threads == 0 ? least : std::min(most, pieces(least, threads) * threads);
}

// Costs are counted in multiply-adds of a vector. Packing and unpacking a value costs about as much as so many; a block
// waits as long for the one before it, since it reads what that one stored, and sums it.
constexpr int64_t kImagesPacking = 1;
constexpr int64_t kOutputsPacking = 3;
constexpr int64_t kBlockWait = 48;

// What a unit of so many signals costs with outputs as lanes.
inline int64_t outputs_cost(const Shape& shape, int64_t block, int64_t signals, int64_t lanes) {
  const int64_t columns = (shape.kernel_w - 1 + block) * shape.channels;
  const int64_t vectors = pieces(block * shape.channels, lanes);
  // A multiply-add of one signal alone loads both of its factors, which takes twice as long.
  const int64_t products = columns * vectors * std::max<int64_t>(signals, 2);
  // The matrix of a block is a recurrence in float64, over all columns.
  const int64_t prepared = 2 * columns * vectors * shape.channels * std::min(block, shape.kernel_w);
  return pieces(shape.width, block) *
             (std::max(products, kBlockWait) + kOutputsPacking * signals * block * shape.channels) +
         prepared;
}

// What a line of `line` lanes costs per step with images as lanes. A vector of few channels waits for its own sums.
inline int64_t images_cost(const Shape& shape, int64_t line, int64_t lanes) {
  const int64_t products = std::max<int64_t>(shape.channels, 2) * shape.taps() * pieces(line, lanes);
  return shape.channels * (products + kImagesPacking * line);
}

template <class IO, class T>
Plan make_plan(const Shape& shape, bool with_gradient, const Kernels<IO, T>& kernels, int64_t threads) {
  const int64_t min_lanes = kernels.min_lanes;
  const int64_t max_lanes = kernels.max_lanes;
  // Steps of min_lanes-wide vectors each thread would run.
  const int64_t by_images = pieces(pieces(shape.batch, min_lanes) * shape.groups, threads) * shape.pixels();
  // Bands of one image overlap but for a start-up of one band's width each, so one image fills at most this many.
  const auto busy_with = [&](int64_t band) {
    const int64_t per_image = std::min(pieces(shape.height, band), band_steps(shape, band) / (band + kStretch));
    return std::max<int64_t>(std::min(threads, shape.batch * shape.groups * std::max<int64_t>(1, per_image)), 1);
  };
  int64_t band = shape.height > min_lanes ? max_lanes : min_lanes;
  if (shape.depth > 1 && busy_with(min_lanes) > busy_with(band)) band = min_lanes;
  const int64_t bands = pieces(shape.height, band);
  const int64_t jobs_by_rows = shape.groups * shape.batch * bands;
  const int64_t busy = busy_with(band);
  const RowsPlan rows = plan_rows(shape, with_gradient, band, sizeof(T), std::min(busy, bands));
  const int64_t steps = rows.joined ? pieces(jobs_by_rows, busy) * band_period(shape) + band
                                    : pieces(jobs_by_rows, busy) * band_steps(shape, band);
  const int64_t by_rows = steps * (band / min_lanes);
  if (shape.depth == 1 && shape.height == 1 && shape.batch > 0) {
    const int64_t units = even_units(shape, pieces(shape.batch, kernels.most_signals), shape.batch, threads);
    OutputsPlan outputs{1, pieces(shape.batch, units)};
    int64_t least = outputs_cost(shape, 1, outputs.signals, kernels.block_lanes.step);
    for (int64_t block = 2; block * shape.channels <= kTileVectors * kernels.block_lanes.block; ++block) {
      const int64_t cost = outputs_cost(shape, block, outputs.signals, kernels.block_lanes.block);
      if (cost >= least) continue;
      least = cost;
      outputs.block = block;
    }
    const int64_t by_outputs = pieces(shape.groups * units, threads) * least;
    if (by_outputs < std::min(by_images, by_rows) * images_cost(shape, min_lanes, kernels.block_lanes.step)) {
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
