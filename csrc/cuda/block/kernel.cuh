// The regime "block": one block solves x = A(w)^-1 (y - bias) for one tile of an image, or for several small images.
//
// Mirrored to the top-left order, every problem is x_p = M^-1 (y_p - bias) - sum_d W'_d x_{p-d}, d = (a, b) != (0, 0).
//   fold     the block copies the folded weights into shared memory, or makes them there (fold.cuh), if they fit.
//   prepare  z_p = M^-1 (y_p - bias) - the taps that reach out of the tile, into solved tiles in global memory. All
//            pixels at once: a thread owns a pack of output channels of a pixel.
//   sweep    x_p = z_p - the taps inside the tile, one anti-diagonal after the other; a thread owns one output channel
//            of one pixel of the diagonal and overwrites z by x. One barrier per diagonal: the next reads what it
//            wrote.
//   store    a thread owns a pack of channels of a pixel again.
// Shared memory: [folded weights: taps x channel packs x output channels x pack] [bias] [x: image, row, column,
// channel].
// Barriers: after the fold (its scratch lies where x will), after prepare, after each of the tile_h + tile_w - 1
// diagonals. Bytes: y in and x out once, the weights once a block. Operations, in multiply-adds: taps x C_g a value;
// the sweep loads, per pack of 4 of them, 16 bytes of x (the same for all channels of a pixel) and 16 of weights.
#pragma once

#include "../common/solve.cuh"
#include "plan.h"

namespace inverse_flow {

template <typename Element>
struct BlockArguments : SolveArguments<Element, BlockPlan> {
  int64_t tile_diagonal;  // the tiles of this launch: row + column = tile_diagonal
};

template <typename Element>
__device__ Tile block_tile(const BlockArguments<Element>& args) {
  const BlockPlan& plan = args.plan;
  const int64_t beyond = args.tile_diagonal - (plan.tiles_w - 1);
  const int64_t tile_row = (beyond > 0 ? beyond : 0) + blockIdx.z;
  const int64_t tile_column = args.tile_diagonal - tile_row;
  Tile tile;
  tile.first_image = args.first_image + static_cast<int64_t>(blockIdx.x) * plan.images;
  tile.first_row = tile_row * plan.tile_h;
  tile.first_column = tile_column * plan.tile_w;
  tile.images = smaller(plan.images, args.shape.batch - tile.first_image);
  tile.rows = smaller(plan.tile_h, args.shape.height - tile.first_row);
  tile.columns = smaller(plan.tile_w, args.shape.width - tile.first_column);
  return tile;
}

template <bool kWeightsInShared, typename State, int kPack>
__device__ Pack<State, kPack> load_weights(const State* weights) {
  const auto* packs = reinterpret_cast<const Pack<State, kPack>*>(weights);
  if constexpr (kWeightsInShared) {
    return *packs;
  } else {
    return load_readonly(packs);
  }
}

// sum[u] += sum over the input channels c of weights[c][first_output + u] * value(c), for one tap.
template <bool kWeightsInShared, int kPack, typename State, typename Value>
__device__ void add_tap(State (&sum)[kPack], const State* tap, int channels, int first_output, Value value) {
  INVERSE_FLOW_UNROLL_BY(1)  // a pass is kPack^2 multiply-adds already
  for (int first = 0; first < channels; first += kPack) {
    State x[kPack];
    INVERSE_FLOW_UNROLL
    for (int v = 0; v < kPack; ++v) x[v] = first + v < channels ? value(first + v) : State(0);
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < kPack; ++u) {
      if (first_output + u < channels) {
        const auto w = load_weights<kWeightsInShared, State, kPack>(tap + (first_output + u) * kPack);
        INVERSE_FLOW_UNROLL
        for (int v = 0; v < kPack; ++v) sum[u] += w.value[v] * x[v];
      }
    }
    tap += static_cast<int64_t>(channels) * kPack;
  }
}

template <bool kWeightsInShared, int kPack, typename Element, typename State>
__device__ void prepare(const BlockArguments<Element>& args, const Tile& tile, const BlockGroup& group,
                        const State* weights, const State* bias, State* x) {
  const BlockPlan& plan = args.plan;
  const PackedTaps& taps = plan.taps;
  const int channels = static_cast<int>(args.shape.channels);
  const int64_t tap_size = static_cast<int64_t>(taps.channel_packs) * channels * kPack;
  const auto input = image_view(args.input, args.input_strides, args, group);
  for_each_pack(tile, taps.channel_packs, args.input_strides, [&](int image, int row, int column, int pack) {
    const int64_t image_row = tile.first_row + row;
    const int64_t image_column = tile.first_column + column;
    const int first_output = pack * kPack;
    const Element* y = input.pixel(tile.first_image + image, image_row, image_column);
    State z[kPack] = {};
    const auto y_of = [&](int c) { return to_state(y[c * args.input_strides.channel]) - bias[c]; };
    if (args.shape.corner == kIdentity) {
      INVERSE_FLOW_UNROLL
      for (int u = 0; u < kPack; ++u) z[u] = first_output + u < channels ? y_of(first_output + u) : State(0);
    } else {
      add_tap<kWeightsInShared, kPack>(z, weights, channels, first_output, y_of);
    }
    if (!plan.single_tile()) {
      const auto solved = image_view<const State>(args.state, args.state_strides, args, group);
      State outside[kPack] = {};  // a sum of its own: the products may be far smaller than z
      const int last_a = smaller(taps.taps_h - 1, image_row);
      const int last_b = smaller(taps.taps_w - 1, image_column);
      for (int a = 0; a <= last_a; ++a) {
        // Above the tile every tap is outside, else those that reach left of it.
        for (int b = a <= row ? column + 1 : 0; b <= last_b; ++b) {
          const State* source = solved.pixel(tile.first_image + image, image_row - a, image_column - b);
          add_tap<kWeightsInShared, kPack>(outside, weights + (a * taps.taps_w + b) * tap_size, channels, first_output,
                                           [&](int c) { return source[c * args.state_strides.channel]; });
        }
      }
      INVERSE_FLOW_UNROLL
      for (int u = 0; u < kPack; ++u) z[u] -= outside[u];
    }
    Pack<State, kPack> packed;
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < kPack; ++u) packed.value[u] = z[u];
    const int pixel = (image * plan.tile_h + row) * plan.row_stride + column;
    reinterpret_cast<Pack<State, kPack>*>(x)[pixel * taps.channel_packs + pack] = packed;
  });
}

template <bool kWeightsInShared, int kPack, typename State>
__device__ void sweep(const BlockPlan& plan, int channels, const Tile& tile, const State* weights, State* x) {
  using StatePack = Pack<State, kPack>;
  const PackedTaps& taps = plan.taps;
  const int packs = taps.channel_packs;
  const int thread = threadIdx.x;
  const int first_channel = thread % plan.channel_threads;
  const int first_pixel = thread / plan.channel_threads % plan.diagonal_threads;
  const int image = thread / (plan.channel_threads * plan.diagonal_threads);
  State* image_x = x + static_cast<int64_t>(image) * plan.tile_h * plan.row_stride * packs * kPack;
  const int diagonals = taps.taps_h * taps.taps_w > 1 ? tile.rows + tile.columns - 1 : 0;
  for (int diagonal = 0; diagonal < diagonals; ++diagonal) {
    const int first_row = diagonal < tile.columns ? 0 : diagonal - tile.columns + 1;
    const int last_row = diagonal < tile.rows ? diagonal : tile.rows - 1;
    for (int row = first_row + first_pixel; row <= last_row && image < tile.images; row += plan.diagonal_threads) {
      const int column = diagonal - row;
      const int last_a = row < taps.taps_h - 1 ? row : taps.taps_h - 1;
      const int last_b = column < taps.taps_w - 1 ? column : taps.taps_w - 1;
      State* const here = image_x + (row * plan.row_stride + column) * packs * kPack;
      for (int o = first_channel; o < channels; o += plan.channel_threads) {
        State sum[kPack] = {};
        for (int a = 0; a <= last_a; ++a) {
          for (int b = a == 0 ? 1 : 0; b <= last_b; ++b) {
            const auto* source = reinterpret_cast<const StatePack*>(here - (a * plan.row_stride + b) * packs * kPack);
            const State* w = weights + (static_cast<int64_t>(a * taps.taps_w + b) * packs * channels + o) * kPack;
            INVERSE_FLOW_UNROLL_BY(4)
            for (int pack = 0; pack < packs; ++pack) {
              const StatePack neighbour = source[pack];
              const StatePack tap = load_weights<kWeightsInShared, State, kPack>(w);
              INVERSE_FLOW_UNROLL
              for (int v = 0; v < kPack; ++v) sum[v] += tap.value[v] * neighbour.value[v];
              w += static_cast<int64_t>(channels) * kPack;
            }
          }
        }
        State total = sum[0];
        INVERSE_FLOW_UNROLL
        for (int v = 1; v < kPack; ++v) total += sum[v];
        here[o] -= total;
      }
    }
    __syncthreads();  // the next diagonal reads what this one wrote
  }
}

template <int kPack, typename Element, typename State>
__device__ void store(const BlockArguments<Element>& args, const Tile& tile, const BlockGroup& group, const State* x) {
  const BlockPlan& plan = args.plan;
  const int packs = plan.taps.channel_packs;
  const PixelStore<BlockArguments<Element>> store_pixel(args, group);
  for_each_pack(tile, packs, args.output_strides, [&](int image, int row, int column, int pack) {
    const int pixel = (image * plan.tile_h + row) * plan.row_stride + column;
    const auto packed = reinterpret_cast<const Pack<State, kPack>*>(x)[pixel * packs + pack];
    store_pixel(tile.first_image + image, tile.first_row + row, tile.first_column + column, pack, packed);
  });
}

// Leaves the folded weights where the block reads them, and returns where that is. `scratch`: of the fold.
template <bool kWeightsInShared, typename Element, typename State>
__device__ const State* fold(const BlockArguments<Element>& args, const BlockGroup& group, State* shared_weights,
                             void* scratch) {
  const int64_t elements = args.plan.taps.elements();
  if constexpr (!kWeightsInShared) {
    return args.folded + group.number * elements;
  } else {
    if (args.folded == nullptr) {
      fold_in_block(group_weight(args, group), args.plan.taps, scratch, shared_weights);
    } else {
      const State* const folded = args.folded + group.number * elements;
      for (int64_t i = threadIdx.x; i < elements; i += blockDim.x) shared_weights[i] = load_readonly(folded + i);
    }
    return shared_weights;
  }
}

// Grid: (blocks of images, groups, tiles of the diagonal).
template <typename Element, int kPack, bool kWeightsInShared>
__global__ void __launch_bounds__(kMaxThreads, 1) solve_kernel(const __grid_constant__ BlockArguments<Element> args) {
  using State = typename StateOf<Element>::Type;
  const int channels = static_cast<int>(args.shape.channels);
  const BlockGroup group = block_group(args);
  const Tile tile = block_tile(args);

  unsigned char* const shared = dynamic_shared_memory();
  State* const x = reinterpret_cast<State*>(shared + args.plan.tile_offset);
  State* const bias = reinterpret_cast<State*>(shared + args.plan.bias_offset);
  load_bias(args, group, channels, bias);
  const State* const weights = fold<kWeightsInShared>(args, group, reinterpret_cast<State*>(shared), x);
  __syncthreads();  // weights and bias are complete, and the fold's scratch is free for x

  prepare<kWeightsInShared, kPack>(args, tile, group, weights, bias, x);
  __syncthreads();  // z is complete
  sweep<kWeightsInShared, kPack>(args.plan, channels, tile, weights, x);
  store<kPack>(args, tile, group, x);
}

}  // namespace inverse_flow
