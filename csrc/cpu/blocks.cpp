#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

namespace inverse_flow::cpu {

namespace {

// Up to which condition several steps of a block are solved at once. Sums in float64 have 29 digits more than float32
// images; those of float64 images have none, and must not be worse than the plain recurrence's by themselves.
template <class T>
constexpr double kMostCondition = std::is_same_v<T, double> ? 16 : 1 << 20;

// The recurrence of one group over a block of steps, run on the columns of the identity: what the block's outputs are
// of each value that they depend on. Those are the values of the steps in front of the block, whose taps reach into
// it, and the block's right-hand side.
class BlockResponse {
 public:
  // `tap(q, o, c)` is the tap q steps back; `inverse` that of tap(0) or empty where it is the identity.
  template <class Tap>
  BlockResponse(int64_t channels, int64_t kernel, int64_t block, const Tap& tap, const std::vector<double>& inverse,
                bool refine, const PrepareKernels& kernels)
      : channels_(channels),
        outputs_(block * channels),
        before_((kernel - 1) * channels),
        columns_(before_ + outputs_),
        kernels_(kernels) {
    const int64_t steps = std::min(kernel, block);
    taps_.resize(steps * channels * channels);
    for (int64_t q = 0; q < steps; ++q) {
      for (int64_t o = 0; o < channels; ++o) {
        for (int64_t c = 0; c < channels; ++c) taps_[(c * steps + q) * channels + o] = tap(q, o, c);
      }
    }
    steps_ = steps;
    inverse_ = inverse;
    right_.resize(outputs_ * columns_);
    for (int64_t t = 0; t < block; ++t) {
      for (int64_t o = 0; o < channels; ++o) {
        double* const row = &right_[(t * channels + o) * columns_];
        row[before_ + t * channels + o] = 1;
        for (int64_t s = t + 1; s < kernel; ++s) {
          for (int64_t c = 0; c < channels; ++c) row[(kernel - 1 + t - s) * channels + c] = -tap(s, o, c);
        }
      }
    }
    for (int64_t o = 0; o < channels; ++o) {
      double sum = 0;
      for (int64_t q = 0; q < kernel; ++q) {
        for (int64_t c = 0; c < channels; ++c) sum += std::abs(tap(q, o, c));
      }
      tap_sum_ = std::max(tap_sum_, sum);
    }
    values_ = right_;
    solve(values_);
    if (!refine) return;
    subtract_product();
    solve(right_);
    for (size_t i = 0; i < values_.size(); ++i) values_[i] += right_[i];
  }

  int64_t outputs() const { return outputs_; }
  int64_t columns() const { return columns_; }
  double at(int64_t output, int64_t column) const { return values_[output * columns_ + column]; }

  // Bounds what rounding an output once, in a sum of the block, is to rounding it in the plain recurrence: the largest
  // sum of sizes of a row, of the values that outputs are made of right-hand sides by, times that of the taps.
  // Not a number, or infinite, where the recurrence is.
  double condition() const {
    double outputs = 0;
    for (int64_t o = 0; o < outputs_; ++o) {
      double sum = 0;
      for (int64_t i = before_; i < columns_; ++i) sum += std::abs(at(o, i));
      if (!std::isfinite(sum)) return sum;
      outputs = std::max(outputs, sum);
    }
    return outputs * tap_sum_;
  }

 private:
  // The rows of a block's right-hand sides become those of its solutions.
  void solve(std::vector<double>& rows) const {
    std::vector<double> solved(channels_ * columns_);
    std::vector<double> factors(channels_);
    for (int64_t first = 0; first < outputs_; first += channels_) {
      double* const step = &rows[first * columns_];
      if (!inverse_.empty()) {
        std::fill(solved.begin(), solved.end(), 0.0);
        for (int64_t c = 0; c < channels_; ++c) {
          for (int64_t o = 0; o < channels_; ++o) factors[o] = -inverse_[o * channels_ + c];
          kernels_.subtract_rows(solved.data(), step + c * columns_, factors.data(), channels_, columns_);
        }
        std::copy(solved.begin(), solved.end(), step);
      }
      // From the steps behind it in the block.
      const int64_t behind = std::min((steps_ - 1) * channels_, outputs_ - first - channels_);
      for (int64_t c = 0; c < channels_ && behind > 0; ++c) {
        kernels_.subtract_rows(step + channels_ * columns_, step + c * columns_, &taps_[(c * steps_ + 1) * channels_],
                               behind, columns_);
      }
    }
  }

  // right_ -= the recurrence's matrix times values_, in twice the digits.
  void subtract_product() {
    std::vector<double> low(columns_);
    for (int64_t o = 0; o < outputs_; ++o) {
      double* const row = &right_[o * columns_];
      std::fill(low.begin(), low.end(), 0.0);
      const int64_t t = o / channels_;
      for (int64_t q = std::min(t, steps_ - 1); q >= 0; --q) {
        for (int64_t c = 0; c < channels_; ++c) {
          kernels_.subtract_row_exactly(row, low.data(), &values_[((t - q) * channels_ + c) * columns_],
                                        taps_[(c * steps_ + q) * channels_ + o % channels_], columns_);
        }
      }
      for (int64_t i = 0; i < columns_; ++i) row[i] += low[i];
    }
  }

  int64_t channels_, outputs_, before_, columns_;
  double tap_sum_ = 0;
  int64_t steps_;             // taps that reach from one step of a block to another, the corner tap among them
  std::vector<double> taps_;  // [input channel][step back][output channel]
  std::vector<double> inverse_;
  std::vector<double> right_, values_;  // [output][column]
  const PrepareKernels& kernels_;
};

// Appends the matrix in the layout of Weights::step and Weights::block.
template <class S>
void append_tiles(const BlockResponse& response, int64_t lanes, std::vector<S>& to) {
  const int64_t padded = (response.outputs() + lanes - 1) / lanes * lanes;
  for (int64_t first = 0; first < padded; first += kTileVectors * lanes) {
    const int64_t last = std::min(first + kTileVectors * lanes, padded);
    for (int64_t column = 0; column < response.columns(); ++column) {
      for (int64_t o = first; o < last; ++o) {
        to.push_back(o < response.outputs() ? static_cast<S>(response.at(o, column)) : S(0));
      }
    }
  }
}

}  // namespace

template <class T>
Prepared<T> prepare_blocks(const Shape& shape, const std::vector<int64_t>& orders, const T* weight, const T* bias,
                           int64_t block, const BlockLanes& lanes, const PrepareKernels& kernels) {
  const int64_t n = shape.channels;
  const bool identity = shape.corner == kIdentity || (shape.corner == kUnitTriangular && n == 1);

  Prepared<T> prepared{};
  prepared.block_steps = block;
  if (bias) prepared.bias.assign(bias, bias + shape.groups * n);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const T* const from = weight + g * n * n * shape.taps();
    // The transposed solve swaps output and input.
    const auto tap = [&](int64_t q, int64_t o, int64_t c) -> double {
      if (shape.transposed) std::swap(o, c);
      if (q == 0 && (identity || (shape.corner == kUnitTriangular && c >= o))) return o == c ? 1 : 0;
      return from[(o * n + c) * shape.taps() + tap_offset(shape, orders[g], 0, 0, q)];
    };
    std::vector<double> inverse;
    if (!identity) {
      inverse.resize(n * n);
      for (int64_t o = 0; o < n; ++o) {
        for (int64_t c = 0; c < n; ++c) inverse[o * n + c] = tap(0, o, c);
      }
      invert_corner(inverse, n, g * n, kernels);
    }
    const BlockResponse response(n, shape.kernel_w, block, tap, inverse, std::is_same_v<T, double>, kernels);
    if (block == 1) {
      append_tiles(response, lanes.step, prepared.steps);
    } else if (response.condition() <= kMostCondition<T>) {
      append_tiles(response, lanes.block, prepared.blocks);
    } else {
      // Too large, or not a number.
      return prepare_blocks(shape, orders, weight, bias, 1, lanes, kernels);
    }
  }
  return prepared;
}

template Prepared<float> prepare_blocks(const Shape&, const std::vector<int64_t>&, const float*, const float*, int64_t,
                                        const BlockLanes&, const PrepareKernels&);
template Prepared<double> prepare_blocks(const Shape&, const std::vector<int64_t>&, const double*, const double*,
                                         int64_t, const BlockLanes&, const PrepareKernels&);

}  // namespace inverse_flow::cpu
