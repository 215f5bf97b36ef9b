// The solve of few channels a group: a warp sweeps a band of rows, a few lanes on each row, without a barrier a step.
//
//   fold     as in solve.cuh: every block makes the folded weights in shared memory.
//   prepare  z_p = M^-1 (y_p - bias) of the block's pixels, into shared memory; a thread owns a pixel.
//   margin   of an image of several tiles: the solved rows above and columns to the left, from global memory.
//   sweep    the lanes of a row own its output channels and keep their weights in registers. At step s row r is at
//            column s - r, so what it needs of the row above was solved a step ago, and comes by shuffle; of the rows
//            further up, the lanes of the row above had it a step ago. A pixel is added, as soon as it is known, to the
//            sums of all columns that it reaches: a lane keeps kTaps - 1 of them an output, and of the steps before
//            nothing else. The first row of a band reads the rows above from shared memory. x overwrites z.
//   store    a thread owns a pixel again.
// Shared memory: [folded weights: tap, input channel, output channel] [bias] [a pixel of zeros] [image, row, column,
// channel], with the margin's rows and columns in front.
// Barriers: after the fold (its scratch lies where z will), after prepare, after the sweep; and if an image has several
// bands, after each phase of kLanesPhase steps: the band below reads rows that the phase wrote.
// Blocks of one image wait for each other's tiles: a block takes a ticket, tickets follow the anti-diagonals of tiles,
// so a tile that is waited for is one that a running block already has. Flags say which tiles are in global memory.
// Bytes: y in and x out once. A step of a warp: (kTaps^2 - 1) x kChannels multiply-adds an output of a lane,
// kTaps x kChannels shuffles (without those of its own row if a lane owns a whole pixel), one load and one store.
#pragma once

#include "solve.cuh"

namespace inverse_flow {

template <typename Element>
struct LanesArguments {
  SolveArguments<Element> solve;
  int32_t* progress;  // of images of several tiles, a group: the next ticket, then a flag for every tile of every image
};

// What one kernel is compiled for.
template <int channels, int taps>
struct LanesShape {
  static constexpr int kChannels = channels;
  static constexpr int kTaps = taps;
  static constexpr int kLanes = lanes_of_pixel(channels);
  static constexpr int kOutputs = outputs_of_lane(channels);
  static constexpr int kPitch = kLanes * kOutputs;
};

// The block's tile, and whether solved pixels lie above it and to its left.
struct LanesTile {
  Tile tile;
  int64_t number;  // of the image's tiles
  int above;       // rows of margin: 0 at the edge of the image
  int left;        // columns of margin
};

template <typename Element>
__device__ int32_t* block_progress(const LanesArguments<Element>& args) {
  const int64_t flags = args.solve.shape.batch * args.solve.plan.lanes.tiles();
  return args.progress + (args.solve.first_group + blockIdx.y) * (1 + flags);
}

// Tickets count the tiles of all images, one anti-diagonal after the other.
template <typename Element>
__device__ LanesTile claim_tile(const LanesArguments<Element>& args, int32_t* shared_ticket) {
  const Shape& shape = args.solve.shape;
  const LanesPlan& plan = args.solve.plan.lanes;
  LanesTile claimed{};
  if (plan.single_tile()) {
    claimed.tile.first_image = args.solve.first_image + static_cast<int64_t>(blockIdx.x) * plan.images;
    claimed.tile.images = smaller(plan.images, shape.batch - claimed.tile.first_image);
    claimed.tile.rows = plan.tile_h;
    claimed.tile.columns = plan.tile_w;
    return claimed;
  }
  if (threadIdx.x == 0) *shared_ticket = atomicAdd(block_progress(args), 1);
  __syncthreads();  // the ticket is there
  int64_t rest = *shared_ticket;
  __syncthreads();  // and its place free again
  int64_t first_row = 0;
  int64_t diagonal = 0;
  while (true) {
    first_row = diagonal < plan.tiles_w ? 0 : diagonal - plan.tiles_w + 1;
    const int64_t last_row = diagonal < plan.tiles_h ? diagonal : plan.tiles_h - 1;
    const int64_t tickets = (last_row - first_row + 1) * shape.batch;
    if (rest < tickets) break;
    rest -= tickets;
    ++diagonal;
  }
  const int64_t tile_row = first_row + rest / shape.batch;
  const int64_t tile_column = diagonal - tile_row;
  claimed.tile.first_image = rest % shape.batch;
  claimed.tile.first_row = tile_row * plan.tile_h;
  claimed.tile.first_column = tile_column * plan.tile_w;
  claimed.tile.images = 1;
  claimed.tile.rows = smaller(plan.tile_h, shape.height - claimed.tile.first_row);
  claimed.tile.columns = smaller(plan.tile_w, shape.width - claimed.tile.first_column);
  claimed.number = tile_row * plan.tiles_w + tile_column;
  claimed.above = tile_row > 0 ? plan.margin_h : 0;
  claimed.left = tile_column > 0 ? plan.margin_w : 0;
  return claimed;
}

// Returns when the tiles above and to the left are in global memory, and so those that they waited for.
template <typename Element>
__device__ void wait_for_neighbours(const LanesArguments<Element>& args, const LanesTile& claimed) {
  const LanesPlan& plan = args.solve.plan.lanes;
  if (threadIdx.x == 0) {
    const int32_t* done = block_progress(args) + 1 + claimed.tile.first_image * plan.tiles() + claimed.number;
    if (claimed.above > 0) {
      while (load_acquire(done - plan.tiles_w) == 0) wait_a_moment();
    }
    if (claimed.left > 0) {
      while (load_acquire(done - 1) == 0) wait_a_moment();
    }
  }
  __syncthreads();  // all threads may read what the flags stand for
}

// Where pixel (row, column) of the tile lies in shared memory; the margin has negative rows and columns.
__device__ inline int place_in_tile(const LanesPlan& plan, const LanesTile& claimed, int image, int row, int column) {
  return (image * (plan.tile_h + plan.margin_h) + plan.margin_h + row) * plan.row_stride + claimed.left + column;
}

template <typename S>
__device__ void write_pixel(float* x, int place, const float (&values)[S::kChannels]) {
  Pack<float, S::kPitch> packed;
  INVERSE_FLOW_UNROLL
  for (int c = 0; c < S::kPitch; ++c) packed.value[c] = c < S::kChannels ? values[c] : 0.0f;
  reinterpret_cast<Pack<float, S::kPitch>*>(x)[place] = packed;
}

template <typename S, typename Element>
__device__ void prepare_lanes(const SolveArguments<Element>& args, const LanesTile& claimed, int64_t group, int flips,
                              const float* weights, const float* bias, float* x) {
  constexpr int kChannels = S::kChannels;
  constexpr int kInFlight = 4;  // pixels whose loads are under way before the first is used
  const ImageView<const Element> input(args.input, args.input_strides, args.shape, group, flips);
  const bool is_identity = args.shape.corner == kIdentity;
  float inverse[kChannels][kChannels];
  float shift[kChannels];
  INVERSE_FLOW_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    shift[c] = bias[c];
    INVERSE_FLOW_UNROLL
    for (int o = 0; o < kChannels; ++o) inverse[o][c] = weights[c * kChannels + o];
  }
  const Tile& tile = claimed.tile;
  const unsigned columns = static_cast<unsigned>(tile.columns);
  const unsigned rows = static_cast<unsigned>(tile.rows);
  const unsigned pixels = static_cast<unsigned>(tile.images) * rows * columns;
  for (unsigned first = threadIdx.x; first < pixels; first += kInFlight * blockDim.x) {
    float y[kInFlight][kChannels];
    int place[kInFlight];
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned pixel = first + static_cast<unsigned>(i) * blockDim.x;
      place[i] = -1;
      if (pixel < pixels) {
        const unsigned line = pixel / columns;
        const int column = static_cast<int>(pixel - line * columns);
        const int image = static_cast<int>(line / rows);
        const int row = static_cast<int>(line) - image * tile.rows;
        const Element* from = input.pixel(tile.first_image + image, tile.first_row + row, tile.first_column + column);
        INVERSE_FLOW_UNROLL
        for (int c = 0; c < kChannels; ++c) y[i][c] = to_state(from[c * args.input_strides.channel]);
        place[i] = place_in_tile(args.plan.lanes, claimed, image, row, column);
      }
    }
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (place[i] < 0) break;
      float z[kChannels] = {};
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const float right = y[i][c] - shift[c];
        INVERSE_FLOW_UNROLL
        for (int o = 0; o < kChannels; ++o) z[o] += inverse[o][c] * right;
      }
      if (is_identity) {
        INVERSE_FLOW_UNROLL
        for (int c = 0; c < kChannels; ++c) z[c] = y[i][c] - shift[c];
      }
      write_pixel<S>(x, place[i], z);
    }
  }
}

template <typename S, typename Element>
__device__ void load_margin(const SolveArguments<Element>& args, const LanesTile& claimed, int64_t group, int flips,
                            float* x) {
  const ImageView<const float> solved(args.state, args.state_strides, args.shape, group, flips);
  const Tile& tile = claimed.tile;
  const int wide = claimed.left + tile.columns;
  const int over = claimed.above * wide;
  for (int item = threadIdx.x; item < over + claimed.left * tile.rows; item += blockDim.x) {
    const int rest = item - over;
    const int row = item < over ? item / wide - claimed.above : rest / claimed.left;
    const int column = (item < over ? item % wide : rest % claimed.left) - claimed.left;
    const float* from = solved.pixel(tile.first_image, tile.first_row + row, tile.first_column + column);
    float values[S::kChannels];
    INVERSE_FLOW_UNROLL
    for (int c = 0; c < S::kChannels; ++c) values[c] = from[c * args.state_strides.channel];
    write_pixel<S>(x, place_in_tile(args.plan.lanes, claimed, 0, row, column), values);
  }
}

template <typename S>
__device__ void sweep_lanes(const LanesPlan& plan, const LanesTile& claimed, const float* weights, const float* zeros,
                            float* x) {
  constexpr int kChannels = S::kChannels;
  constexpr int kTaps = S::kTaps;
  constexpr int kOutputs = S::kOutputs;
  constexpr int kLanes = S::kLanes;
  using PixelPack = Pack<float, S::kPitch>;
  using OutputPack = Pack<float, kOutputs>;

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int part = lane % kLanes;
  const int slot = lane / kLanes;
  const int band = warp % plan.bands;
  // A warp holds a band of one image, or several whole images.
  const int image_of_warp = plan.bands > 1 ? 0 : slot / plan.tile_h;
  const int image = warp / plan.bands * plan.images_per_warp + image_of_warp;
  const int skew = slot - image_of_warp * plan.tile_h;
  const int row = band * plan.rows + skew;
  const bool has_row = warp < plan.sweep_warps && image_of_warp < plan.images_per_warp && image < claimed.tile.images &&
                       row < claimed.tile.rows;
  const unsigned columns = has_row ? static_cast<unsigned>(claimed.left + claimed.tile.columns) : 0;
  // The first row of a warp or an image has nobody to shuffle from: what is above it lies in shared memory, or nowhere.
  const bool is_first = skew == 0;
  const bool reads_above = is_first && (band > 0 || claimed.above > 0);
  const int row_floats = plan.row_stride * S::kPitch;
  float* const line = x + place_in_tile(plan, claimed, image, row, -claimed.left) * S::kPitch;
  float* const outputs = line + part * kOutputs;

  float weight[kTaps * kTaps][kOutputs][kChannels];  // the corner's is never used
  INVERSE_FLOW_UNROLL
  for (int tap = 1; tap < kTaps * kTaps; ++tap) {
    INVERSE_FLOW_UNROLL
    for (int k = 0; k < kOutputs; ++k) {
      const int o = part * kOutputs + k;
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        weight[tap][k][c] = o < kChannels ? -weights[(tap * kChannels + c) * kChannels + o] : 0.0f;
      }
    }
  }

  // What moves on by a column a step.
  int column = -skew;
  float* here = outputs + column * S::kPitch;
  const float* over[kTaps - 1];
  INVERSE_FLOW_UNROLL
  for (int a = 1; a < kTaps; ++a) over[a - 1] = line + column * S::kPitch - a * row_floats;

  float solved[kOutputs] = {};             // of the step before
  float above[kTaps - 1][kChannels] = {};  // rows r - 1, r - 2, ... in this column
  float sums[kTaps][kOutputs] = {};        // of this column and those that follow; the last stays 0
  for (int time = 0; time < plan.phases(); ++time) {
    const int phase = time - band * plan.lag;
    if (warp < plan.sweep_warps && phase >= 0 && phase < plan.band_phases) {
      INVERSE_FLOW_UNROLL_BY(1)
      for (int step = 0; step < kLanesPhase; ++step) {
        const bool is_inside = static_cast<unsigned>(column) < columns;

        // Upwards the farthest rows first: each takes what the row above it had.
        float left[kChannels];
        INVERSE_FLOW_UNROLL
        for (int a = kTaps - 2; a > 0; --a) {
          INVERSE_FLOW_UNROLL
          for (int c = 0; c < kChannels; ++c) above[a][c] = __shfl_up_sync(kFullWarp, above[a - 1][c], kLanes);
        }
        INVERSE_FLOW_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          const float channel = solved[c % kOutputs];
          const int owner = lane - part + c / kOutputs;
          left[c] = kLanes == 1 ? channel : __shfl_sync(kFullWarp, channel, owner);
          above[0][c] = __shfl_sync(kFullWarp, channel, (owner + kWarp - kLanes) % kWarp);
        }
        INVERSE_FLOW_UNROLL
        for (int a = 1; a < kTaps; ++a) {
          const float* const source = reads_above && is_inside ? over[a - 1] : zeros;
          const PixelPack pixel = *reinterpret_cast<const PixelPack*>(source);
          INVERSE_FLOW_UNROLL
          for (int c = 0; c < kChannels; ++c) above[a - 1][c] = is_first ? pixel.value[c] : above[a - 1][c];
        }
        const OutputPack z = *reinterpret_cast<const OutputPack*>(is_inside ? here : zeros);

        // What is known longest goes in first; only the left neighbour and the row above are news.
        INVERSE_FLOW_UNROLL
        for (int k = 0; k < kOutputs; ++k) {
          float sum = sums[0][k];
          INVERSE_FLOW_UNROLL
          for (int a = kTaps - 1; a > 1; --a) {
            INVERSE_FLOW_UNROLL
            for (int c = 0; c < kChannels; ++c) sum += weight[a * kTaps][k][c] * above[a - 1][c];
          }
          INVERSE_FLOW_UNROLL
          for (int c = 0; c < kChannels; ++c) sum += weight[1][k][c] * left[c];
          INVERSE_FLOW_UNROLL
          for (int c = 0; c < kChannels; ++c) sum += weight[kTaps][k][c] * above[0][c];
          // In the margin z is x already. Left of it all is zero; what is right of the image reaches nobody in it.
          solved[k] = column < claimed.left ? z.value[k] : z.value[k] + sum;
        }
        if (is_inside) {
          OutputPack packed;
          INVERSE_FLOW_UNROLL
          for (int k = 0; k < kOutputs; ++k) packed.value[k] = solved[k];
          *reinterpret_cast<OutputPack*>(here) = packed;
        }

        // The sums move one column on, and take in what this step brought.
        INVERSE_FLOW_UNROLL
        for (int b = 1; b < kTaps; ++b) {
          INVERSE_FLOW_UNROLL
          for (int k = 0; k < kOutputs; ++k) {
            float sum = sums[b][k];
            if (b + 1 < kTaps) {
              INVERSE_FLOW_UNROLL
              for (int c = 0; c < kChannels; ++c) sum += weight[b + 1][k][c] * left[c];
            }
            INVERSE_FLOW_UNROLL
            for (int a = 1; a < kTaps; ++a) {
              INVERSE_FLOW_UNROLL
              for (int c = 0; c < kChannels; ++c) sum += weight[a * kTaps + b][k][c] * above[a - 1][c];
            }
            sums[b - 1][k] = sum;
          }
        }
        ++column;
        here += S::kPitch;
        INVERSE_FLOW_UNROLL
        for (int a = 1; a < kTaps; ++a) over[a - 1] += S::kPitch;
      }
    }
    if (plan.bands > 1) __syncthreads();  // the band below reads what this phase wrote
  }
}

template <typename S, typename Element>
__device__ void store_lanes(const SolveArguments<Element>& args, const LanesTile& claimed, int64_t group, int flips,
                            const float* x) {
  const ImageView<Element> output(args.output, args.output_strides, args.shape, group, flips);
  const ImageView<float> state(args.state, args.state_strides, args.shape, group, flips);
  const Tile& tile = claimed.tile;
  const unsigned columns = static_cast<unsigned>(tile.columns);
  const unsigned rows = static_cast<unsigned>(tile.rows);
  const unsigned pixels = static_cast<unsigned>(tile.images) * rows * columns;
  for (unsigned pixel = threadIdx.x; pixel < pixels; pixel += blockDim.x) {
    const unsigned line = pixel / columns;
    const int column = static_cast<int>(pixel - line * columns);
    const int image = static_cast<int>(line / rows);
    const int row = static_cast<int>(line) - image * tile.rows;
    const int place = place_in_tile(args.plan.lanes, claimed, image, row, column);
    const auto packed = reinterpret_cast<const Pack<float, S::kPitch>*>(x)[place];
    const int64_t image_row = tile.first_row + row;
    const int64_t image_column = tile.first_column + column;
    Element* const rounded = output.pixel(tile.first_image + image, image_row, image_column);
    INVERSE_FLOW_UNROLL
    for (int c = 0; c < S::kChannels; ++c) {
      from_state(packed.value[c], rounded[c * args.output_strides.channel]);
    }
    if (args.write_state) {
      float* const exact = state.pixel(tile.first_image + image, image_row, image_column);
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < S::kChannels; ++c) exact[c * args.state_strides.channel] = packed.value[c];
    }
  }
}

// Grid: (blocks of images, or tiles of all images; groups).
template <typename Element, int kChannels, int kTaps>
__global__ void __launch_bounds__(kLanesThreads, 1)
    lanes_kernel(const __grid_constant__ LanesArguments<Element> arguments) {
  using S = LanesShape<kChannels, kTaps>;
  const SolveArguments<Element>& args = arguments.solve;
  const LanesPlan& plan = args.plan.lanes;
  const int64_t group = args.first_group + blockIdx.y;
  const int order = args.orders[blockIdx.y];
  // A transposed solve starts from the opposite corner.
  const int flips = args.shape.transposed ? order ^ kOppositeCorner : order;

  unsigned char* const shared = dynamic_shared_memory();
  float* const weights = reinterpret_cast<float*>(shared);
  float* const bias = reinterpret_cast<float*>(shared + plan.bias_offset);
  float* const x = reinterpret_cast<float*>(shared + plan.image_offset);
  float* const zeros = reinterpret_cast<float*>(shared + plan.zeros_offset);
  const LanesTile claimed = claim_tile(arguments, reinterpret_cast<int32_t*>(x));
  if (threadIdx.x < S::kPitch) zeros[threadIdx.x] = 0.0f;
  if (threadIdx.x < kChannels) {
    const int64_t channel = group * kChannels + threadIdx.x;
    bias[threadIdx.x] = args.bias == nullptr ? 0.0f : load_element<float>(args.bias, channel, args.weight_type);
  }
  fold_in_block(weight_view(args.shape, args.weight, args.weight_type, group, order), args.plan, x, weights);
  __syncthreads();  // weights, bias and zeros are complete, and the fold's scratch is free for z

  prepare_lanes<S>(args, claimed, group, flips, weights, bias, x);
  if (claimed.above > 0 || claimed.left > 0) {
    wait_for_neighbours(arguments, claimed);
    load_margin<S>(args, claimed, group, flips, x);
  }
  __syncthreads();  // z and the margin are complete
  sweep_lanes<S>(plan, claimed, weights, zeros, x);
  __syncthreads();  // x is complete
  store_lanes<S>(args, claimed, group, flips, x);
  if (!plan.single_tile()) {
    __syncthreads();  // the whole tile is written before one thread says so
    if (threadIdx.x == 0) {
      int32_t* const done = block_progress(arguments) + 1 + claimed.tile.first_image * plan.tiles() + claimed.number;
      store_release(done, 1);
    }
  }
}

}  // namespace inverse_flow
