// Folding the corner into the other taps: W'_d = M^-1 W_d, in double precision, rounded once to the state type.
//
// M is inverted in place by Gauss-Jordan elimination, the whole block on one matrix. Rows are never swapped: step k
// picks as pivot the largest entry of column k among the rows not yet used, and remembers it in pivot_of_step[k] = p
// and step_of_pivot[p] = k. Eliminating with the normalised pivot row from every other row leaves, in place of column
// k, column p of the elimination matrix, so that at the end M^-1[i][c] = A[pivot_of_step[i]][step_of_pivot[c]].
// A step costs C^2 multiplications and three barriers (two without pivoting): after the pivot is known, after the
// pivot row and column were copied away, after the update. A singular corner gives NaN everywhere.
//
// Folded weights of a group lie as [tap a * taps_w + b][pack of input channels][output channel][pack], tap (0, 0)
// holding M^-1 itself: threads of neighbouring output channels then read neighbouring packs of 16 bytes. For the tensor
// cores they lie as the lanes of a warp read them (TensorPlan::fragment_place).
#pragma once

#include "element.cuh"
#include "orders.h"
#include "plan.h"

namespace inverse_flow {

// The weight of one group, seen canonically: mirrored to the top-left order, and transposed for transposed solves.
struct WeightView {
  const void* data;
  ElementType type;
  int64_t group_offset;
  int32_t channels;
  int32_t kernel_h;
  int32_t kernel_w;
  int32_t order;
  Corner corner;
  bool transposed;

  // W[o][c] of the tap that reaches a rows and b columns away.
  __device__ double at(int o, int c, int a, int b) const {
    const int row = (order & kMirrorRows) ? a : kernel_h - 1 - a;
    const int column = (order & kMirrorColumns) ? b : kernel_w - 1 - b;
    const int64_t pair = transposed ? static_cast<int64_t>(c) * channels + o : static_cast<int64_t>(o) * channels + c;
    return load_element<double>(data, group_offset + (pair * kernel_h + row) * kernel_w + column, type);
  }

  __device__ double corner_at(int o, int c) const {
    if (corner == kGeneral) return at(o, c, 0, 0);
    const bool is_read = corner == kUnitTriangular && (transposed ? o < c : o > c);
    return is_read ? at(o, c, 0, 0) : o == c;
  }
};

__device__ inline WeightView weight_view(const Shape& shape, const void* weight, ElementType type, int64_t group,
                                         int order) {
  return {weight,
          type,
          group * shape.channels * shape.channels * shape.kernel_h * shape.kernel_w,
          static_cast<int32_t>(shape.channels),
          static_cast<int32_t>(shape.kernel_h),
          static_cast<int32_t>(shape.kernel_w),
          order,
          shape.corner,
          shape.transposed};
}

// Memory of an inversion. A pixel of all channels fits shared memory, so channels^2 fits an int. `matrix` ends as the
// inverse, its rows and columns permuted as said above.
struct Inversion {
  double* matrix;
  double* pivot_row;
  double* pivot_column;
  int32_t* pivot_of_step;
  int32_t* step_of_pivot;

  __device__ Inversion(double* matrix_memory, void* scratch, int channels)
      : matrix(matrix_memory),
        pivot_row(static_cast<double*>(scratch)),
        pivot_column(pivot_row + channels),
        pivot_of_step(reinterpret_cast<int32_t*>(pivot_column + channels)),
        step_of_pivot(pivot_of_step + channels) {}
};

// The work of the first warp: the row that column `step` is to be eliminated with.
__device__ inline int find_pivot(const Inversion& inversion, int channels, int step) {
  int row = -1;
  double largest = -1;
  for (int i = threadIdx.x; i < channels; i += kWarp) {
    const double size = fabs(inversion.matrix[i * channels + step]);
    if (inversion.step_of_pivot[i] < 0 && (row < 0 || size > largest)) {
      row = i;
      largest = size;
    }
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const double other_size = __shfl_xor_sync(kFullWarp, largest, distance);
    const int other_row = __shfl_xor_sync(kFullWarp, row, distance);
    // The smaller row of equals, so that every lane agrees.
    const bool better = other_size > largest || (!(other_size < largest) && other_row < row);
    if (other_row >= 0 && (row < 0 || better)) {
      row = other_row;
      largest = other_size;
    }
  }
  return row;
}

// Inverts the corner; the whole block takes part, and may read the result when this returns.
__device__ inline void invert_corner(const WeightView& weight, const Inversion& inversion) {
  const int channels = weight.channels;
  const bool pivoting = weight.corner == kGeneral;
  double* matrix = inversion.matrix;
  for (int i = threadIdx.x; i < channels * channels; i += blockDim.x) {
    matrix[i] = weight.corner_at(i / channels, i % channels);
  }
  for (int i = threadIdx.x; i < channels; i += blockDim.x) {
    inversion.pivot_of_step[i] = i;
    inversion.step_of_pivot[i] = pivoting ? -1 : i;
  }
  __syncthreads();
  for (int step = 0; step < channels; ++step) {
    if (pivoting) {
      if (threadIdx.x < kWarp) {
        const int pivot = find_pivot(inversion, channels, step);
        if (threadIdx.x == 0) {
          inversion.pivot_of_step[step] = pivot;
          inversion.step_of_pivot[pivot] = step;
        }
      }
      __syncthreads();
    }
    const int pivot = inversion.pivot_of_step[step];
    const double pivot_value = matrix[pivot * channels + step];
    const double reciprocal = pivot_value == 0 ? not_a_number() : 1 / pivot_value;
    for (int i = threadIdx.x; i < channels; i += blockDim.x) {
      inversion.pivot_row[i] = i == step ? reciprocal : matrix[pivot * channels + i] * reciprocal;
      inversion.pivot_column[i] = matrix[i * channels + step];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < channels * channels; i += blockDim.x) {
      const int row = i / channels;
      const int column = i - row * channels;
      const double kept = column == step ? 0 : matrix[i];
      matrix[i] =
          row == pivot ? inversion.pivot_row[column] : kept - inversion.pivot_column[row] * inversion.pivot_row[column];
    }
    __syncthreads();
  }
}

// One entry of W'_(a, b); for tap (0, 0), of M^-1.
__device__ inline double folded_entry(const WeightView& weight, const Inversion& inversion, int o, int c, int a,
                                      int b) {
  const int channels = weight.channels;
  if (weight.corner == kIdentity) return a == 0 && b == 0 ? o == c : weight.at(o, c, a, b);
  const double* row = inversion.matrix + inversion.pivot_of_step[o] * channels;
  if (a == 0 && b == 0) return row[inversion.step_of_pivot[c]];
  // The inverse of a triangular corner is triangular.
  const bool triangular = weight.corner == kUnitTriangular;
  const int begin = triangular && weight.transposed ? o : 0;
  const int end = triangular && !weight.transposed ? o + 1 : channels;
  double sum = 0;
  for (int i = begin; i < end; ++i) sum += row[i] * weight.at(inversion.pivot_of_step[i], c, a, b);
  return sum;
}

// Folds all taps of a group into `folded`, entries shared out over `threads` threads. Index: an integer type that
// holds the number of entries; division is slow on 64 bits.
template <typename Index, typename State>
__device__ void fold_taps(const WeightView& weight, const Inversion& inversion, const SolvePlan& plan, State* folded,
                          Index thread, Index threads) {
  const Index channels = weight.channels;
  const Index taps = static_cast<Index>(plan.taps_h) * plan.taps_w;
  const Index padded = static_cast<Index>(plan.folded_inputs());
  const Index outputs = static_cast<Index>(plan.folded_outputs(channels));
  // The tap is the fastest digit: so it is in the weight's memory.
  for (Index entry = thread; entry < outputs * padded * taps; entry += threads) {
    const Index pair = entry / taps;
    const Index tap = entry - pair * taps;
    const Index o = pair / padded;
    const Index c = pair - o * padded;
    const int a = static_cast<int>(tap / plan.taps_w);
    const int b = static_cast<int>(tap - static_cast<Index>(a) * plan.taps_w);
    Index place;
    if (plan.regime == SolveRegime::kTensor) {
      place = static_cast<Index>(plan.tensor.fragment_place(tap_position(plan.taps_h, plan.taps_w, a, b), o, c));
    } else {
      const Index pack = c / plan.pack;
      place = ((tap * plan.channel_packs + pack) * channels + o) * plan.pack + (c - pack * plan.pack);
    }
    folded[place] =
        c < channels && o < channels
            ? static_cast<State>(folded_entry(weight, inversion, static_cast<int>(o), static_cast<int>(c), a, b))
            : State(0);
  }
}

// ---- The launches before a solve whose blocks do not fold for themselves ----

template <typename State>
struct FoldArguments {
  Shape shape;
  SolvePlan plan;
  GroupOrders orders;
  int64_t first_group;
  const void* weight;
  ElementType weight_type;
  double* matrices;  // channels x channels a group
  double* scratch;   // inversion_scratch_bytes a group
  State* folded;     // plan.folded_elements a group
};

template <typename State>
__device__ Inversion workspace_inversion(const FoldArguments<State>& args, int64_t group) {
  const int64_t channels = args.shape.channels;
  return {args.matrices + group * channels * channels,
          args.scratch + group * (inversion_scratch_bytes(channels) / static_cast<int64_t>(sizeof(double))),
          static_cast<int>(channels)};
}

// One block a group: for corners that do not fit shared memory.
template <typename State>
__global__ void __launch_bounds__(kMaxThreads, 1)
    invert_corner_kernel(const __grid_constant__ FoldArguments<State> args) {
  const int64_t group = args.first_group + blockIdx.y;
  const WeightView weight = weight_view(args.shape, args.weight, args.weight_type, group, args.orders[blockIdx.y]);
  invert_corner(weight, workspace_inversion(args, group));
}

// Blocks of x share a group's entries, and each inverts the corner for itself if that fits shared memory: at the same
// time as the others, so it costs no time of its own, and spares a launch.
template <typename State>
__global__ void __launch_bounds__(kMaxThreads, 1) fold_taps_kernel(const __grid_constant__ FoldArguments<State> args) {
  const int64_t group = args.first_group + blockIdx.y;
  const int channels = static_cast<int>(args.shape.channels);
  const WeightView weight = weight_view(args.shape, args.weight, args.weight_type, group, args.orders[blockIdx.y]);
  Inversion inversion = workspace_inversion(args, group);
  if (args.plan.fold_shared_bytes > 0) {
    double* const matrix = reinterpret_cast<double*>(dynamic_shared_memory());
    inversion = Inversion(matrix, matrix + channels * channels, channels);
    invert_corner(weight, inversion);
  }
  fold_taps<int64_t>(weight, inversion, args.plan, args.folded + group * args.plan.folded_elements(args.shape.channels),
                     static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x,
                     static_cast<int64_t>(gridDim.x) * blockDim.x);
}

}  // namespace inverse_flow
