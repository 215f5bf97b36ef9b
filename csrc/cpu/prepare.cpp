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

// matrix^-1 * right for n rows of `columns` values: the inverse is multiplied by. With `refine` the result is corrected
// once by a residual of twice the digits, so that it is off by little more than its rounding.
std::vector<double> solve_rows(const std::vector<double>& matrix, const std::vector<double>& inverse,
                               std::vector<double> right, int64_t n, int64_t columns, bool refine,
                               const PrepareKernels& kernels) {
  std::vector<double> solution(n * columns);
  std::vector<double> factors(n);
  const auto add_product = [&] {
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t row = 0; row < n; ++row) factors[row] = -inverse[row * n + k];
      kernels.subtract_rows(solution.data(), &right[k * columns], factors.data(), n, columns);
    }
  };
  add_product();
  if (!refine) return solution;
  std::vector<double> low(columns);
  for (int64_t row = 0; row < n; ++row) {
    double* const at = &right[row * columns];
    std::fill(low.begin(), low.end(), 0.0);
    for (int64_t k = 0; k < n; ++k) {
      kernels.subtract_row_exactly(at, low.data(), &solution[k * columns], matrix[row * n + k], columns);
    }
    for (int64_t i = 0; i < columns; ++i) at[i] += low[i];
  }
  add_product();
  return solution;
}

// Weights below which another thread would take longer to wake than to help.
constexpr int64_t kPackGrain = 1 << 14;

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

  const int64_t taps = window - 1;
  std::vector<TapPosition> order(window);
  tap_order(shape, order.data());
  std::vector<int64_t> offsets(taps);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const T* from = weight + g * pairs * window;
    const int64_t corner = tap_offset(shape, orders[g], 0, 0, 0);
    for (int64_t t = 0; t < taps; ++t) {
      offsets[t] = tap_offset(shape, orders[g], order[t].a, order[t].p, order[t].q);
    }
    // Element (output o, input c) of a tap; the transposed solve swaps the two.
    const auto given = [&](int64_t o, int64_t c, int64_t t) {
      return from[(shape.transposed ? c * n + o : o * n + c) * window + offsets[t]];
    };
    const auto write_taps = [&](const auto& at) {
      const int64_t blocks = (n + kOutputBlock - 1) / kOutputBlock;
      const int64_t grain = std::max<int64_t>(kPackGrain / (kOutputBlock * n * window), 1);
      torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * kOutputBlock; first < std::min(end * kOutputBlock, n); first += kOutputBlock) {
          const int64_t width = std::min(kOutputBlock, n - first);
          T* const block = prepared.taps.data() + g * pairs * taps + first * n * taps;
          // In the order of the weight, which is read once.
          for (int64_t c = 0; c < n; ++c) {
            for (int64_t t = 0; t < taps; ++t) {
              T* const to = block + (t * n + c) * width;
              for (int64_t o = 0; o < width; ++o) to[o] = static_cast<T>(-at(first + o, c, t));
            }
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
      constexpr bool kExact = std::is_same_v<T, double>;
      std::vector<double> matrix(pairs);
      for (int64_t o = 0; o < n; ++o) {
        for (int64_t c = 0; c < n; ++c) matrix[o * n + c] = from[(o * n + c) * window + corner];
      }
      std::vector<double> inverse = matrix;
      invert_corner(inverse, n, g * n, kernels);
      if (shape.transposed) {
        transpose(matrix, n);
        transpose(inverse, n);
      }
      if (folds_corner(shape)) {
        std::vector<double> right(n * n * taps);
        double* to = right.data();
        for (int64_t o = 0; o < n; ++o) {
          for (int64_t c = 0; c < n; ++c) {
            for (int64_t t = 0; t < taps; ++t) *to++ = given(o, c, t);
          }
        }
        const std::vector<double> folded = solve_rows(matrix, inverse, right, n, n * taps, kExact, kernels);
        write_taps([&](int64_t o, int64_t c, int64_t t) { return folded[(o * n + c) * taps + t]; });
      } else {
        write_taps(given);
        if (kExact) {
          std::vector<double> identity_matrix(pairs);
          for (int64_t o = 0; o < n; ++o) identity_matrix[o * n + o] = 1;
          inverse = solve_rows(matrix, inverse, identity_matrix, n, n, kExact, kernels);
        }
      }
      write_corner([&](int64_t o, int64_t c) { return inverse[o * n + c]; });
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
