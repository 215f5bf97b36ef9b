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
// memory: [weights: k-step, output tile, lane, 4] [bias] [where x of a k-step is] [x: image, diagonal, row, channel]
// [sums: split, pixel, channel]. x_d overwrites bias - y_d. Zeros lie where taps reach out of the image. Of images that
// do not fit, the last diagonals alone are kept, in a ring; then y of the next diagonal is loaded, and x of this one
// stored, at every step. Where warps are left over, they add up the sums, load and store, while the others are ahead
// already. Barriers, two a diagonal: x of the diagonal before is complete and its sums have been read; the splits' sums
// are complete and y has been read. Before the sweep: the fold's scratch becomes x; zeros and bias; weights and y.
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

// Of a k-step: the distance of its tap's diagonal, and where x stands, counted from the pixel of the tap (0, 0) and but
// for the wrap of a ring.
struct alignas(8) StepSource {
  int32_t distance;
  int32_t offset;
};

// Taps that follow each other in the order of tap_position.
struct TapRange {
  int first;
  int count;
};

// The pixels that are solved at once: `length` of each image, from `first_row` on.
struct Diagonal {
  int number;
  int slot;
  int first_row;
  int length;
  int columns;  // of all images of the block

  // Without a division: there are few images, and mostly one.
  __device__ int image_of(int column) const {
    int image = 0;
    for (int rest = column; rest >= length; rest -= length) ++image;
    return image;
  }
};

// A tile of outputs, and the first of a job's columns.
struct JobPlace {
  int output_tile;
  int first_column;

  __device__ JobPlace(const TensorPlan& plan, int job) {
    const int columns = plan.by_output_tiles.quotient(job);
    output_tile = job - columns * plan.taps.output_tiles;
    first_column = columns * kJobTiles * kMmaPixels;
  }
};

// What of the block's memory a warp multiplies.
struct TensorOperands {
  const float* shared_weights;
  const float* folded;  // of all taps, in global memory
  const float* x;
  const StepSource* sources;
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
  diagonal.slot = plan.whole_images ? number : number - plan.by_slots.quotient(number) * plan.slots;
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
  const int image = diagonal.image_of(column);
  return pixel_offset(plan, image, diagonal.first_row + column - image * diagonal.length);
}

// A pack of channels of a pixel of the diagonal; those of a pixel side by side.
struct PackPlace {
  int column;
  int image;
  int row;
  int pack;

  __device__ PackPlace(const TensorPlan& plan, const Diagonal& diagonal, int packs, int item)
      : column(plan.by_packs.quotient(item)),
        image(diagonal.image_of(column)),
        row(diagonal.first_row + column - image * diagonal.length),
        pack(item - column * packs) {}
};

// Adds this split's share of the k-steps of the taps to the sums of the first kTiles tiles of a job.
template <bool kTf32, int kTiles>
__device__ void accumulate(JobSums& sums, const TensorOperands& from, const TensorPlan& plan, const Diagonal& diagonal,
                           const TapRange& taps, int split, int output_tile, int first_column) {
  const int first_step = taps.first * plan.taps.k_steps;
  const int steps = taps.count * plan.taps.k_steps;
  int k_step = first_step + plan.by_splits.quotient(steps * split);
  const int last = first_step + plan.by_splits.quotient(steps * (split + 1));
  if (k_step == last) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // Past the last column: once more the last, whose sum nobody reads.
  int columns[kTiles];
  INVERSE_FLOW_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    const int column = first_column + i * kMmaPixels + lane / 4;
    columns[i] = column_offset(plan, diagonal, column < diagonal.columns ? column : diagonal.columns - 1) + lane % 4 +
                 diagonal.slot * plan.slot_stride;
  }
  const int ring = plan.slots * plan.slot_stride;
  // What is loaded, in two parts.
  struct Operands {
    Split<kTf32, kLaneWeights> weights;
    Split<kTf32, 2> x[kTiles];
  };
  const auto multiply = [&](const Operands& operands) {
    const auto& [weights, x] = operands;
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
  };
  // First the k-steps whose weights are in shared memory, then those in global memory.
  while (k_step < last) {
    const bool is_resident = k_step < plan.resident_steps;
    const int end = is_resident && plan.resident_steps < last ? plan.resident_steps : last;
    const float* weights_at = (is_resident ? from.shared_weights : from.folded) +
                              (k_step * plan.taps.output_tiles + output_tile) * kFragmentElements + lane * kLaneWeights;
    const StepSource* next = from.sources + k_step;
    StepSource source = *next;
    Pack<float, kLaneWeights> loaded;
    float loaded_x[kTiles][2];
    const auto load = [&] {
      loaded = *reinterpret_cast<const Pack<float, kLaneWeights>*>(weights_at);
      weights_at += plan.taps.output_tiles * kFragmentElements;
      const float* const x = from.x + source.offset + (source.distance > diagonal.slot ? ring : 0);
      INVERSE_FLOW_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        loaded_x[i][0] = x[columns[i]];
        loaded_x[i][1] = x[columns[i] + 4];
      }
      source = *++next;
    };
    const auto split_loaded = [&] {
      Operands operands;
      operands.weights = Split<kTf32, kLaneWeights>(loaded.value);
      INVERSE_FLOW_UNROLL
      for (int i = 0; i < kTiles; ++i) operands.x[i] = Split<kTf32, 2>(loaded_x[i]);
      return operands;
    };
    load();
    // Twice, where registers hold what is loaded beside what is multiplied: nothing has to be moved then.
    [[maybe_unused]] constexpr int kUnrolled = kTiles < kJobTiles ? 2 : 1;
    INVERSE_FLOW_UNROLL_BY(kUnrolled)
    while (++k_step < end) {
      const Operands operands = split_loaded();
      load();  // on their way while these are multiplied
      multiply(operands);
    }
    multiply(split_loaded());
  }
}

// Whole warps take one branch: tiles without a pixel are left out.
template <bool kTf32>
__device__ inline void accumulate_tiles(JobSums& sums, const TensorOperands& from, const TensorPlan& plan,
                                        const Diagonal& diagonal, const TapRange& taps, int split, int job) {
  const JobPlace at(plan, job);
  const int columns = diagonal.columns - at.first_column;
  if (columns <= kMmaPixels) {
    accumulate<kTf32, 1>(sums, from, plan, diagonal, taps, split, at.output_tile, at.first_column);
  } else if (columns <= 2 * kMmaPixels) {
    accumulate<kTf32, 2>(sums, from, plan, diagonal, taps, split, at.output_tile, at.first_column);
  } else {
    accumulate<kTf32, kJobTiles>(sums, from, plan, diagonal, taps, split, at.output_tile, at.first_column);
  }
}

// Leaves a warp's sums where the block adds them up.
__device__ inline void leave_sums(const JobSums& sums, const TensorPlan& plan, const Diagonal& diagonal, int split,
                                  int job, float* shared_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const JobPlace place(plan, job);
  float* const at = shared_sums + (split * plan.sum_columns + place.first_column + lane % 4 * 2) * plan.sum_pitch +
                    place.output_tile * kMmaOutputs + lane / 4;
  INVERSE_FLOW_UNROLL
  for (int i = 0; i < kJobTiles; ++i) {
    if (place.first_column + i * kMmaPixels < diagonal.columns) {
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
  StepSource* sources;
  float* x;
  float* sums;

  __device__ explicit TensorMemory(const TensorPlan& plan) {
    unsigned char* const shared = dynamic_shared_memory();
    weights = reinterpret_cast<float*>(shared);
    bias = reinterpret_cast<float*>(shared + plan.bias_offset);
    sources = reinterpret_cast<StepSource*>(shared + plan.sources_offset);
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

// Bias, where the k-steps find x, and the weights that stay in shared memory: folded here, or on their way. Returns
// when the fold's scratch is free for x.
template <typename Element>
__device__ void fold(const SolveArguments<Element, TensorPlan>& args, const BlockGroup& group, const float* folded,
                     const TensorMemory& memory) {
  const TensorPlan& plan = args.plan;
  const int threads = blockDim.x;
  load_bias(args, group, static_cast<int>(args.shape.channels), memory.bias);
  const int taps_h = plan.taps.taps_h;
  const int taps_w = plan.taps.taps_w;
  const int k_steps = plan.taps.k_steps;
  for (int i = threadIdx.x; i < taps_h * taps_w * k_steps; i += threads) {
    const int tap = plan.by_k_steps.quotient(i);
    const int chunk = i - tap * k_steps;
    const int a = tap / taps_w;
    const int b = tap - a * taps_w;
    memory.sources[tap_position<int>(taps_h, taps_w, a, b) * k_steps + chunk] = {
        a + b, chunk * kMmaInputs - (a + b) * plan.slot_stride - a * plan.row_step};
  }
  if (threadIdx.x == 0) memory.sources[plan.taps.all_steps()] = {};  // is read ahead, and not used
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
  __syncthreads();  // zeros, bias and sources are complete
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
      const PackPlace at(plan, first, packs, item);
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
      if (item < items) staged[i] = pixels.load(diagonal, place(item));
    }
  }

  __device__ void keep() const {
    if (!is_wanted) return;
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kStagedPacks; ++i) {
      const int item = finishers.index + i * finishers.count;
      if (item < items) pixels.at(diagonal, place(item)) = staged[i];
    }
    for (int item = finishers.index + kStagedPacks * finishers.count; item < items; item += finishers.count) {
      const PackPlace at = place(item);
      pixels.at(diagonal, at) = pixels.load(diagonal, at);
    }
  }

 private:
  __device__ PackPlace place(int item) const { return {pixels.args.plan, diagonal, pixels.packs, item}; }
};

// x of a diagonal from the splits' sums; of a ring it is stored at once.
template <typename Element, typename Store>
__device__ void finish(const TensorPixels<Element>& pixels, const Diagonal& diagonal, const Finishers& finishers,
                       const float* sums, const Store& store) {
  const TensorPlan& plan = pixels.args.plan;
  const int packs = pixels.packs;
  for (int item = finishers.index; finishers.index >= 0 && item < diagonal.columns * packs; item += finishers.count) {
    const PackPlace at(plan, diagonal, packs, item);
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
  const int center = near_taps(taps_h, taps_w);
  const int diagonals = pixels.tile.rows + pixels.tile.columns - 1;
  for (int number = 0; number < diagonals; ++number) {
    const Diagonal diagonal = diagonal_at(pixels.tile, plan, number);
    const NextDiagonal<Element> next(pixels, finishers, number + 1, !plan.whole_images && number + 1 < diagonals);
    // Taps that reach into the image at all.
    const int reaching = taps_nearer(taps_h, taps_w, number + 1);
    const TapRange near{0, number == 0 ? 0 : center};
    const TapRange ahead{center, reaching - near.count};
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
      const TapRange rest{number == 0 ? center : 0, is_begun ? near.count : reaching};
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
  sweep<kTf32>(pixels, {memory.weights, folded, memory.x, memory.sources}, memory.sums, store);
  if (!plan.whole_images) return;
  __syncthreads();  // x is complete
  for_each_pack(pixels.tile, pixels.packs, args.output_strides, [&](int image, int row, int column, int pack) {
    store(pixels.tile.first_image + image, row, column, pack, pixels.at(row + column, image, row, pack));
  });
}

}  // namespace inverse_flow
