// How a solve is laid over the CPU: the regime, how the work is cut up, and the memory that takes. No torch: the
// binding runs what this says, and inverse_flow.explain prints it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "sweep.h"

namespace inverse_flow::cpu {

template <class IO, class T>
Kernels<IO, T> kernels_in_use() {
  switch (isa_in_use()) {
#if INVERSE_FLOW_X86
    case Isa::kAvx512:
      return avx512::kernels<IO, T>();
    case Isa::kAvx2:
      return avx2::kernels<IO, T>();
#endif
    default:
      return portable::kernels<IO, T>();
  }
}

// How the work is cut up. Lanes are images where that fills the vectors and the threads, else the rows of a band.
struct Plan {
  bool rows;
  int64_t lanes;
  int64_t stretch;  // steps of a band that are packed, solved and unpacked at a time (rows)
  int64_t units;    // pieces of a group that run independently (images) or in a pipeline (bands of an image)
  int64_t jobs;     // what the threads share: bands (rows), or ranges of neighbouring units (images)
  int64_t workers;  // threads that have a job
  int64_t sets;     // partial sums of the gradients that are kept apart
};

// Steps of a band between two looks at the band above. Long stretches are packed in long runs, which the hardware
// prefetches (see kSlabBytes), but `threads` that share an image each start a band and a stretch after the one above.
inline int64_t band_stretch(const Shape& shape, int64_t band, int64_t state_bytes, int64_t threads) {
  const int64_t steps = band_steps(shape, band);
  const int64_t apart = threads > 1 ? steps / threads - band : steps + kStretch - 1;
  const int64_t in_cache = kSlabBytes / (shape.channels * band * state_bytes);
  return std::max(std::min(apart, in_cache) / kStretch * kStretch, kStretch);
}

inline Plan make_plan(const Shape& shape, int64_t min_lanes, int64_t max_lanes, int64_t state_bytes, int64_t threads) {
  const auto pieces = [](int64_t total, int64_t piece) { return (total + piece - 1) / piece; };
  const int64_t band = shape.height > min_lanes ? max_lanes : min_lanes;
  const int64_t bands = pieces(shape.height, band);
  // Steps of min_lanes-wide vectors each thread would run.
  const int64_t by_images = pieces(pieces(shape.batch, min_lanes) * shape.groups, threads) * shape.height * shape.width;
  // Bands of one image overlap but for a start-up of one band's width each, so one image fills at most this many.
  const int64_t per_image = std::max<int64_t>(1, std::min(bands, band_steps(shape, band) / (band + kStretch)));
  const int64_t busy = std::min(threads, shape.batch * shape.groups * per_image);
  const int64_t by_rows =
      pieces(shape.batch * shape.groups * bands, busy) * band_steps(shape, band) * (band / min_lanes);
  if (by_rows < by_images) {
    const int64_t jobs = shape.groups * shape.batch * bands;
    const int64_t stretch = band_stretch(shape, band, state_bytes, pieces(threads, shape.batch * shape.groups));
    return {true, band, stretch, bands, jobs, std::min(threads, jobs), jobs};
  }
  // Enough pieces for the threads to share evenly, each as wide as a line can be.
  const int64_t vectors = pieces(shape.batch, min_lanes);
  const int64_t widest = max_lanes / min_lanes;
  int64_t units = pieces(vectors, widest);
  if (shape.groups % threads != 0) units = std::min(vectors, pieces(units, threads) * threads);
  const int64_t lanes = shape.batch <= min_lanes || units == vectors ? min_lanes : max_lanes;
  // A thread works through neighbouring units with one set of sums, and its range may straddle groups.
  const int64_t jobs = std::min(threads, shape.groups * units);
  return {false, lanes, 0, units, jobs, jobs, jobs + shape.groups};
}

// Working memory of one thread, in bytes.
template <class IO, class T>
size_t thread_scratch(const Kernels<IO, T>& kernels, const Plan& plan, const Problem<IO, T>& problem) {
  if (plan.rows) return kernels.rows_scratch(problem, plan.lanes);
  // Narrow pieces may keep more rows than wide ones.
  return std::max(kernels.images_scratch(problem, kernels.min_lanes), kernels.images_scratch(problem, plan.lanes));
}

// Elements, in the state type, that the halo below a band takes; those of all bands are kept.
inline int64_t band_halo(const Shape& shape, const Plan& plan) {
  return plan.rows && plan.units > 1 ? halo_size(shape, plan.lanes) : 0;
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
