#include "prepare.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace inverse_flow::cpu {

namespace {

// Gauss-Jordan with partial pivoting on the n x n row-major matrix. Returns the column in which no pivot is left, or
// -1.
int64_t invert(std::vector<double> matrix, std::vector<double>& inverse, int64_t n, const PrepareKernels& kernels) {
  inverse.assign(n * n, 0);
  for (int64_t row = 0; row < n; ++row) inverse[row * n + row] = 1;
  for (int64_t column = 0; column < n; ++column) {
    int64_t pivot = column;
    for (int64_t row = column + 1; row < n; ++row) {
      if (std::abs(matrix[row * n + column]) > std::abs(matrix[pivot * n + column])) pivot = row;
    }
    if (matrix[pivot * n + column] == 0) return column;
    if (pivot != column) {
      std::swap_ranges(&matrix[pivot * n], &matrix[pivot * n] + n, &matrix[column * n]);
      std::swap_ranges(&inverse[pivot * n], &inverse[pivot * n] + n, &inverse[column * n]);
    }
    const double scale = 1 / matrix[column * n + column];
    for (int64_t k = 0; k < n; ++k) {
      matrix[column * n + k] *= scale;
      inverse[column * n + k] *= scale;
    }
    for (int64_t row = 0; row < n; ++row) {
      const double factor = matrix[row * n + column];
      if (row == column || factor == 0) continue;
      // Columns already reduced are unit vectors: only the rest of the row changes.
      kernels.subtract_row(&matrix[row * n + column], &matrix[column * n + column], factor, n - column);
      kernels.subtract_row(&inverse[row * n], &inverse[column * n], factor, n);
    }
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

// One group's weight in the coordinates of its solve, in float64: [output channel][input channel][tap], rows padded to
// a multiple of kProductColumns.
struct Matrix {
  std::vector<double> values;
  int64_t columns;
};

// matrix^-1 * right, in Matrix's layout: the inverse is multiplied by, and for `exact` the result is refined once by a
// residual of twice the digits, so that it is off by little more than its rounding.
Matrix solve(const std::vector<double>& matrix, const std::vector<double>& inverse, const Matrix& right, int64_t n,
             bool exact, const PrepareKernels& kernels) {
  std::vector<double> blocks(n * n);
  double* to = blocks.data();
  for_output_blocks(n, [&](int64_t first, int64_t width) {
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t o = first; o < first + width; ++o) *to++ = inverse[o * n + c];
    }
  });
  Matrix solution{std::vector<double>(right.values.size()), right.columns};
  kernels.add_product(solution.values.data(), blocks.data(), right.values.data(), n, right.columns);
  if (!exact) return solution;
  std::vector<double> residual = right.values;
  std::vector<double> low(right.columns);
  for (int64_t row = 0; row < n; ++row) {
    double* const at = &residual[row * right.columns];
    std::fill(low.begin(), low.end(), 0);
    for (int64_t k = 0; k < n; ++k) {
      kernels.subtract_row_exactly(at, low.data(), &solution.values[k * right.columns], matrix[row * n + k],
                                   right.columns);
    }
    for (int64_t i = 0; i < right.columns; ++i) at[i] += low[i];
  }
  kernels.add_product(solution.values.data(), blocks.data(), residual.data(), n, right.columns);
  return solution;
}

}  // namespace

template <class T>
Weights<T> Prepared<T>::group(const Shape& shape, int64_t group) const {
  const int64_t pairs = shape.channels * shape.channels;
  return {taps.data() + group * pairs * (shape.taps() - 1), corner.empty() ? nullptr : corner.data() + group * pairs,
          bias.empty() ? nullptr : bias.data() + group * shape.channels};
}

template <class T>
Prepared<T> prepare(const Shape& shape, const std::vector<int64_t>& orders, const T* weight, const T* bias,
                    const PrepareKernels& kernels) {
  const int64_t n = shape.channels;
  const int64_t pairs = n * n;
  const int64_t window = shape.taps();
  const bool identity = shape.corner == kIdentity || (shape.corner == kUnitTriangular && n == 1);

  Prepared<T> prepared;
  prepared.taps.resize(shape.groups * pairs * (window - 1));
  if (!identity) prepared.corner.resize(shape.groups * pairs);
  if (bias) prepared.bias.assign(bias, bias + shape.groups * n);

  std::vector<TapPosition> order(window);
  tap_order(shape, order.data());
  for (int64_t g = 0; g < shape.groups; ++g) {
    const T* from = weight + g * pairs * window;
    const int64_t corner = tap_offset(shape, orders[g], 0, 0);
    // Element (output o, input c) of a tap; the transposed solve swaps the two.
    const auto given = [&](int64_t o, int64_t c, int64_t offset) {
      return from[(shape.transposed ? c * n + o : o * n + c) * window + offset];
    };
    const auto write_taps = [&](const auto& at) {
      T* to = prepared.taps.data() + g * pairs * (window - 1);
      for_output_blocks(n, [&](int64_t first, int64_t width) {
        for (int64_t t = 0; t < window - 1; ++t) {
          const int64_t offset = tap_offset(shape, orders[g], order[t].p, order[t].q);
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
      std::vector<double> matrix(pairs), inverse;
      for (int64_t o = 0; o < n; ++o) {
        for (int64_t c = 0; c < n; ++c) matrix[o * n + c] = from[(o * n + c) * window + corner];
      }
      const int64_t column = invert(matrix, inverse, n, kernels);
      if (column >= 0) {
        throw std::runtime_error("the corner tap is singular: channel " + std::to_string(g * n + column) +
                                 " depends linearly on the channels before it in its group");
      }
      if (shape.transposed) {
        transpose(matrix, n);
        transpose(inverse, n);
      }
      // The identity in the corner's place becomes the inverse.
      Matrix right{{}, (n * window + kProductColumns - 1) / kProductColumns * kProductColumns};
      right.values.resize(n * right.columns);
      for (int64_t o = 0; o < n; ++o) {
        for (int64_t c = 0; c < n; ++c) {
          double* const to = &right.values[o * right.columns + c * window];
          for (int64_t offset = 0; offset < window; ++offset) to[offset] = given(o, c, offset);
          to[corner] = o == c;
        }
      }
      const Matrix folded = solve(matrix, inverse, right, n, std::is_same_v<T, double>, kernels);
      const auto at = [&](int64_t o, int64_t c, int64_t offset) {
        return folded.values[o * folded.columns + c * window + offset];
      };
      write_taps(at);
      write_corner([&](int64_t o, int64_t c) { return at(o, c, corner); });
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
  positions.back() = {0, 0};
  for (int64_t t = 0; t < shape.taps(); ++t) {
    const bool corner = t + 1 == shape.taps();
    const int64_t offset = tap_offset(shape, order, positions[t].p, positions[t].q);
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
