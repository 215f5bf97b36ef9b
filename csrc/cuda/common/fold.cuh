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
// that folds for itself: its barriers are cheaper.
//
// Terms: a thread makes the entries of one channel pair for a few taps at a time. A term is then a load and a
// conversion of a weight, which stand beside those of the other taps, and a multiply-add; the entry of M^-1 serves all
// of them.
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

  __device__ int64_t taps() const { return static_cast<int64_t>(kernel_h) * kernel_w; }
  // Where the tap that reaches a rows and b columns away stands among those of a channel pair.
  __device__ int tap(int a, int b) const {
    return tap_row(kernel_h, order, a) * kernel_w + tap_column(kernel_w, order, b);
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

// Threads that work together and wait for each other: the block, or its first warp.
struct Team {
  int thread;
  int threads;
  bool is_warp;

  __device__ void sync() const {
    if (is_warp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};
__device__ inline Team block_team() { return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), false}; }
__device__ inline Team first_warp() { return {static_cast<int>(threadIdx.x), kWarp, true}; }
// Eight loads, where the kernel has registers to spare.
constexpr int kFoldLoads = 8;

// Calls store(i, load(i)) for every thread's share of 0, 1, ... count - 1. A loop that the compiler unrolls would have
// the loads of its remainder wait for each other.
template <int kLoads, typename Load, typename Store>
__device__ void load_together(int thread, int threads, int count, Load load, Store store) {
  INVERSE_FLOW_UNROLL_BY(1)
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

// Copies a group's weights into shared memory, a few loads of a thread at a time: reading each weight where it is
// needed would wait for each. The caller puts a barrier behind it.
template <int kLoads, typename State>
__device__ void stage_weight(const WeightView& weight, State* memory) {
  const int elements = weight.channels * weight.channels * static_cast<int>(weight.taps());
  const int threads = blockDim.x;
  INVERSE_FLOW_UNROLL_BY(1)
  for (int first = threadIdx.x; first < elements; first += kLoads * threads) {
    State values[kLoads];
    with_elements<State>(weight.data, weight.type, [&](const auto* source) {
      INVERSE_FLOW_UNROLL
      for (int u = 0; u < kLoads; ++u) {
        const int i = first + u * threads;
        if (i < elements) values[u] = to_state(source[weight.group_offset + i]);
      }
    });
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      if (first + u * threads < elements) memory[first + u * threads] = values[u];
    }
  }
}

// Memory of an inversion, and its result. A pixel of all channels fits shared memory, so channels^2 fits an int.
struct Inversion {
  double* matrix;
  int pitch;  // corner_pitch
  double* pivot_row;
  double* pivot_column;
  int32_t* pivot_of_step;
  int32_t* step_of_pivot;

  // Of inversion_bytes.
  __device__ Inversion(void* memory, int channels)
      : matrix(static_cast<double*>(memory)),
        pitch(static_cast<int>(corner_pitch(channels))),
        pivot_row(matrix + channels * pitch),
        pivot_column(pivot_row + channels),
        pivot_of_step(reinterpret_cast<int32_t*>(pivot_column + channels)),
        step_of_pivot(pivot_of_step + channels) {}

  // Entry (o, i) of M^-1, or of its transpose, is matrix[row[o]][column[i]], or matrix[row[i]][column[o]]: a row of it
  // for all i.
  struct Row {
    const double* first;
    const int32_t* places;
    int pitch;

    __device__ double operator[](int i) const { return first[places[i] * pitch]; }
  };
  __device__ Row row(const WeightView& weight, int o) const {
    if (weight.transposed) return {matrix + step_of_pivot[o], pivot_of_step, pitch};
    return {matrix + pivot_of_step[o] * pitch, step_of_pivot, 1};
  }
};

// Copies the corner into the matrix, as its inversion begins: of a unit triangular one blocks of one row are their own
// inverses, those of two rows need a sign, and nothing is permuted; of a general one no row is used. `source`: the
// group's first weight.
template <typename Index, int kLoads, typename Element>
__device__ void load_corner(const WeightView& weight, const Element* source, const Inversion& inversion,
                            const Team& team) {
  const int channels = weight.channels;
  const bool is_general = weight.corner == kGeneral;
  const Index taps = static_cast<Index>(weight.taps());
  const Element* const corner = source + weight.tap(0, 0);
  load_together<kLoads>(
      team.thread, team.threads, channels * channels, [&](int i) { return corner[i * taps]; },
      [&](int i, auto loaded) {
        const int row = i / channels;
        const int column = i - row * channels;
        const auto value = static_cast<double>(to_state(loaded));
        double entry = value;
        if (!is_general && column == row) entry = 1;
        if (!is_general && column == row - 1 && row % 2 == 1) entry = -value;
        inversion.matrix[row * inversion.pitch + column] = entry;
      });
  for (int i = team.thread; i < channels; i += team.threads) {
    inversion.step_of_pivot[i] = is_general ? -1 : i;
    if (!is_general) inversion.pivot_of_step[i] = i;
  }
}

// The unit lower triangle of the matrix, as load_corner leaves it, becomes its inverse; what was above it is lost.
__device__ inline void invert_unit_triangular(const Inversion& inversion, int channels, const Team& team) {
  double* const matrix = inversion.matrix;
  const int pitch = inversion.pitch;
  INVERSE_FLOW_UNROLL_BY(1)
  for (int bits = 1; (1 << bits) < channels; ++bits) {
    const int size = 1 << bits;
    // Rows of the later blocks of all pairs: the last block may be short, or missing.
    const int rest = (channels & (2 * size - 1)) - size;
    const int rows = (channels >> (bits + 1)) * size + (rest > 0 ? rest : 0);
    // The entry of an item: its row and column, and where the later block of its pair begins.
    struct Entry {
      int row;
      int column;
      int begin;
    };
    const auto entry_of = [&](int item) -> Entry {
      const int count = item >> bits;
      const int block = (count >> bits) * 2 * size;
      return {block + size + (count & (size - 1)), block + (item & (size - 1)), block + size};
    };
    INVERSE_FLOW_UNROLL_BY(1)
    for (int item = team.thread; item < rows * size; item += team.threads) {
      const Entry at = entry_of(item);
      double sum = 0;
      INVERSE_FLOW_UNROLL_BY(2)
      for (int k = at.column; k < at.begin; ++k) sum += matrix[at.row * pitch + k] * matrix[k * pitch + at.column];
      matrix[at.column * pitch + at.row] = sum;
    }
    team.sync();  // L21 X11 is there
    INVERSE_FLOW_UNROLL_BY(1)
    for (int item = team.thread; item < rows * size; item += team.threads) {
      const Entry at = entry_of(item);
      double sum = 0;
      INVERSE_FLOW_UNROLL_BY(2)
      for (int k = at.begin; k <= at.row; ++k) sum += matrix[at.row * pitch + k] * matrix[at.column * pitch + k];
      matrix[at.row * pitch + at.column] = -sum;
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
  INVERSE_FLOW_UNROLL_BY(1)
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

__device__ inline void invert_general(const Inversion& inversion, int channels, const Team& team) {
  double* const matrix = inversion.matrix;
  const int pitch = inversion.pitch;
  INVERSE_FLOW_UNROLL_BY(1)
  for (int step = 0; step < channels; ++step) {
    const int pivot = find_pivot(inversion, channels, step);
    const double pivot_value = matrix[pivot * pitch + step];
    const double reciprocal = pivot_value == 0 ? not_a_number() : 1 / pivot_value;
    INVERSE_FLOW_UNROLL_BY(1)
    for (int i = team.thread; i < channels; i += team.threads) {
      inversion.pivot_row[i] = i == step ? reciprocal : matrix[pivot * pitch + i] * reciprocal;
      inversion.pivot_column[i] = matrix[i * pitch + step];
    }
    team.sync();  // the pivot row and column are copied, and every warp has its pivot
    if (team.thread == 0) {
      inversion.pivot_of_step[step] = pivot;
      inversion.step_of_pivot[pivot] = step;
    }
    INVERSE_FLOW_UNROLL_BY(1)
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

// Inverts the corner that load_corner has left; the whole team takes part, and may read the result when this returns.
__device__ inline void invert_corner(const WeightView& weight, const Inversion& inversion, const Team& team) {
  team.sync();  // the corner is there
  if (weight.corner == kUnitTriangular) {
    invert_unit_triangular(inversion, weight.channels, team);
  } else {
    invert_general(inversion, weight.channels, team);
  }
}

// Taps of a channel pair whose entries a thread makes at a time: (0, 0), which needs no terms, is left out of 2 x 2, 3
// x 3 and 5 x 5 taps, and the others are 3, 8 and 24. Where they are only copied, as many as loads may be under way.
constexpr int kFoldTaps = 4;
constexpr int kCopiedTaps = 8;

// Folds all taps of a group into `folded`, channel pairs with kTaps taps each shared out over `threads` threads.
// `source`: the group's first weight. Index: an integer type that holds the number of entries; division is slow on 64
// bits. An identity corner has no inversion: its terms are the weights.
template <typename Index, int kTaps, typename Element, typename Layout, typename State>
__device__ void fold_taps(const WeightView& weight, const Element* source, const Inversion& inversion,
                          const Layout& layout, State* folded, Index thread, Index threads) {
  const int channels = weight.channels;
  const Index taps = static_cast<Index>(weight.taps());
  const Index inputs = static_cast<Index>(layout.inputs());
  const Index pairs = static_cast<Index>(layout.outputs()) * inputs;
  const Index others = static_cast<Index>(layout.taps_h) * layout.taps_w - 1;
  const Index parts = others > kTaps ? (others + kTaps - 1) / kTaps : 1;
  // From W[i][c], or of a transposed solve W[c][i], to the next i or c.
  const Index next_i = weight.transposed ? taps : channels * taps;
  const Index next_c = weight.transposed ? channels * taps : taps;
  const bool is_identity = weight.corner == kIdentity;
  const bool is_triangular = weight.corner == kUnitTriangular;
  INVERSE_FLOW_UNROLL_BY(1)
  for (Index item = thread; item < pairs * parts; item += threads) {
    const Index part = item / pairs;
    const Index pair = item - part * pairs;
    const int o = static_cast<int>(pair / inputs);
    const int c = static_cast<int>(pair - o * inputs);
    const bool is_inside = o < channels && c < channels;
    // The inverse of a triangular corner is triangular, that of the identity diagonal.
    const int begin = is_identity || (is_triangular && weight.transposed) ? o : 0;
    const int end = !is_inside ? begin : is_identity || (is_triangular && !weight.transposed) ? o + 1 : channels;
    int from[kTaps];
    Index to[kTaps];
    const int first = static_cast<int>(1 + part * kTaps);
    int a = first / layout.taps_w;
    int b = first - a * layout.taps_w;
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < kTaps; ++u) {
      const bool is_tap = first + u <= others;
      from[u] = is_tap ? weight.tap(a, b) : 0;
      to[u] = is_tap ? layout.template tap_place<Index>(a, b) : -1;
      if (++b == layout.taps_w) {
        b = 0;
        ++a;
      }
    }
    Inversion::Row inverse{};  // of an identity corner there is none
    if (!is_identity) inverse = inversion.row(weight, is_inside ? o : 0);
    const Element* place = source + (begin * next_i + c * next_c);
    double sums[kTaps] = {};
    INVERSE_FLOW_UNROLL_BY(2)
    for (int i = begin; i < end; ++i) {
      const double factor = is_identity ? 1 : inverse[i];
      INVERSE_FLOW_UNROLL
      for (int u = 0; u < kTaps; ++u) sums[u] += factor * static_cast<double>(to_state(place[from[u]]));
      place += next_i;
    }
    State* const of_pair = folded + layout.template pair_place<Index>(o, c);
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < kTaps; ++u) {
      if (to[u] >= 0) of_pair[to[u]] = static_cast<State>(sums[u]);
    }
    if (part == 0) {
      const bool is_filled = begin <= c && c < end;
      of_pair[layout.template tap_place<Index>(0, 0)] = static_cast<State>(!is_filled    ? 0
                                                                           : is_identity ? 1
                                                                                         : inverse[c]);
    }
  }
}

// The fold of a block that needs no launch before it. `scratch`: fold_in_block_bytes of shared memory. The caller puts
// a barrier behind it.
template <int kLoads = kFoldLoads, typename Layout, typename State>
__device__ void fold_in_block(const WeightView& weight, const Layout& layout, void* scratch, State* folded) {
  const bool is_identity = weight.corner == kIdentity;
  const int thread = threadIdx.x;
  const int threads = blockDim.x;
  const Inversion inversion(scratch, weight.channels);
  if (is_identity && weight.channels > kMaxChannelsFoldedInBlock) {
    with_elements<State>(weight.data, weight.type, [&](const auto* source) {
      fold_taps<int, kCopiedTaps>(weight, source + weight.group_offset, inversion, layout, folded, thread, threads);
    });
    return;
  }
  State* const copy = reinterpret_cast<State*>(static_cast<unsigned char*>(scratch) +
                                               (is_identity ? 0 : inversion_bytes(weight.channels)));
  stage_weight<kLoads>(weight, copy);
  __syncthreads();  // the copy is complete
  if (!is_identity) {
    const Team team = threads > kWarp && inverted_by_warp(weight.corner, weight.channels) ? first_warp() : block_team();
    if (thread < team.threads) {
      load_corner<int, 1>(weight, copy, inversion, team);
      invert_corner(weight, inversion, team);
    }
    if (team.is_warp) __syncthreads();  // the inverse is complete
  }
  fold_taps<int, kFoldTaps>(weight, copy, inversion, layout, folded, thread, threads);
}

}  // namespace inverse_flow
