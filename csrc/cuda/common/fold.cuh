// Folding the corner into the other taps: W'_d = M^-1 W_d, in double precision, rounded once to the state type.
//
// The block inverts M of the plain solve in place, in float64; a transposed solve reads the inverse transposed.
// Unit triangular: inverses of diagonal blocks of 1, 2, 4, ... rows, two neighbours at a time,
//     [L11  0 ]^-1   [ X11            0  ]
//     [L21 L22]    = [-X22 L21 X11   X22 ],
// a thread per entry of L21 X11 (kept, transposed, in the unused upper triangle), then of the product with X22. Two
// barriers per level, ceil(log2 C) - 1 levels: the first level is a change of sign, made as the corner is loaded.
// C^3 / 3 multiply-adds in all.
// General: Gauss-Jordan elimination. Rows are never swapped: step k picks as pivot the largest entry of column k, to
// 2^-15, among the rows not yet used, and remembers it in pivot_of_step[k] = p and step_of_pivot[p] = k. Every warp
// looks for it, so none has to wait for another's answer. Eliminating with the normalised pivot row from every other
// row leaves, in place of column k, column p of the elimination matrix, so that at the end M^-1[i][c] =
// A[pivot_of_step[i]][step_of_pivot[c]]. A step costs C^2 multiplications and two barriers: after the pivot row and
// column were copied away, after the update. A singular corner gives NaN everywhere.
// Who inverts is a team: the block, or, where a warp has a lane for every entry of a step, the first warp of a block
// that folds for itself. Its barriers are those of a warp; meanwhile the other warps copy the weights.
//
// Where the folded weights of a group lie, tap (0, 0) holding M^-1 itself, each regime says by a layout: PackedTaps of
// fold.h, or FragmentTaps of tensor/plan.h, as the lanes of a warp read them.
#pragma once

#include "element.cuh"
#include "fold.h"
#include "orders.h"

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

  // Where W[o][c] of the plain solve stands, for the tap that reaches a rows and b columns away.
  __device__ int64_t place(int o, int c, int a, int b) const {
    return group_offset +
           ((static_cast<int64_t>(o) * channels + c) * kernel_h + tap_row(kernel_h, order, a)) * kernel_w +
           tap_column(kernel_w, order, b);
  }

  __device__ double at(int o, int c, int a, int b) const {
    return load_element<double>(data, transposed ? place(c, o, a, b) : place(o, c, a, b), type);
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

// Threads that work together and wait for each other, thread `thread` of `threads`, each with so many loads under way
// at a time: the block,
template <int loads>
struct BlockTeam {
  static constexpr int kLoads = loads;
  int thread = static_cast<int>(threadIdx.x);
  int threads = static_cast<int>(blockDim.x);

  __device__ void sync() const { __syncthreads(); }
};
// or its first warp.
template <int loads>
struct WarpTeam {
  static constexpr int kLoads = loads;
  int thread = static_cast<int>(threadIdx.x);
  int threads = kWarp;

  __device__ void sync() const { __syncwarp(); }
};
// Eight loads, where the kernel has registers to spare.
constexpr int kFoldLoads = 8;

// Calls store(i, load(i)) for every thread's share of 0, 1, ... count - 1. A loop that the compiler unrolls would have
// the loads of its remainder wait for each other.
template <int kLoads, typename Load, typename Store>
__device__ void load_together(int thread, int threads, int count, Load load, Store store) {
  for (int first = thread; first < count; first += kLoads * threads) {
    decltype(load(0)) values[kLoads];
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      if (first + u * threads < count) values[u] = load(first + u * threads);
    }
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      if (first + u * threads < count) store(first + u * threads, values[u]);
    }
  }
}

// Where a copy of a group's weights in shared memory stands, one after the other as they were.
template <typename State>
__device__ WeightView staged_weight(const WeightView& weight, const State* memory) {
  WeightView staged = weight;
  staged.data = memory;
  staged.type = sizeof(State) == sizeof(double) ? ElementType::kDouble : ElementType::kFloat;
  staged.group_offset = 0;
  return staged;
}

// Makes that copy, a few loads of a thread at a time: reading each weight where it is needed would wait for each. The
// caller puts a barrier behind it.
template <int kLoads, typename State>
__device__ void stage_weight(const WeightView& weight, State* memory, int thread, int threads) {
  const int elements = weight.channels * weight.channels * weight.kernel_h * weight.kernel_w;
  with_elements(weight.data, weight.type, [&](const auto* source) {
    const auto* const first = source + weight.group_offset;
    load_together<kLoads>(
        thread, threads, elements, [&](int i) { return first[i]; },
        [&](int i, auto value) { memory[i] = static_cast<State>(to_state(value)); });
  });
}

// Memory of an inversion, and its result. A pixel of all channels fits shared memory, so channels^2 fits an int.
struct Inversion {
  double* matrix;
  int pitch;  // odd, so that neighbours in a column meet different banks
  double* pivot_row;
  double* pivot_column;
  int32_t* pivot_of_step;
  int32_t* step_of_pivot;

  // Of inversion_bytes.
  __device__ Inversion(void* memory, int channels)
      : matrix(static_cast<double*>(memory)),
        pitch(channels | 1),
        pivot_row(matrix + channels * pitch),
        pivot_column(pivot_row + channels),
        pivot_of_step(reinterpret_cast<int32_t*>(pivot_column + channels)),
        step_of_pivot(pivot_of_step + channels) {}

  // M^-1[i][c] of the plain solve.
  __device__ double plain(Corner corner, int i, int c) const {
    if (corner == kUnitTriangular) return c > i ? 0 : matrix[i * pitch + c];
    return matrix[pivot_of_step[i] * pitch + step_of_pivot[c]];
  }
  __device__ double at(const WeightView& weight, int i, int c) const {
    return weight.transposed ? plain(weight.corner, c, i) : plain(weight.corner, i, c);
  }
};

// Copies the corner into the matrix, as its inversion begins: of a unit triangular one
// blocks of one row are their own inverses, and those of two rows need a sign; of a general one no row is used.
template <typename Team>
__device__ void load_corner(const WeightView& weight, const Inversion& inversion, const Team& team) {
  const int channels = weight.channels;
  const bool is_general = weight.corner == kGeneral;
  with_elements(weight.data, weight.type, [&](const auto* source) {
    load_together<Team::kLoads>(
        team.thread, team.threads, channels * channels,
        [&](int i) { return source[weight.place(i / channels, i % channels, 0, 0)]; },
        [&](int i, auto loaded) {
          const int row = i / channels;
          const int column = i - row * channels;
          const auto value = static_cast<double>(to_state(loaded));
          double& entry = inversion.matrix[row * inversion.pitch + column];
          entry = value;
          if (is_general) return;
          if (column == row) entry = 1;
          if (column == row - 1 && row % 2 == 1) entry = -value;
        });
  });
  if (is_general) {
    for (int i = team.thread; i < channels; i += team.threads) inversion.step_of_pivot[i] = -1;
  }
}

// The unit lower triangle of the matrix, as load_corner leaves it, becomes its inverse; what was above it is lost.
template <typename Team>
__device__ void invert_unit_triangular(const Inversion& inversion, int channels, const Team& team) {
  double* const matrix = inversion.matrix;
  const int pitch = inversion.pitch;
  for (int size = 2; size < channels; size *= 2) {
    // Rows of the later blocks of all pairs: the last block may be short, or missing.
    const int rest = channels % (2 * size) - size;
    const int rows = channels / (2 * size) * size + (rest > 0 ? rest : 0);
    for (int item = team.thread; item < rows * size; item += team.threads) {
      const int count = item / size;
      const int column = count / size * 2 * size + item % size;
      const int row = count / size * 2 * size + size + count % size;
      double sum = 0;
      INVERSE_FLOW_UNROLL_BY(4)
      for (int k = column; k < row - count % size; ++k) sum += matrix[row * pitch + k] * matrix[k * pitch + column];
      matrix[column * pitch + row] = sum;
    }
    team.sync();  // L21 X11 is there
    for (int item = team.thread; item < rows * size; item += team.threads) {
      const int count = item / size;
      const int column = count / size * 2 * size + item % size;
      const int row = count / size * 2 * size + size + count % size;
      double sum = 0;
      INVERSE_FLOW_UNROLL_BY(4)
      for (int k = row - count % size; k <= row; ++k) sum += matrix[row * pitch + k] * matrix[column * pitch + k];
      matrix[row * pitch + column] = -sum;
    }
    team.sync();  // the blocks of this level are inverted
  }
}

// The row that column `step` is to be eliminated with; every lane of a warp gets the answer.
__device__ inline int find_pivot(const Inversion& inversion, int channels, int step) {
  constexpr unsigned kLane = 31;
  constexpr unsigned kCandidate = 0x80000000u;  // free: sizes have no sign
  const unsigned lane = threadIdx.x % kWarp;
  int row = -1;
  unsigned best = 0;
  for (int i = static_cast<int>(lane); i < channels; i += kWarp) {
    const unsigned size = high_word(fabs(inversion.matrix[i * inversion.pitch + step]));
    const unsigned key = kCandidate | (size & ~kLane);
    if (inversion.step_of_pivot[i] < 0 && key > best) {
      row = i;
      best = key;
    }
  }
  const unsigned winner = __reduce_max_sync(kFullWarp, best | (kLane - lane));
  return __shfl_sync(kFullWarp, row, static_cast<int>(kLane - (winner & kLane)));
}

template <typename Team>
__device__ void invert_general(const Inversion& inversion, int channels, const Team& team) {
  double* const matrix = inversion.matrix;
  const int pitch = inversion.pitch;
  for (int step = 0; step < channels; ++step) {
    const int pivot = find_pivot(inversion, channels, step);
    const double pivot_value = matrix[pivot * pitch + step];
    const double reciprocal = pivot_value == 0 ? not_a_number() : 1 / pivot_value;
    for (int i = team.thread; i < channels; i += team.threads) {
      inversion.pivot_row[i] = i == step ? reciprocal : matrix[pivot * pitch + i] * reciprocal;
      inversion.pivot_column[i] = matrix[i * pitch + step];
    }
    team.sync();  // the pivot row and column are copied, and every warp has its pivot
    if (team.thread == 0) {
      inversion.pivot_of_step[step] = pivot;
      inversion.step_of_pivot[pivot] = step;
    }
    for (int i = team.thread; i < channels * channels; i += team.threads) {
      const int row = i / channels;
      const int column = i - row * channels;
      double& entry = matrix[row * pitch + column];
      const double kept = column == step ? 0 : entry;
      entry =
          row == pivot ? inversion.pivot_row[column] : kept - inversion.pivot_column[row] * inversion.pivot_row[column];
    }
    team.sync();  // the update is done
  }
}

// Inverts the corner; the whole team takes part, and may read the result when this returns.
template <typename Team>
__device__ void invert_corner(const WeightView& weight, const Inversion& inversion, const Team& team) {
  load_corner(weight, inversion, team);
  team.sync();  // the corner is there
  if (weight.corner == kUnitTriangular) {
    invert_unit_triangular(inversion, weight.channels, team);
  } else {
    invert_general(inversion, weight.channels, team);
  }
}

// One entry of W'_(a, b); for tap (0, 0), of M^-1.
__device__ inline double folded_entry(const WeightView& weight, const Inversion& inversion, int o, int c, int a,
                                      int b) {
  if (weight.corner == kIdentity) return a == 0 && b == 0 ? o == c : weight.at(o, c, a, b);
  if (a == 0 && b == 0) return inversion.at(weight, o, c);
  // The inverse of a triangular corner is triangular.
  const bool triangular = weight.corner == kUnitTriangular;
  const int begin = triangular && weight.transposed ? o : 0;
  const int end = triangular && !weight.transposed ? o + 1 : weight.channels;
  double sum = 0;
  for (int i = begin; i < end; ++i) sum += inversion.at(weight, o, i) * weight.at(i, c, a, b);
  return sum;
}

// Folds all taps of a group into `folded`, entries shared out over `threads` threads. Index: an integer type that
// holds the number of entries; division is slow on 64 bits.
template <typename Index, typename Layout, typename State>
__device__ void fold_taps(const WeightView& weight, const Inversion& inversion, const Layout& layout, State* folded,
                          Index thread, Index threads) {
  const Index channels = weight.channels;
  const Index taps = static_cast<Index>(layout.taps_h) * layout.taps_w;
  const Index inputs = static_cast<Index>(layout.inputs());
  const Index outputs = static_cast<Index>(layout.outputs());
  // The tap is the fastest digit: so it is in the weight's memory.
  for (Index entry = thread; entry < outputs * inputs * taps; entry += threads) {
    const Index pair = entry / taps;
    const Index tap = entry - pair * taps;
    const Index o = pair / inputs;
    const Index c = pair - o * inputs;
    const int a = static_cast<int>(tap / layout.taps_w);
    const int b = static_cast<int>(tap - static_cast<Index>(a) * layout.taps_w);
    folded[layout.place(a, b, o, c)] =
        c < channels && o < channels
            ? static_cast<State>(folded_entry(weight, inversion, static_cast<int>(o), static_cast<int>(c), a, b))
            : State(0);
  }
}

// The fold of a block that needs no launch before it. `scratch`: fold_in_block_bytes of shared memory. The caller puts
// a barrier behind it.
template <int kLoads = kFoldLoads, typename Layout, typename State>
__device__ void fold_in_block(WeightView weight, const Layout& layout, void* scratch, State* folded) {
  const Inversion inversion(scratch, weight.channels);
  if (weight.corner != kIdentity) {
    State* const copy =
        reinterpret_cast<State*>(static_cast<unsigned char*>(scratch) + inversion_bytes(weight.channels));
    const BlockTeam<kLoads> block;
    if (block.threads > kWarp && inverted_by_warp(weight.corner, weight.channels)) {
      if (block.thread < kWarp) {
        invert_corner(weight, inversion, WarpTeam<kLoads>());
      } else {
        stage_weight<kLoads>(weight, copy, block.thread - kWarp, block.threads - kWarp);
      }
      weight = staged_weight(weight, copy);
      __syncthreads();  // the copy is complete, and so is the inverse
    } else {
      stage_weight<kLoads>(weight, copy, block.thread, block.threads);
      weight = staged_weight(weight, copy);
      __syncthreads();  // the copy is complete
      invert_corner(weight, inversion, block);
    }
  }
  fold_taps<int>(weight, inversion, layout, folded, threadIdx.x, blockDim.x);
}

}  // namespace inverse_flow
