#include "prepare.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace inverse_flow::cpu {

namespace {

SubtractRow subtract_row_of(Isa isa) {
#if INVERSE_FLOW_X86
  if (isa == Isa::kAvx512) return &avx512::subtract_row;
  if (isa == Isa::kAvx2) return &avx2::subtract_row;
#endif
  (void)isa;
  return &portable::subtract_row;
}

// Gauss-Jordan with partial pivoting on the n x n row-major matrix, which is used up. Returns the column in which
// no pivot is left, or -1.
int64_t invert(std::vector<double>& matrix, std::vector<double>& inverse, int64_t n, SubtractRow subtract_row) {
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
      subtract_row(&matrix[row * n + column], &matrix[column * n + column], factor, n - column);
      subtract_row(&inverse[row * n], &inverse[column * n], factor, n);
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

}  // namespace

template <class T>
Weights<T> Prepared<T>::group(const Shape& shape, int64_t group) const {
  const int64_t pairs = shape.channels * shape.channels;
  return {taps.data() + group * pairs * (shape.taps() - 1), corner.empty() ? nullptr : corner.data() + group * pairs,
          bias.empty() ? nullptr : bias.data() + group * shape.channels};
}

template <class T>
Prepared<T> prepare(const Shape& shape, const std::vector<int64_t>& orders, const T* weight, const T* bias, Isa isa) {
  const int64_t n = shape.channels;
  const int64_t pairs = n * n;
  const int64_t window = shape.taps();
  const bool identity = shape.corner == kIdentity || (shape.corner == kUnitTriangular && n == 1);
  const SubtractRow subtract_row = subtract_row_of(isa);

  Prepared<T> prepared;
  prepared.taps.resize(shape.groups * pairs * (window - 1));
  if (!identity) prepared.corner.resize(shape.groups * pairs);
  if (bias) prepared.bias.assign(bias, bias + shape.groups * n);

  std::vector<TapPosition> order(window);
  tap_order(shape, order.data());
  std::vector<double> matrix, inverse;
  for (int64_t g = 0; g < shape.groups; ++g) {
    const T* from = weight + g * pairs * window;
    // Element (output o, input c) of a tap; the transposed solve swaps the two.
    const auto at = [&](int64_t o, int64_t c, int64_t offset) {
      return from[(shape.transposed ? c * n + o : o * n + c) * window + offset];
    };
    T* to = prepared.taps.data() + g * pairs * (window - 1);
    for_output_blocks(n, [&](int64_t first, int64_t width) {
      for (int64_t t = 0; t < window - 1; ++t) {
        const int64_t offset = tap_offset(shape, orders[g], order[t].p, order[t].q);
        for (int64_t c = 0; c < n; ++c) {
          for (int64_t o = 0; o < width; ++o) *to++ = -at(first + o, c, offset);
        }
      }
    });
    if (identity) continue;

    // M of the plain solve; a transposed one reads what becomes of it transposed.
    const int64_t corner = tap_offset(shape, orders[g], 0, 0);
    const auto m = [&](int64_t o, int64_t c) { return static_cast<double>(from[(o * n + c) * window + corner]); };
    inverse.assign(pairs, 0);
    if (shape.corner == kUnitTriangular) {
      for_output_blocks(n, [&](int64_t first, int64_t width) {
        for (int64_t o = first; o < first + width; ++o) {
          for (int64_t c = 0; c < o; ++c) inverse[o * n + c] = c < first ? -m(o, c) : m(o, c);
        }
        invert_unit_lower(&inverse[first * n + first], n, width);
      });
    } else {
      matrix.resize(pairs);
      for (int64_t o = 0; o < n; ++o) {
        inverse[o * n + o] = 1;
        for (int64_t c = 0; c < n; ++c) matrix[o * n + c] = m(o, c);
      }
      const int64_t column = invert(matrix, inverse, n, subtract_row);
      if (column >= 0) {
        throw std::runtime_error("the corner tap is singular: channel " + std::to_string(g * n + column) +
                                 " depends linearly on the channels before it in its group");
      }
    }
    to = prepared.corner.data() + g * pairs;
    for_output_blocks(n, [&](int64_t first, int64_t width) {
      for (int64_t c = 0; c < n; ++c) {
        for (int64_t o = first; o < first + width; ++o) {
          *to++ = static_cast<T>(shape.transposed ? inverse[c * n + o] : inverse[o * n + c]);
        }
      }
    });
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
template Prepared<float> prepare(const Shape&, const std::vector<int64_t>&, const float*, const float*, Isa);
template Prepared<double> prepare(const Shape&, const std::vector<int64_t>&, const double*, const double*, Isa);
template void add_weight_gradient(const Shape&, int64_t, const float*, float*);
template void add_weight_gradient(const Shape&, int64_t, const double*, double*);

}  // namespace inverse_flow::cpu
