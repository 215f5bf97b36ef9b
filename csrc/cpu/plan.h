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
  int64_t lanes;        // of the widest line
  // Of a group, the narrowest lines that hold its images, or the pieces of the batch (outputs); of an image, its bands.
  int64_t units;
  int64_t jobs;     // what the threads share: bands (rows), or ranges of neighbouring units (images, outputs)
  int64_t workers;  // threads that have a job
  int64_t sets;     // partial sums of the gradients that are kept apart
  int64_t cost;     // estimate of the busiest thread's time, in steps of a line of one vector

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
// together some thread is always ahead of the one that waits for it.
inline bool joined_lines_fit(const Shape& shape, int64_t band, int64_t stretch, int64_t threads) {
  return band_period(shape) >= threads * (stretch + band);
}

// How an image is swept by bands of `band` rows. Long stretches are packed in long runs, which the hardware prefetches
// (see slab_bytes), but `threads` that share an image each start a band and a stretch after the one above.
inline RowsPlan plan_rows(const Shape& shape, bool with_gradient, int64_t band, int64_t state_bytes, int64_t threads) {
  const int64_t steps = band_steps(shape, band);
  const int64_t in_cache = slab_bytes() / (shape.channels * band * state_bytes);
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

// Multiply-adds of vectors that take about as long as planning, and waking the threads, once more.
constexpr int64_t kPartCost = 1 << 15;

// The widest line that `units` units of min_lanes images fill: what they leave is left to narrower ones.
inline int64_t line_lanes(int64_t units, int64_t min_lanes, int64_t max_lanes) {
  int64_t lanes = min_lanes;
  while (2 * lanes <= std::min(units * min_lanes, max_lanes)) lanes *= 2;
  return lanes;
}

// Costs with outputs as lanes are counted in multiply-adds of a vector. Packing and unpacking a value takes about as
// long as kOutputsPacking of them; a block waits for the one before it, since it reads what that one stored.
constexpr int64_t kImagesPacking = 1;
constexpr int64_t kOutputsPacking = 3;
constexpr int64_t kBlockWait = 48;

// What a unit of `signals` signals costs with outputs as lanes.
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

// What a step of a line of `line` lanes costs with images as lanes. A vector of few channels waits for its own sums.
inline int64_t images_cost(const Shape& shape, int64_t line, int64_t lanes) {
  const int64_t products = std::max<int64_t>(shape.channels, 2) * shape.taps() * pieces(line, lanes);
  return shape.channels * (products + kImagesPacking * line);
}

// With this many channels, or half as many with the gradient, a step takes longer than a thread needs to learn that
// another one has done it.
constexpr int64_t kBandChannels = 12;

template <class IO, class T>
Plan make_plan(const Shape& shape, bool with_gradient, const Kernels<IO, T>& kernels, int64_t threads) {
  const int64_t min_lanes = kernels.min_lanes;
  const int64_t max_lanes = kernels.max_lanes;
  // Bands of one image overlap but for a start-up of one band's width each, so one image fills at most this many.
  const auto busy_with = [&](int64_t band) {
    const int64_t per_image = std::min(pieces(shape.height, band), band_steps(shape, band) / (band + kStretch));
    return std::min(threads, shape.batch * shape.groups * std::max<int64_t>(1, per_image));
  };
  int64_t band = min_lanes;
  while (band < shape.height && band < max_lanes) band *= 2;
  // Bands of a volume are long enough to be cut for the sake of threads that have none, and so are those of an image of
  // many channels.
  const bool is_long = shape.depth > 1 || (with_gradient ? 2 : 1) * shape.channels >= kBandChannels;
  while (is_long && band > min_lanes && busy_with(band / 2) > busy_with(band)) band /= 2;
  // A line narrower than a vector takes as long as one that fills it.
  const int64_t vector = std::max(min_lanes, max_lanes / 2);
  const auto vectors = [&](int64_t lanes) { return std::max(lanes / vector, int64_t{1}); };
  const int64_t bands = pieces(shape.height, band);
  const int64_t jobs_by_rows = shape.groups * shape.batch * bands;
  const int64_t busy = busy_with(band);
  const RowsPlan rows = plan_rows(shape, with_gradient, band, sizeof(T), std::min(busy, bands));
  const int64_t steps = rows.joined ? pieces(jobs_by_rows, busy) * band_period(shape) + band
                                    : pieces(jobs_by_rows, busy) * band_steps(shape, band);
  const int64_t by_rows = steps * vectors(band);

  // A thread works through neighbouring units with one set of sums, and its range may straddle groups.
  const int64_t units = pieces(shape.batch, min_lanes);
  const int64_t jobs = std::min(threads, shape.groups * units);
  const int64_t most = pieces(shape.groups * units, jobs);
  int64_t by_images = 0;
  for (int64_t left = most; left > 0;) {
    const int64_t lanes = line_lanes(std::min(left, units), min_lanes, max_lanes);
    by_images += vectors(lanes) * shape.pixels();
    left -= lanes / min_lanes;
  }
  if (shape.depth == 1 && shape.height == 1) {
    int64_t pieces_of_batch = pieces(shape.batch, kernels.most_signals);
    if (shape.groups % threads != 0) {
      pieces_of_batch = std::min(shape.batch, pieces(pieces_of_batch, threads) * threads);
    }
    OutputsPlan outputs{1, pieces(shape.batch, pieces_of_batch)};
    int64_t least = outputs_cost(shape, 1, outputs.signals, kernels.block_lanes.step);
    for (int64_t block = 2; block * shape.channels <= kTileVectors * kernels.block_lanes.block; ++block) {
      const int64_t cost = outputs_cost(shape, block, outputs.signals, kernels.block_lanes.block);
      if (cost >= least) continue;
      least = cost;
      outputs.block = block;
    }
    const int64_t cost =
        pieces(shape.groups * pieces_of_batch, threads) * least / images_cost(shape, vector, kernels.block_lanes.step);
    if (cost < std::min(by_images, by_rows)) {
      const int64_t workers = std::min(threads, shape.groups * pieces_of_batch);
      return {Regime::kOutputs,       {},  outputs, outputs.block * shape.channels, pieces_of_batch, workers, workers,
              workers + shape.groups, cost};
    }
  }
  if (by_rows < by_images) return {Regime::kRows, rows, {}, band, bands, jobs_by_rows, busy, jobs_by_rows, by_rows};
  const int64_t lanes = line_lanes(std::min(most, units), min_lanes, max_lanes);
  return {Regime::kImages, {}, {}, lanes, units, jobs, jobs, jobs + shape.groups, by_images};
}

// How many images of a batch, the first ones, are swept before the others: as many as fill vectors, if those that are
// left over are swept sooner by their rows, on all threads, than as the lanes of a line of one thread that they do not
// fill. Else all.
template <class IO, class T>
int64_t first_part(const Shape& shape, bool with_gradient, const Kernels<IO, T>& kernels, int64_t threads) {
  // Signals are swept by their rows in neither part.
  if (shape.depth == 1 && shape.height == 1) return shape.batch;
  const auto cost = [&](int64_t batch) {
    Shape part = shape;
    part.batch = batch;
    return make_plan(part, with_gradient, kernels, threads).cost;
  };
  const int64_t left_over = shape.batch % std::max(kernels.min_lanes, kernels.max_lanes / 2);
  const int64_t first = shape.batch - left_over;
  if (left_over == 0 || first == 0) return shape.batch;
  const int64_t together = cost(shape.batch);
  const int64_t saved = together - cost(first) - cost(left_over);
  // A second part begins with a call of its own to all threads.
  const bool pays = saved * 20 > together && saved * shape.channels * shape.channels * shape.taps() > kPartCost;
  return pays ? first : shape.batch;
}

// Working memory of one thread, in bytes.
template <class IO, class T>
size_t thread_scratch(const Kernels<IO, T>& kernels, const Plan& plan, const Problem<IO, T>& problem) {
  if (plan.regime == Regime::kRows) return kernels.rows_scratch(problem, plan.rows);
  if (plan.regime == Regime::kOutputs) return kernels.outputs_scratch(problem, plan.outputs);
  // Narrow lines may keep more rows than wide ones.
  size_t bytes = 0;
  for (int64_t lanes = kernels.min_lanes; lanes <= plan.lanes; lanes *= 2) {
    bytes = std::max(bytes, kernels.images_scratch(problem, lanes));
  }
  return bytes;
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
