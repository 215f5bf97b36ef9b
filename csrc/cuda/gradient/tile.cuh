// What both kernels of the weight gradient share: dW[o, c, (a, b)] = -sum over images and pixels p of left[o, p]
// right[c, p - (a, b)], in the coordinates mirrored to the group's order; left, right = u, x, and x, u for a transposed
// solve. db = -sum of u.
//
// A block walks over the pixel tiles of its split. A tile brings into shared memory left [pixel][output] and right
// [pixel][input] (tensor cores: [output][pixel] and [input][pixel]), the latter with the margin above and to the left
// that the window of taps reaches into, zeros outside the image. While a tile is used the next one is copied into a
// second buffer, asynchronously if it is of the state type. A thread copies channels of a pixel: neighbouring threads
// neighbouring pixels, or channels where those are neighbours in memory. Both are rounded to nothing: x is read in its
// own type, u is of the state type. u passes through here anyway, so the blocks of one window add up its channels too:
// a thread owns a channel and a share of the tile's segments, at equal distances. Sums are added in a fixed order
// everywhere: along a thread, teams in shared memory by halves (two barriers per level), splits in a launch of their
// own (combine.cuh). So the result is deterministic.
#pragma once

#include "../common/async_copy.cuh"
#include "../common/element.cuh"
#include "../common/orders.h"
#include "../common/view.cuh"
#include "plan.h"

namespace inverse_flow {

template <typename State>
struct GradientArguments {
  Shape shape;  // of the solve whose gradient this is
  GradientPlan plan;
  GroupOrders orders;
  int64_t first_group;
  // u and x in whatever types they are stored; `left` and `right` as said above.
  const void* left;
  Strides left_strides;
  ElementType left_type;
  const void* right;
  Strides right_strides;
  ElementType right_type;
  State* partials;  // splits x (all weights, then all biases); not used when the block writes the gradient itself
  void* weight_gradient;
  void* bias_gradient;
  ElementType gradient_type;
};

// What a block accumulates, and for which tile. Coordinates are mirrored.
struct GradientBlock {
  int64_t group;
  int order;
  int first_output;
  int first_input;
  int first_a;
  int first_b;
  bool sums_channels;  // one block of each split and channel of u
};

// Grid: (splits, groups, windows_w x windows_h x input blocks x output blocks).
template <typename State>
__device__ GradientBlock gradient_block(const GradientArguments<State>& args) {
  const GradientPlan& plan = args.plan;
  GradientBlock found;
  found.group = args.first_group + blockIdx.y;
  found.order = args.orders[blockIdx.y];
  int block = static_cast<int>(blockIdx.z);
  const int windows_w = static_cast<int>(plan.windows_w);
  const int windows_h = static_cast<int>(plan.windows_h);
  const int input_blocks = static_cast<int>(plan.input_blocks);
  found.first_b = block % windows_w * plan.window_w * plan.strip;
  block /= windows_w;
  found.first_a = block % windows_h * plan.window_h;
  block /= windows_h;
  found.first_input = block % input_blocks * plan.block_inputs;
  found.first_output = block / input_blocks * plan.block_outputs;
  const int other = args.shape.transposed ? found.first_output : found.first_input;
  found.sums_channels = found.first_a == 0 && found.first_b == 0 && other == 0;
  return found;
}

// A region of some images: where it begins, and its size.
struct Region {
  int64_t first_image;
  int64_t first_row;
  int64_t first_column;
  int images;
  int rows;
  int columns;
};

// Where a value of left or right stands in its buffer: pixel * of_pixel + channel * of_channel.
struct TileSteps {
  int of_pixel;
  int of_channel;
};

__device__ inline TileSteps tile_steps(const GradientPlan& plan, int pitch) {
  return plan.tensor_cores ? TileSteps{1, pitch} : TileSteps{pitch, 1};
}

// Values of a thread that are under way at a time where they must be converted.
constexpr int kConverted = 4;

// Puts `count` channels of a pixel, `step` elements apart in memory, into a buffer: by copies that are waited for
// later, or with a conversion.
template <typename State>
__device__ void begin_channels(State* target, int target_step, const State* source, int64_t step, int count) {
  INVERSE_FLOW_UNROLL_BY(2)
  for (int i = 0; i < count; ++i) {
    copy_to_shared<sizeof(State)>(target, source);
    target += target_step;
    source += step;
  }
}
template <typename State, typename Element>
__device__ void begin_channels(State* target, int target_step, const Element* source, int64_t step, int count) {
  for (int first = 0; first < count; first += kConverted) {
    Element loaded[kConverted];
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kConverted; ++i) {
      if (first + i < count) loaded[i] = source[(first + i) * step];
    }
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kConverted; ++i) {
      if (first + i < count) target[(first + i) * target_step] = to_state(loaded[i]);
    }
  }
}

// Begins to fill a buffer with `channels` channels of a region; zeros outside the image and beyond the last channel.
template <typename State>
__device__ void begin_region(State* buffer, const TileSteps& steps, int channel_lanes, int channels,
                             const Region& region, const void* data, ElementType type, const MirroredView& view,
                             const Shape& shape, int64_t first_channel) {
  const int pixels = region.images * region.rows * region.columns;
  const int pixel_lanes = kWarp / channel_lanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first = lane / pixel_lanes;
  const int left_over = static_cast<int>(shape.channels - first_channel);
  const auto mine = [&](int all) { return all > first ? (all - first + channel_lanes - 1) / channel_lanes : 0; };
  const int all = mine(channels);
  const int real = mine(left_over < channels ? left_over : channels);
  with_elements<State>(data, type, [&](const auto* elements) {
    for (int pixel = static_cast<int>(threadIdx.x) / kWarp * pixel_lanes + lane % pixel_lanes; pixel < pixels;
         pixel += static_cast<int>(blockDim.x) / channel_lanes) {
      const int line = pixel / region.columns;
      const int image = line / region.rows;
      const int64_t row = region.first_row + line - image * region.rows;
      const int64_t column = region.first_column + pixel - line * region.columns;
      const bool is_inside = region.first_image + image < shape.batch && row >= 0 && row < shape.height &&
                             column >= 0 && column < shape.width;
      const int count = is_inside ? real : 0;
      State* const target = buffer + pixel * steps.of_pixel + first * steps.of_channel;
      const int target_step = channel_lanes * steps.of_channel;
      begin_channels(target, target_step,
                     elements + view.at(region.first_image + image, first_channel + first, row, column),
                     channel_lanes * view.strides.channel, count);
      for (int i = count; i < all; ++i) target[i * target_step] = 0;
    }
  });
}

// Lanes of a warp that share a pixel: so many that the elements they read lie in few sectors, and those they write in
// different banks.
__device__ inline int channel_lanes(const GradientPlan& plan, const Strides& strides) {
  if (!plan.tensor_cores) return plan.side;
  return strides.channel == 1 ? kFragmentInputs : 1;
}

// Begins to bring the block's channels of tile `index` into a buffer. They are there after wait_for_copies and a
// barrier.
template <typename State>
__device__ void begin_tile(const GradientArguments<State>& args, const GradientBlock& block, int64_t index,
                           unsigned char* buffer) {
  const GradientPlan& plan = args.plan;
  State* const left = reinterpret_cast<State*>(buffer);
  State* const right = reinterpret_cast<State*>(buffer + plan.right_offset);
  const Shape& shape = args.shape;
  Region region;
  region.first_column = index % plan.tiles_w * plan.tile_w;
  region.first_row = index / plan.tiles_w % plan.tiles_h * plan.tile_h;
  region.first_image = index / (plan.tiles_w * plan.tiles_h) * plan.images;
  region.images = plan.images;
  region.rows = plan.tile_h;
  region.columns = plan.tile_w;
  begin_region(left, tile_steps(plan, plan.left_pitch), channel_lanes(plan, args.left_strides), plan.block_outputs,
               region, args.left, args.left_type, MirroredView(args.left_strides, shape, block.group, block.order),
               shape, block.first_output);
  region.first_row -= block.first_a + plan.margin_h();
  region.first_column -= block.first_b + plan.margin_w();
  region.rows = plan.right_rows();
  region.columns = plan.right_columns();
  begin_region(right, tile_steps(plan, plan.right_pitch), channel_lanes(plan, args.right_strides), plan.block_inputs,
               region, args.right, args.right_type, MirroredView(args.right_strides, shape, block.group, block.order),
               shape, block.first_input);
}

// Calls use(buffer) for each of the block's tiles. While one is used the next is on its way into the other buffer.
template <typename State, typename Use>
__device__ void for_each_tile(const GradientArguments<State>& args, const GradientBlock& block, unsigned char* shared,
                              Use use) {
  const GradientPlan& plan = args.plan;
  const int64_t tiles = plan.pixel_tiles();
  // Offsets, not pointers: the compiler is to know that they point into shared memory.
  const int both = static_cast<int>(plan.buffer_bytes);
  int used = 0;
  begin_tile(args, block, blockIdx.x, shared);
  for (int64_t index = blockIdx.x; index < tiles; index += plan.splits) {
    wait_for_copies();
    __syncthreads();  // the tile is complete, and the one before was used
    if (index + plan.splits < tiles) begin_tile(args, block, index + plan.splits, shared + (both - used));
    use(shared + used);
    used = both - used;
  }
  __syncthreads();  // the last tile was used
}

// A stretch of at most kSegmentColumns pixels of a row of the tile.
struct Segment {
  int line;   // row of the tile, over all images
  int image;  // of the tile
  int row;    // of that image
  int first_column;
  int columns;
};

__device__ inline int segments_of(const GradientPlan& plan) {
  return plan.images * plan.tile_h * static_cast<int>(divide_up(plan.tile_w, kSegmentColumns));
}

__device__ inline Segment segment_at(const GradientPlan& plan, int index) {
  const int per_line = static_cast<int>(divide_up(plan.tile_w, kSegmentColumns));
  Segment found;
  found.line = index / per_line;
  found.image = found.line / plan.tile_h;
  found.row = found.line - found.image * plan.tile_h;
  found.first_column = (index - found.line * per_line) * kSegmentColumns;
  const int rest = plan.tile_w - found.first_column;
  found.columns = rest < kSegmentColumns ? rest : kSegmentColumns;
  return found;
}

// Where in `right` the value stands that the first tap of the window, (first_a, first_b), takes for a pixel.
__device__ inline int right_pixel(const GradientPlan& plan, int image, int row, int column) {
  return (image * plan.right_rows() + row + plan.margin_h()) * plan.right_columns() + column + plan.margin_w();
}

// Adds up, over the teams of threads that own the same `items` sums of kCount each, by halves; team 0 has the result.
// The whole block takes part, those without a team (team >= teams) too, and nothing else may be in `memory` by then.
template <int kCount, typename State>
__device__ void meet(State (&sums)[kCount], State* memory, int team, int teams, int item, int items) {
  for (int active = teams; active > 1;) {
    const int half = (active + 1) / 2;
    if (team >= half && team < active) {
      INVERSE_FLOW_UNROLL
      for (int v = 0; v < kCount; ++v) memory[((team - half) * kCount + v) * items + item] = sums[v];
    }
    __syncthreads();  // the later half's sums are there
    if (team + half < active) {
      INVERSE_FLOW_UNROLL
      for (int v = 0; v < kCount; ++v) sums[v] += memory[(team * kCount + v) * items + item];
    }
    __syncthreads();  // they may be overwritten
    active = half;
  }
}

// The sums of the channels of u that pass through the block.
template <typename State>
struct ChannelSum {
  int channels;
  State total[1] = {State(0)};

  __device__ ChannelSum(const GradientPlan& plan, bool transposed)
      : channels(transposed ? plan.block_inputs : plan.block_outputs) {}

  // Threads that share a channel, and this one's part and channel: computed where they are used, as registers are few.
  __device__ int parts() const { return static_cast<int>(blockDim.x) / channels; }
  __device__ int part() const { return static_cast<int>(threadIdx.x) / channels; }
  __device__ int channel() const { return static_cast<int>(threadIdx.x) % channels; }

  __device__ void add_tile(const GradientPlan& plan, bool transposed, const State* left, const State* right) {
    if (part() >= parts()) return;
    const State* const u = transposed ? right : left;
    const TileSteps steps = tile_steps(plan, transposed ? plan.right_pitch : plan.left_pitch);
    State sum = 0;
    for (int index = part(); index < segments_of(plan); index += parts()) {
      const Segment segment = segment_at(plan, index);
      const int pixel = transposed ? right_pixel(plan, segment.image, segment.row, segment.first_column)
                                   : segment.line * plan.tile_w + segment.first_column;
      for (int column = 0; column < segment.columns; ++column) {
        sum += u[(pixel + column) * steps.of_pixel + channel() * steps.of_channel];
      }
    }
    total[0] += sum;
  }
};

// What the solve reads of tap (a, b): the rest has a gradient of exactly 0.
__device__ inline bool corner_is_read(const Shape& shape, int64_t o, int64_t c) {
  return shape.corner == kGeneral || (shape.corner == kUnitTriangular && c < o);
}

// Where the weight of mirrored tap (a, b) stands, within all weights.
__device__ inline int64_t weight_index(const Shape& shape, const GradientBlock& block, int64_t o, int64_t c, int64_t a,
                                       int64_t b) {
  const int64_t row = tap_row(shape.kernel_h, block.order, a);
  const int64_t column = tap_column(shape.kernel_w, block.order, b);
  return (((block.group * shape.channels + o) * shape.channels + c) * shape.kernel_h + row) * shape.kernel_w + column;
}

// Where a block gathers its sums, before it stores them: [output][input][row of taps][column].
__device__ inline int sum_place(const GradientPlan& plan, int output, int input, int window_a, int window_b) {
  return ((output * plan.block_inputs + input) * plan.window_h + window_a) * plan.window_w * plan.strip + window_b;
}

// Stores the block's gathered sums: as the gradient, or for the launch that adds up the splits. Outputs, inputs and
// taps may lie beyond what there is.
template <typename State>
__device__ void store_sums(const GradientArguments<State>& args, const GradientBlock& block, const State* sums) {
  const Shape& shape = args.shape;
  const GradientPlan& plan = args.plan;
  const int columns = plan.window_w * plan.strip;
  const int window = plan.window_h * columns;
  for (int item = threadIdx.x; item < plan.block_outputs * plan.block_inputs * window; item += blockDim.x) {
    const int pair = item / window;
    const int row = (item - pair * window) / columns;
    const int64_t o = block.first_output + pair / plan.block_inputs;
    const int64_t c = block.first_input + pair % plan.block_inputs;
    const int a = block.first_a + row;
    const int b = block.first_b + item - pair * window - row * columns;
    if (o >= shape.channels || c >= shape.channels || a >= plan.taps_h || b >= plan.taps_w) continue;
    const int64_t index = weight_index(shape, block, o, c, a, b);
    if (plan.is_direct()) {
      const bool is_read = a > 0 || b > 0 || corner_is_read(shape, o, c);
      store_element(args.weight_gradient, index, args.gradient_type, is_read ? -sums[item] : State(0));
    } else {
      args.partials[blockIdx.x * gradient_elements(shape) + index] = sums[item];
    }
  }
}

// Besides the sums of the weight: those of the channels, and zeros for taps beyond the image. `memory` is free when
// this returns.
template <typename State>
__device__ void store_the_rest(const GradientArguments<State>& args, const GradientBlock& block, ChannelSum<State>& sum,
                               State* memory) {
  const Shape& shape = args.shape;
  const GradientPlan& plan = args.plan;
  if (block.sums_channels) {
    meet(sum.total, memory, sum.part(), sum.parts(), sum.channel(), sum.channels);
    const int64_t channel = (shape.transposed ? block.first_input : block.first_output) + sum.channel();
    if (sum.part() == 0 && channel < shape.channels) {
      const int64_t index = block.group * shape.channels + channel;
      if (plan.is_direct()) {
        store_element(args.bias_gradient, index, args.gradient_type, -sum.total[0]);
      } else {
        const int64_t weights = gradient_elements(shape) - shape.groups * shape.channels;
        args.partials[blockIdx.x * gradient_elements(shape) + weights + index] = sum.total[0];
      }
    }
  }
  if (!plan.is_direct() || block.first_a > 0 || block.first_b > 0) return;
  if (plan.taps_h == shape.kernel_h && plan.taps_w == shape.kernel_w) return;
  const int64_t taps = shape.kernel_h * shape.kernel_w;
  for (int64_t item = threadIdx.x; item < plan.block_outputs * plan.block_inputs * taps; item += blockDim.x) {
    const int64_t pair = item / taps;
    const int64_t a = (item - pair * taps) / shape.kernel_w;
    const int64_t b = item - pair * taps - a * shape.kernel_w;
    const int64_t o = block.first_output + pair / plan.block_inputs;
    const int64_t c = block.first_input + pair % plan.block_inputs;
    if ((a < plan.taps_h && b < plan.taps_w) || o >= shape.channels || c >= shape.channels) continue;
    store_element(args.weight_gradient, weight_index(shape, block, o, c, a, b), args.gradient_type, State(0));
  }
}

}  // namespace inverse_flow
