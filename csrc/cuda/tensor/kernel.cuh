// The regime "tensor cores": the solve x = A(w)^-1 (y - bias) as matrix products. A block owns whole images of one
// group, and solves one anti-diagonal of all of them after the other, each as one matrix product in 3xTF32 (mma.cuh),
// or TF32 if allowed.
//
//   x_d = -(M^-1 (bias - y_d) + sum over taps t != (0, 0) of W'_t x_{d-t})
//   outputs: channels, in tiles of 16 | columns: the pixels of the diagonal, in tiles of 8 | k: taps x channels, by 8
//
// A job is one tile of outputs and up to four tiles of pixels. `splits` warps share the k-steps of a job; each loads a
// fragment of weights once (16 bytes per lane, from shared memory, or through L2 where they do not fit) and uses it for
// all pixels of the job, with x from shared memory. Taps are in the order of their distance a + b. Only (0, 1) and (1,
// 0) read the diagonal before; a warp adds up y and all farther taps of its first job ahead of the barrier. Shared
// memory: [weights: k-step, output tile, lane, 4] [bias] [taps] [x: image, diagonal, row, channel] [sums: split, pixel,
// channel]. x_d overwrites bias - y_d. Zeros lie where taps reach out of the image. Of images that do not fit, the last
// diagonals alone are kept, in a ring; then y of the next diagonal is loaded, and x of this one stored, at every step.
// Where warps are left over, they add up the sums, load and store, while the others are ahead already.
// Barriers, two a diagonal: x of the diagonal before is complete and its sums have been read; the splits' sums are
// complete and y has been read. Before the sweep: the fold's scratch becomes x; zeros and bias; weights and y.
// Operations: 3 products (TF32: 1) of 1024 multiply-adds a k-step, output tile and pixel tile. Bytes: images once; of
// weights a diagonal, those of the taps that reach into the image; of x, 256 a product tile and output tile.
#pragma once

#include "../common/async_copy.cuh"
#include "../common/mma.cuh"
#include "../common/solve.cuh"
#include "plan.h"

namespace inverse_flow {

// Packs of channels of a diagonal that a thread holds in registers between their load and the end of the step.
constexpr int kStagedPacks = 2;
// The same, while whole images are loaded: loads under way at a time.
constexpr int kLoadedPacks = 4;

// A tap: the distance of its diagonal, and its row.
struct Tap {
  int32_t distance;
  int32_t a;
};

// Of the taps in order of distance, `count` from `first` on; with_center: (0, 0) and then the others.
struct TapRange {
  int first;
  int count;
  bool with_center;

  __device__ int position(int index) const {
    if (!with_center) return first + index;
    return index == 0 ? 0 : first + index - 1;
  }
};

// The pixels that are solved at once: `length` of each image, from `first_row` on.
struct Diagonal {
  int number;
  int slot;
  int first_row;
  int length;
  int columns;  // of all images of the block
};

// What of the block's memory a warp multiplies.
struct TensorOperands {
  const float* shared_weights;
  const float* folded;  // of all taps, in global memory
  const float* x;
  const Tap* taps;
};

struct JobSums {
  // Apart, so that small terms meet small ones first, and so that fewer products wait for each other.
  float big[kJobTiles][4];
  float small[kJobTiles][4];

  __device__ void clear() {
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kJobTiles; ++i) {
      INVERSE_FLOW_UNROLL
      for (int v = 0; v < 4; ++v) big[i][v] = small[i][v] = 0;
    }
  }
};

__device__ inline Diagonal diagonal_at(const Tile& tile, const TensorPlan& plan, int number) {
  Diagonal diagonal;
  diagonal.number = number;
  diagonal.slot = plan.whole_images ? number : number % plan.slots;
  diagonal.first_row = number < tile.columns ? 0 : number - tile.columns + 1;
  diagonal.length = (number < tile.rows ? number + 1 : tile.rows) - diagonal.first_row;
  diagonal.columns = tile.images * diagonal.length;
  return diagonal;
}

// Where a pixel's channels begin within the slot of its diagonal.
__device__ inline int pixel_offset(const TensorPlan& plan, int image, int row) {
  return plan.origin + image * plan.image_stride + row * plan.row_step;
}

__device__ inline int column_offset(const TensorPlan& plan, const Diagonal& diagonal, int column) {
  const int image = plan.images == 1 ? 0 : column / diagonal.length;
  return pixel_offset(plan, image, diagonal.first_row + column - image * diagonal.length);
}

// A pack of channels of a pixel of the diagonal; those of a pixel side by side.
struct PackPlace {
  int column;
  int image;
  int row;
  int pack;

  __device__ PackPlace(const Diagonal& diagonal, int packs, int item)
      : column(item / packs),
        image(column / diagonal.length),
        row(diagonal.first_row + column - image * diagonal.length),
        pack(item - column * packs) {}
};

__device__ inline Pack<float, kLaneWeights> load_fragment(const TensorOperands& from, const TensorPlan& plan,
                                                          int k_step, int output_tile) {
  const int place = (k_step * plan.taps.output_tiles + output_tile) * kFragmentElements +
                    static_cast<int>(threadIdx.x) % kWarp * kLaneWeights;
  using Fragment = Pack<float, kLaneWeights>;
  if (k_step < plan.resident_steps) return *reinterpret_cast<const Fragment*>(from.shared_weights + place);
  return load_readonly(reinterpret_cast<const Fragment*>(from.folded + place));
}

// Adds this split's share of the k-steps of the taps to the sums of the first kTiles tiles of a job.
template <bool kTf32, int kTiles>
__device__ void accumulate(JobSums& sums, const TensorOperands& from, const TensorPlan& plan, const Diagonal& diagonal,
                           const TapRange& taps, int split, int output_tile, int first_column) {
  const int steps = taps.count * plan.taps.k_steps;
  const int end = steps * (split + 1) / plan.splits;
  int index = steps * split / plan.splits;
  if (index == end) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // Past the last column: once more the last, whose sum nobody reads.
  int columns[kTiles];
  INVERSE_FLOW_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    const int column = first_column + i * kMmaPixels + lane / 4;
    columns[i] = column_offset(plan, diagonal, column < diagonal.columns ? column : diagonal.columns - 1) + lane % 4;
  }
  int tap_index = index / plan.taps.k_steps;
  int chunk = index - tap_index * plan.taps.k_steps;
  int first_step = 0;
  const float* source = nullptr;
  const auto enter_tap = [&] {
    const int position = taps.position(tap_index);
    const Tap tap = from.taps[position];
    int slot = diagonal.slot - tap.distance;
    if (slot < 0) slot += plan.slots;
    source = from.x + slot * plan.slot_stride - tap.a * plan.row_step;
    first_step = position * plan.taps.k_steps;
  };
  enter_tap();
  Pack<float, kLaneWeights> loaded;
  float loaded_x[kTiles][2];
  const auto load = [&] {
    loaded = load_fragment(from, plan, first_step + chunk, output_tile);
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const float* const pixel = source + columns[i] + chunk * kMmaInputs;
      loaded_x[i][0] = pixel[0];
      loaded_x[i][1] = pixel[4];
    }
  };
  load();
  INVERSE_FLOW_UNROLL_BY(1)
  while (index < end) {
    const Split<kLaneWeights> weights(loaded.value);
    Split<2> x[kTiles];
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kTiles; ++i) x[i] = Split<2>(loaded_x[i]);
    // The next operands are on their way while these are multiplied.
    if (++index < end) {
      if (++chunk == plan.taps.k_steps) {
        chunk = 0;
        ++tap_index;
        enter_tap();
      }
      load();
    }
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      // Tensor cores truncate: a long sum is rounded to nearest here instead.
      float product[4] = {};
      multiply_tf32(product, weights.big, x[i].big);
      INVERSE_FLOW_UNROLL
      for (int v = 0; v < 4; ++v) sums.big[i][v] += product[v];
    }
    if constexpr (!kTf32) {
      INVERSE_FLOW_UNROLL
      for (int i = 0; i < kTiles; ++i) multiply_tf32(sums.small[i], weights.small, x[i].big);
      INVERSE_FLOW_UNROLL
      for (int i = 0; i < kTiles; ++i) multiply_tf32(sums.small[i], weights.big, x[i].small);
    }
  }
}

// Whole warps take one branch: tiles without a pixel are left out.
template <bool kTf32>
__device__ inline void accumulate_tiles(JobSums& sums, const TensorOperands& from, const TensorPlan& plan,
                                        const Diagonal& diagonal, const TapRange& taps, int split, int job) {
  const int output_tile = job % plan.taps.output_tiles;
  const int first_column = job / plan.taps.output_tiles * kJobTiles * kMmaPixels;
  const int columns = diagonal.columns - first_column;
  if (columns <= kMmaPixels) {
    accumulate<kTf32, 1>(sums, from, plan, diagonal, taps, split, output_tile, first_column);
  } else if (columns <= 2 * kMmaPixels) {
    accumulate<kTf32, 2>(sums, from, plan, diagonal, taps, split, output_tile, first_column);
  } else {
    accumulate<kTf32, kJobTiles>(sums, from, plan, diagonal, taps, split, output_tile, first_column);
  }
}

// Leaves a warp's sums where the block adds them up.
__device__ inline void leave_sums(const JobSums& sums, const TensorPlan& plan, const Diagonal& diagonal, int split,
                                  int job, float* shared_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_column = job / plan.taps.output_tiles * kJobTiles * kMmaPixels;
  float* const at = shared_sums + (split * plan.sum_columns + first_column + lane % 4 * 2) * plan.sum_pitch +
                    job % plan.taps.output_tiles * kMmaOutputs + lane / 4;
  INVERSE_FLOW_UNROLL
  for (int i = 0; i < kJobTiles; ++i) {
    if (first_column + i * kMmaPixels < diagonal.columns) {
      INVERSE_FLOW_UNROLL
      for (int v = 0; v < 4; ++v) {
        at[(i * kMmaPixels + v % 2) * plan.sum_pitch + v / 2 * 8] = sums.big[i][v] + sums.small[i][v];
      }
    }
  }
}

// The parts of the block's shared memory.
struct TensorMemory {
  float* weights;
  float* bias;
  Tap* taps;
  float* x;
  float* sums;

  __device__ explicit TensorMemory(const TensorPlan& plan) {
    unsigned char* const shared = dynamic_shared_memory();
    weights = reinterpret_cast<float*>(shared);
    bias = reinterpret_cast<float*>(shared + plan.bias_offset);
    taps = reinterpret_cast<Tap*>(shared + plan.taps_offset);
    x = reinterpret_cast<float*>(shared + plan.x_offset);
    sums = reinterpret_cast<float*>(shared + plan.sums_offset);
  }
};

// A block's pixels: in global memory y, in shared memory first bias - y, then x.
template <typename Element>
struct TensorPixels {
  const SolveArguments<Element, TensorPlan>& args;
  Tile tile;
  int packs;  // of channels
  ImageView<const Element> input;
  const float* bias;
  float* x;

  __device__ TensorPixels(const SolveArguments<Element, TensorPlan>& arguments, const BlockGroup& group,
                          const TensorMemory& memory)
      : args(arguments),
        tile(whole_images(arguments)),
        packs((static_cast<int>(arguments.shape.channels) + 3) / 4),
        input(image_view(arguments.input, arguments.input_strides, arguments, group)),
        bias(memory.bias),
        x(memory.x) {}

  // Of the diagonal in a slot.
  __device__ Pack<float, 4>& at(int slot, int image, int row, int pack) const {
    const TensorPlan& plan = args.plan;
    return *reinterpret_cast<Pack<float, 4>*>(x + slot * plan.slot_stride + pixel_offset(plan, image, row) + pack * 4);
  }
  __device__ Pack<float, 4>& at(const Diagonal& diagonal, const PackPlace& place) const {
    return at(diagonal.slot, place.image, place.row, place.pack);
  }

  // bias - y, zeros beyond the last channel.
  __device__ Pack<float, 4> load(int image, int row, int column, int pack) const {
    const Element* const pixel = input.pixel(tile.first_image + image, row, column);
    Pack<float, 4> packed;
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < 4; ++u) {
      const int c = pack * 4 + u;
      packed.value[u] = c < args.shape.channels ? bias[c] - to_state(pixel[c * args.input_strides.channel]) : 0.0f;
    }
    return packed;
  }
  __device__ Pack<float, 4> load(const Diagonal& diagonal, const PackPlace& place) const {
    return load(place.image, place.row, diagonal.number - place.row, place.pack);
  }
};

// Bias, taps, and the weights that stay in shared memory: folded here, or on their way. Returns when the fold's scratch
// is free for x.
template <typename Element>
__device__ void fold(const SolveArguments<Element, TensorPlan>& args, const BlockGroup& group, const float* folded,
                     const TensorMemory& memory) {
  const TensorPlan& plan = args.plan;
  const int threads = blockDim.x;
  load_bias(args, group, static_cast<int>(args.shape.channels), memory.bias);
  const int taps_h = plan.taps.taps_h;
  const int taps_w = plan.taps.taps_w;
  for (int i = threadIdx.x; i < taps_h * taps_w; i += threads) {
    const int a = i / taps_w;
    const int b = i - a * taps_w;
    memory.taps[tap_position(taps_h, taps_w, a, b)] = {a + b, a};
  }
  if (folded == nullptr) {
    fold_in_block(group_weight(args, group), plan.taps, memory.x, memory.weights);
    __syncthreads();  // the fold's scratch is free for x
  } else {
    const int count = plan.resident_steps * plan.taps.output_tiles * kFragmentElements;
    for (int i = static_cast<int>(threadIdx.x) * 4; i < count; i += threads * 4) {
      copy_to_shared<16>(memory.weights + i, folded + i);
    }
  }
}

// Zeros, and on them y of whole images or of the first diagonal.
template <typename Element>
__device__ void prepare(const TensorPixels<Element>& pixels) {
  const TensorPlan& plan = pixels.args.plan;
  const Tile& tile = pixels.tile;
  const int packs = pixels.packs;
  const int thread = threadIdx.x;
  const int threads = blockDim.x;
  for (int i = thread; i < plan.images * plan.image_stride / 4; i += threads) {
    reinterpret_cast<Pack<float, 4>*>(pixels.x)[i] = {};
  }
  __syncthreads();  // zeros, bias and taps are complete
  if (plan.whole_images) {
    const int items = tile.images * packs * tile.rows * tile.columns;
    for (int first = thread; first < items; first += kLoadedPacks * threads) {
      Pack<float, 4> loaded[kLoadedPacks];
      INVERSE_FLOW_UNROLL
      for (int i = 0; i < kLoadedPacks; ++i) {
        if (first + i * threads < items) {
          const TilePack at(tile, packs, pixels.args.input_strides, first + i * threads);
          loaded[i] = pixels.load(at.image, at.row, at.column, at.pack);
        }
      }
      INVERSE_FLOW_UNROLL
      for (int i = 0; i < kLoadedPacks; ++i) {
        if (first + i * threads < items) {
          const TilePack at(tile, packs, pixels.args.input_strides, first + i * threads);
          pixels.at(at.row + at.column, at.image, at.row, at.pack) = loaded[i];
        }
      }
    }
  } else {
    const Diagonal first = diagonal_at(tile, plan, 0);
    for (int item = thread; item < first.columns * packs; item += threads) {
      const PackPlace at(first, packs, item);
      pixels.at(first, at) = pixels.load(first, at);
    }
  }
}

// The threads that load, add up and store while the others multiply: thread `index` of `count`; below 0, none of them.
struct Finishers {
  int index;
  int count;

  __device__ explicit Finishers(const TensorPlan& plan) {
    const int threads = blockDim.x;
    count = plan.finish_warps > 0 ? plan.finish_warps * kWarp : threads;
    index = static_cast<int>(threadIdx.x) - (threads - count);
  }
};

// y of a ring's next diagonal: on its way while this one is solved, then put in its slot.
template <typename Element>
struct NextDiagonal {
  const TensorPixels<Element>& pixels;
  Finishers finishers;
  bool is_wanted;  // of this thread
  Diagonal diagonal;
  int items;
  Pack<float, 4> staged[kStagedPacks];

  __device__ NextDiagonal(const TensorPixels<Element>& block_pixels, const Finishers& block_finishers, int number,
                          bool streams)
      : pixels(block_pixels),
        finishers(block_finishers),
        is_wanted(streams && finishers.index >= 0),
        diagonal(diagonal_at(pixels.tile, pixels.args.plan, number)),
        items(diagonal.columns * pixels.packs) {
    if (!is_wanted) return;
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kStagedPacks; ++i) {
      const int item = finishers.index + i * finishers.count;
      if (item < items) staged[i] = pixels.load(diagonal, PackPlace(diagonal, pixels.packs, item));
    }
  }

  __device__ void keep() const {
    if (!is_wanted) return;
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kStagedPacks; ++i) {
      const int item = finishers.index + i * finishers.count;
      if (item < items) pixels.at(diagonal, PackPlace(diagonal, pixels.packs, item)) = staged[i];
    }
    for (int item = finishers.index + kStagedPacks * finishers.count; item < items; item += finishers.count) {
      const PackPlace at(diagonal, pixels.packs, item);
      pixels.at(diagonal, at) = pixels.load(diagonal, at);
    }
  }
};

// x of a diagonal from the splits' sums; of a ring it is stored at once.
template <typename Element, typename Store>
__device__ void finish(const TensorPixels<Element>& pixels, const Diagonal& diagonal, const Finishers& finishers,
                       const float* sums, const Store& store) {
  const TensorPlan& plan = pixels.args.plan;
  const int packs = pixels.packs;
  for (int item = finishers.index; finishers.index >= 0 && item < diagonal.columns * packs; item += finishers.count) {
    const PackPlace at(diagonal, packs, item);
    Pack<float, 4> total{};
    for (int s = 0; s < plan.splits; ++s) {
      const auto part = *reinterpret_cast<const Pack<float, 4>*>(
          sums + (s * plan.sum_columns + at.column) * plan.sum_pitch + at.pack * 4);
      INVERSE_FLOW_UNROLL
      for (int u = 0; u < 4; ++u) total.value[u] -= part.value[u];
    }
    pixels.at(diagonal, at) = total;
    if (!plan.whole_images) {
      store(pixels.tile.first_image + at.image, at.row, diagonal.number - at.row, at.pack, total);
    }
  }
}

template <bool kTf32, typename Element, typename Store>
__device__ void sweep(const TensorPixels<Element>& pixels, const TensorOperands& operands, float* shared_sums,
                      const Store& store) {
  const TensorPlan& plan = pixels.args.plan;
  const int taps_h = plan.taps.taps_h;
  const int taps_w = plan.taps.taps_w;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int split = warp / plan.job_warps;
  const bool multiplies = split < plan.splits;
  const int first_job = warp - split * plan.job_warps;
  const Finishers finishers(plan);
  const int near_end = static_cast<int>(taps_nearer(taps_h, taps_w, 2));
  const int diagonals = pixels.tile.rows + pixels.tile.columns - 1;
  for (int number = 0; number < diagonals; ++number) {
    const Diagonal diagonal = diagonal_at(pixels.tile, plan, number);
    const NextDiagonal<Element> next(pixels, finishers, number + 1, !plan.whole_images && number + 1 < diagonals);
    // Taps that reach into the image at all.
    const int reaching = static_cast<int>(taps_nearer(taps_h, taps_w, number + 1));
    const TapRange ahead{near_end, 1 + (reaching > near_end ? reaching - near_end : 0), true};
    const int near = (reaching < near_end ? reaching : near_end) - 1;
    const int jobs =
        plan.taps.output_tiles * ((diagonal.columns + kJobTiles * kMmaPixels - 1) / (kJobTiles * kMmaPixels));
    JobSums sums;
    sums.clear();
    if (multiplies && first_job < jobs) {
      accumulate_tiles<kTf32>(sums, operands, plan, diagonal, ahead, split, first_job);
    }
    __syncthreads();  // x of the diagonal before is there, and the sums may be overwritten
    for (int job = first_job; multiplies && job < jobs; job += plan.job_warps) {
      if (job != first_job) sums.clear();
      const bool is_begun = job == first_job;
      const TapRange rest{is_begun ? 1 : 0, is_begun ? near : reaching, false};
      accumulate_tiles<kTf32>(sums, operands, plan, diagonal, rest, split, job);
      leave_sums(sums, plan, diagonal, split, job, shared_sums);
    }
    next.keep();
    __syncthreads();  // the sums are complete, y has been read, and y of the next diagonal is there
    finish(pixels, diagonal, finishers, shared_sums, store);
  }
}

// Grid: (blocks of images, groups).
template <typename Element, bool kTf32>
__global__ void __launch_bounds__(kTensorThreads, 1)
    solve_tensor_kernel(const __grid_constant__ SolveArguments<Element, TensorPlan> args) {
  const TensorPlan& plan = args.plan;
  const BlockGroup group = block_group(args);
  const TensorMemory memory(plan);
  const float* const folded = args.folded == nullptr ? nullptr : args.folded + group.number * plan.taps.elements();
  fold(args, group, folded, memory);
  const TensorPixels<Element> pixels(args, group, memory);
  prepare(pixels);
  wait_for_copies();
  __syncthreads();  // weights and y are complete

  const PixelStore<SolveArguments<Element, TensorPlan>> store(args, group);
  sweep<kTf32>(pixels, {memory.weights, folded, memory.x, memory.taps}, memory.sums, store);
  if (!plan.whole_images) return;
  __syncthreads();  // x is complete
  for_each_pack(pixels.tile, pixels.packs, args.output_strides, [&](int image, int row, int column, int pack) {
    store(pixels.tile.first_image + image, row, column, pack, pixels.at(row + column, image, row, pack));
  });
}

}  // namespace inverse_flow
