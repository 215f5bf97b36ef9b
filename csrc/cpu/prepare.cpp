#include "prepare.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace inverse_flow::cpu {

namespace {

// Gauss-Jordan with partial pivoting, in place, on the n x n row-major matrix. Returns the column in which no pivot is
// left, or -1.
int64_t invert(std::vector<double>& matrix, int64_t n, const PrepareKernels& kernels) {
  std::vector<int64_t> pivots(n);
  std::vector<double> factors(n);
  for (int64_t column = 0; column < n; ++column) {
    int64_t pivot = column;
    for (int64_t row = column + 1; row < n; ++row) {
      if (std::abs(matrix[row * n + column]) > std::abs(matrix[pivot * n + column])) pivot = row;
    }
    pivots[column] = pivot;
    if (matrix[pivot * n + column] == 0) return column;
    double* const unit = &matrix[column * n];
    if (pivot != column) std::swap_ranges(unit, unit + n, &matrix[pivot * n]);
    const double scale = 1 / unit[column];
    // The column that becomes a unit vector makes room for that of the inverse.
    unit[column] = 1;
    for (int64_t k = 0; k < n; ++k) unit[k] *= scale;
    for (int64_t row = 0; row < n; ++row) factors[row] = std::exchange(matrix[row * n + column], 0.0);
    unit[column] = std::exchange(factors[column], 0.0);
    kernels.subtract_rows(matrix.data(), unit, factors.data(), n, n);
  }
  // Rows were exchanged on the way: the columns of the inverse are, in the opposite order.
  for (int64_t column = n - 1; column >= 0; --column) {
    if (pivots[column] == column) continue;
    for (int64_t row = 0; row < n; ++row) std::swap(matrix[row * n + column], matrix[row * n + pivots[column]]);
  }
  return -1;
}

// Inverts, in place, the strictly lower half of an n x n unit lower triangular matrix: forward substitution.
void invert_unit_lower(double* matrix, int64_t stride, int64_t n) {
  for (int64_t row = 1; row < n; ++row) {
    double inverse[kOutputBlock] = {};
    for (int64_t k = 0; k < row; ++k) {
      const double factor = matrix[row * stride + k];
      for (int64_t column = 0; column < k; ++column) inverse[column] -= factor * matrix[k * stride + column];
      inverse[k] -= factor;
    }
    std::copy(inverse, inverse + row, matrix + row * stride);
  }
}

// Calls f(first channel, width) for each block of output channels.
template <class F>
void for_output_blocks(int64_t channels, F f) {
  for (int64_t first = 0; first < channels; first += kOutputBlock) f(first, std::min(kOutputBlock, channels - first));
}

void transpose(std::vector<double>& matrix, int64_t n) {
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t column = 0; column < row; ++column) {
      std::swap(matrix[row * n + column], matrix[column * n + row]);
    }
  }
}

// Columns of a fold that one thread solves at a time: its chunk stays in the L1 cache up to about 50 channels, in the
// L2 cache beyond.
constexpr int64_t kFoldColumns = 3 * kProductColumns;

// Multiply-adds below which another thread would take longer to wake than to help.
constexpr int64_t kFoldGrain = 1 << 18;

// right := matrix^-1 * right for n rows of `columns` values: the inverse, in blocks of output channels, is multiplied
// by. Where the matrix is given, the result is refined once by a residual of twice the digits, so that it is off by
// little more than its rounding. `scratch` holds 2 * n * columns values.
void solve_chunk(const double* matrix, const double* inverse_blocks, double* right, double* scratch, int64_t n,
                 int64_t columns, const PrepareKernels& kernels) {
  double* const solution = scratch;
  std::fill_n(solution, n * columns, 0.0);
  kernels.add_product(solution, inverse_blocks, right, n, columns);
  if (matrix) {
    double* const low = scratch + n * columns;
    for (int64_t row = 0; row < n; ++row) {
      double* const at = right + row * columns;
      std::fill_n(low, columns, 0.0);
      for (int64_t k = 0; k < n; ++k) {
        kernels.subtract_row_exactly(at, low, solution + k * columns, matrix[row * n + k], columns);
      }
      for (int64_t i = 0; i < columns; ++i) at[i] += low[i];
    }
    kernels.add_product(solution, inverse_blocks, right, n, columns);
  }
  std::copy_n(solution, n * columns, right);
}

}  // namespace

void invert_corner(std::vector<double>& matrix, int64_t n, int64_t first_channel, const PrepareKernels& kernels) {
  const int64_t column = invert(matrix, n, kernels);
  if (column < 0) return;
  throw std::runtime_error("the corner tap is singular: channel " + std::to_string(first_channel + column) +
                           " depends linearly on the channels before it in its group");
}

template <class T>
Weights<T> Prepared<T>::group(const Shape& shape, int64_t group) const {
  const auto part = [&](const auto& values) {
    return values.empty() ? nullptr : values.data() + group * (static_cast<int64_t>(values.size()) / shape.groups);
  };
  return {part(taps), part(corner), part(bias), part(steps), part(blocks), block_steps};
}

template <class T>
Prepared<T> prepare(const Shape& shape, const std::vector<int64_t>& orders, const T* weight, const T* bias,
                    const PrepareKernels& kernels) {
  const int64_t n = shape.channels;
  const int64_t pairs = n * n;
  const int64_t window = shape.taps();
  const bool identity = shape.corner == kIdentity || (shape.corner == kUnitTriangular && n == 1);

  Prepared<T> prepared{};
  prepared.taps.resize(shape.groups * pairs * (window - 1));
  if (!identity) prepared.corner.resize(shape.groups * pairs);
  if (bias) prepared.bias.assign(bias, bias + shape.groups * n);

  std::vector<TapPosition> order(window);
  tap_order(shape, order.data());
  for (int64_t g = 0; g < shape.groups; ++g) {
    const T* from = weight + g * pairs * window;
    const int64_t corner = tap_offset(shape, orders[g], 0, 0, 0);
    // Element (output o, input c) of a tap; the transposed solve swaps the two.
    const auto given = [&](int64_t o, int64_t c, int64_t offset) {
      return from[(shape.transposed ? c * n + o : o * n + c) * window + offset];
    };
    const auto write_taps = [&](const auto& at) {
      T* to = prepared.taps.data() + g * pairs * (window - 1);
      for_output_blocks(n, [&](int64_t first, int64_t width) {
        for (int64_t t = 0; t < window - 1; ++t) {
          const int64_t offset = tap_offset(shape, orders[g], order[t].a, order[t].p, order[t].q);
          for (int64_t c = 0; c < n; ++c) {
            for (int64_t o = first; o < first + width; ++o) *to++ = static_cast<T>(-at(o, c, offset));
          }
        }
      });
    };
    const auto write_corner = [&](const auto& at) {
      T* to = prepared.corner.data() + g * pairs;
      for_output_blocks(n, [&](int64_t first, int64_t width) {
        for (int64_t c = 0; c < n; ++c) {
          for (int64_t o = first; o < first + width; ++o) *to++ = static_cast<T>(at(o, c));
        }
      });
    };

    if (shape.corner == kGeneral) {
      std::vector<double> inverse(pairs);
      for (int64_t o = 0; o < n; ++o) {
        for (int64_t c = 0; c < n; ++c) inverse[o * n + c] = from[(o * n + c) * window + corner];
      }
      constexpr bool kExact = std::is_same_v<T, double>;
      std::vector<double> matrix;
      if (kExact) matrix = inverse;
      invert_corner(inverse, n, g * n, kernels);
      if (shape.transposed) {
        transpose(matrix, kExact ? n : 0);
        transpose(inverse, n);
      }
      std::vector<double> blocks(pairs);
      double* block = blocks.data();
      for_output_blocks(n, [&](int64_t first, int64_t width) {
        for (int64_t c = 0; c < n; ++c) {
          for (int64_t o = first; o < first + width; ++o) *block++ = inverse[o * n + c];
        }
      });
      write_corner([&](int64_t o, int64_t c) { return inverse[o * n + c]; });

      // M^-1 W by chunks of input channels, each with all of its taps, from the weight into the packed taps.
      const int64_t taps = window - 1;
      const int64_t chunk_channels = std::max<int64_t>(kFoldColumns / std::max<int64_t>(taps, 1), 1);
      const int64_t chunks = taps > 0 ? (n + chunk_channels - 1) / chunk_channels : 0;
      const int64_t most_columns = (chunk_channels * taps + kProductColumns - 1) / kProductColumns * kProductColumns;
      std::vector<int64_t> offsets(taps);
      for (int64_t t = 0; t < taps; ++t) {
        offsets[t] = tap_offset(shape, orders[g], order[t].a, order[t].p, order[t].q);
      }
      const auto fold = [&](int64_t begin, int64_t end) {
        std::vector<double> memory(3 * n * most_columns);
        double* const right = memory.data();
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t first_channel = chunk * chunk_channels;
          const int64_t last_channel = std::min(first_channel + chunk_channels, n);
          for (int64_t o = 0; o < n; ++o) {
            double* to = right + o * most_columns;
            for (int64_t c = first_channel; c < last_channel; ++c) {
              for (int64_t t = 0; t < taps; ++t) *to++ = given(o, c, offsets[t]);
            }
          }
          solve_chunk(kExact ? matrix.data() : nullptr, blocks.data(), right, right + n * most_columns, n, most_columns,
                      kernels);
          for_output_blocks(n, [&](int64_t first, int64_t width) {
            for (int64_t c = first_channel; c < last_channel; ++c) {
              for (int64_t t = 0; t < taps; ++t) {
                const double* const solved = right + first * most_columns + (c - first_channel) * taps + t;
                T* const to = prepared.taps.data() + g * pairs * taps + (first * taps + t * width) * n + c * width;
                for (int64_t o = 0; o < width; ++o) to[o] = static_cast<T>(-solved[o * most_columns]);
              }
            }
          });
        }
      };
      const int64_t grain = std::max<int64_t>(kFoldGrain / std::max<int64_t>(n * n * most_columns, 1), 1);
      torch::stable::parallel_for(0, chunks, grain, fold);
      continue;
    }
    write_taps(given);
    if (identity) continue;

    // M of the plain solve; a transposed one reads what becomes of it transposed.
    const auto m = [&](int64_t o, int64_t c) { return static_cast<double>(from[(o * n + c) * window + corner]); };
    std::vector<double> inverse(pairs);
    for_output_blocks(n, [&](int64_t first, int64_t width) {
      for (int64_t o = first; o < first + width; ++o) {
        for (int64_t c = 0; c < o; ++c) inverse[o * n + c] = c < first ? -m(o, c) : m(o, c);
      }
      invert_unit_lower(&inverse[first * n + first], n, width);
    });
    write_corner([&](int64_t o, int64_t c) { return shape.transposed ? inverse[c * n + o] : inverse[o * n + c]; });
  }
  return prepared;
}

template <class T>
void add_weight_gradient(const Shape& shape, int64_t order, const T* sums, T* group_gradient) {
  const int64_t n = shape.channels;
  std::vector<TapPosition> positions(shape.taps());
  tap_order(shape, positions.data());
  positions.back() = {0, 0, 0};
  for (int64_t t = 0; t < shape.taps(); ++t) {
    const bool corner = t + 1 == shape.taps();
    const int64_t offset = tap_offset(shape, order, positions[t].a, positions[t].p, positions[t].q);
    for (int64_t u = 0; u < n; ++u) {
      for (int64_t x = 0; x < n; ++x) {
        // A transposed solve belongs to the gradient of a plain one, where u sits on the output side of the weight.
        const int64_t out = shape.transposed ? u : x;
        const int64_t in = shape.transposed ? x : u;
        if (corner && (shape.corner == kIdentity || (shape.corner == kUnitTriangular && in >= out))) continue;
        group_gradient[(out * n + in) * shape.taps() + offset] += sums[(t * n + u) * n + x];
      }
    }
  }
}

template struct Prepared<float>;
template struct Prepared<double>;
template Prepared<float> prepare(const Shape&, const std::vector<int64_t>&, const float*, const float*,
                                 const PrepareKernels&);
template Prepared<double> prepare(const Shape&, const std::vector<int64_t>&, const double*, const double*,
                                  const PrepareKernels&);
template void add_weight_gradient(const Shape&, int64_t, const float*, float*);
template void add_weight_gradient(const Shape&, int64_t, const double*, double*);

}  // namespace inverse_flow::cpu
