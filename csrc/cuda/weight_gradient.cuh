// The gradients of weight and bias: dW[o, c, (a, b)] = -sum over images and pixels p of left[o, p] right[c, p - (a,
// b)], in the coordinates mirrored to the group's order; left, right = u, x, and x, u for a transposed solve. db = -sum
// u.
//
// A block owns block_outputs x block_inputs channel pairs, a window of taps, and a share of the pixel tiles of the
// batch. It brings one pixel tile at a time into shared memory: left [pixel][output], and right [pixel][input] with the
// margin above and to the left that the window reaches into, zeros outside the image. A thread owns one channel pair,
// one row of taps and kTapColumns columns of them; it walks along the tile's rows with the last kTapColumns values of
// right in registers, so that two loads serve kTapColumns multiply-adds. Teams of threads take every teams-th row.
// Sums are kept a tile at a time before they join the total, which keeps float32 rounding small, and are added in a
// fixed order everywhere: teams in shared memory, blocks in a second launch. So the result is deterministic.
// Barriers: after a tile is loaded, after it was used, and two around the meeting of the teams.
#pragma once

#include "solve.cuh"

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
  State* partials;  // splits x weight-shaped
};

// The element offset of a pixel in a tensor whose group is mirrored; ImageView for a type known at run time.
struct OffsetView {
  int64_t base;
  Strides strides;

  __device__ OffsetView(const Strides& tensor_strides, const Shape& shape, int64_t group, int flips)
      : base(group * shape.channels * tensor_strides.channel), strides(tensor_strides) {
    if (flips & kMirrorRows) {
      base += (shape.height - 1) * strides.row;
      strides.row = -strides.row;
    }
    if (flips & kMirrorColumns) {
      base += (shape.width - 1) * strides.column;
      strides.column = -strides.column;
    }
  }

  __device__ int64_t at(int64_t image, int64_t channel, int64_t row, int64_t column) const {
    return base + image * strides.batch + channel * strides.channel + row * strides.row + column * strides.column;
  }
};

// Fills tile[row][column][channel] from the image region that begins at (first_row, first_column); zeros outside.
template <typename State>
__device__ void load_pixels(State* tile, int rows, int columns, int channels, const void* data, ElementType type,
                            const OffsetView& view, const Shape& shape, int64_t image, int64_t first_channel,
                            int64_t first_row, int64_t first_column) {
  const int pixels = rows * columns;
  for (int item = threadIdx.x; item < pixels * channels; item += blockDim.x) {
    const int channel = item / pixels;
    const int pixel = item - channel * pixels;
    const int64_t row = first_row + pixel / columns;
    const int64_t column = first_column + pixel % columns;
    const bool inside = row >= 0 && row < shape.height && column >= 0 && column < shape.width &&
                        first_channel + channel < shape.channels;
    tile[pixel * channels + channel] =
        inside ? load_element<State>(data, view.at(image, first_channel + channel, row, column), type) : State(0);
  }
}

// Grid: (splits, groups, windows_w x windows_h x input blocks x output blocks).
template <typename State>
__global__ void __launch_bounds__(kGradientThreads, 1)
    weight_gradient_kernel(const __grid_constant__ GradientArguments<State> args) {
  const GradientPlan& plan = args.plan;
  const Shape& shape = args.shape;
  const int64_t group = args.first_group + blockIdx.y;
  const int order = args.orders[blockIdx.y];

  int64_t block = blockIdx.z;
  const int first_b = static_cast<int>(block % plan.windows_w) * plan.window_w;
  block /= plan.windows_w;
  const int first_a = static_cast<int>(block % plan.windows_h) * plan.window_h;
  block /= plan.windows_h;
  const int64_t first_input = block % plan.input_blocks * plan.block_inputs;
  const int64_t first_output = block / plan.input_blocks * plan.block_outputs;

  const int pitch = static_cast<int>(plan.window_pitch());
  const int strips = pitch / kTapColumns;
  const int items = static_cast<int>(plan.items());
  const int item = threadIdx.x % items;
  const int team = threadIdx.x / items;
  const int input = item % plan.block_inputs;
  const int output = item / plan.block_inputs % plan.block_outputs;
  const int strip = item / (plan.block_inputs * plan.block_outputs) % strips;
  const int window_row = item / (plan.block_inputs * plan.block_outputs * strips);

  unsigned char* const shared = dynamic_shared_memory();
  State* const left = reinterpret_cast<State*>(shared);
  State* const right = reinterpret_cast<State*>(shared + plan.right_offset);
  const int right_rows = plan.tile_h + plan.window_h - 1;
  const int right_columns = plan.tile_w + pitch - 1;
  const OffsetView left_view(args.left_strides, shape, group, order);
  const OffsetView right_view(args.right_strides, shape, group, order);

  State total[kTapColumns] = {};
  const int64_t pixel_tiles = plan.pixel_tiles(shape.batch);
  for (int64_t index = blockIdx.x; index < pixel_tiles; index += plan.splits) {
    const int64_t first_column = index % plan.tiles_w * plan.tile_w;
    const int64_t first_row = index / plan.tiles_w % plan.tiles_h * plan.tile_h;
    const int64_t image = index / (plan.tiles_w * plan.tiles_h);
    load_pixels(left, plan.tile_h, plan.tile_w, plan.block_outputs, args.left, args.left_type, left_view, shape, image,
                first_output, first_row, first_column);
    load_pixels(right, right_rows, right_columns, plan.block_inputs, args.right, args.right_type, right_view, shape,
                image, first_input, first_row - first_a - (plan.window_h - 1), first_column - first_b - (pitch - 1));
    __syncthreads();  // the tile is complete
    if (team < plan.teams) {
      State sum[kTapColumns] = {};
      for (int row = team; row < plan.tile_h; row += plan.teams) {
        const State* l = left + row * plan.tile_w * plan.block_outputs + output;
        const State* r = right + input +
                         ((row + plan.window_h - 1 - window_row) * right_columns + pitch - 1 - strip * kTapColumns) *
                             plan.block_inputs;
        // window[v]: the value of right v columns to the left of the current one.
        State window[kTapColumns];
        INVERSE_FLOW_UNROLL
        for (int v = 1; v < kTapColumns; ++v) window[v - 1] = r[-v * plan.block_inputs];
        for (int column = 0; column < plan.tile_w; ++column) {
          INVERSE_FLOW_UNROLL
          for (int v = kTapColumns - 1; v > 0; --v) window[v] = window[v - 1];
          window[0] = *r;
          const State value = *l;
          INVERSE_FLOW_UNROLL
          for (int v = 0; v < kTapColumns; ++v) sum[v] += value * window[v];
          l += plan.block_outputs;
          r += plan.block_inputs;
        }
      }
      INVERSE_FLOW_UNROLL
      for (int v = 0; v < kTapColumns; ++v) total[v] += sum[v];
    }
    __syncthreads();  // the tile may be overwritten
  }

  State* const meeting = reinterpret_cast<State*>(shared);
  if (team > 0 && team < plan.teams) {
    INVERSE_FLOW_UNROLL
    for (int v = 0; v < kTapColumns; ++v) meeting[(team * items + item) * kTapColumns + v] = total[v];
  }
  __syncthreads();  // the other teams' sums are there
  if (team > 0) return;
  for (int other = 1; other < plan.teams; ++other) {
    INVERSE_FLOW_UNROLL
    for (int v = 0; v < kTapColumns; ++v) total[v] += meeting[(other * items + item) * kTapColumns + v];
  }
  const int64_t channels = shape.channels;
  const int64_t o = first_output + output;
  const int64_t c = first_input + input;
  const int a = first_a + window_row;
  if (o >= channels || c >= channels || a >= plan.taps_h) return;
  const int64_t row = (order & kMirrorRows) ? a : shape.kernel_h - 1 - a;
  State* const partial = args.partials +
                         blockIdx.x * shape.groups * channels * channels * shape.kernel_h * shape.kernel_w +
                         (((group * channels + o) * channels + c) * shape.kernel_h + row) * shape.kernel_w;
  INVERSE_FLOW_UNROLL
  for (int v = 0; v < kTapColumns; ++v) {
    const int b = first_b + strip * kTapColumns + v;
    if (strip * kTapColumns + v < plan.window_w && b < plan.taps_w) {
      partial[(order & kMirrorColumns) ? b : shape.kernel_w - 1 - b] = total[v];
    }
  }
}

template <typename State>
struct ChannelSumArguments {
  Shape shape;
  const void* images;
  Strides strides;
  ElementType type;
  State* partials;  // splits x all channels
};

// sum over images and pixels of one channel; grid: (splits, channels in two dimensions). A warp owns a row, a lane
// every 32nd column; then a tree over the block, one barrier a level.
template <typename State>
__global__ void __launch_bounds__(kBusyThreads)
    channel_sum_kernel(const __grid_constant__ ChannelSumArguments<State> args) {
  const Shape& shape = args.shape;
  const int64_t all_channels = shape.groups * shape.channels;
  const int64_t channel = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  if (channel >= all_channels) return;
  const int warps = blockDim.x / kWarp;
  State sum = 0;
  for (int64_t line = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; line < shape.batch * shape.height;
       line += static_cast<int64_t>(gridDim.x) * warps) {
    const int64_t image = line / shape.height;
    const int64_t row = line - image * shape.height;
    const int64_t start = image * args.strides.batch + channel * args.strides.channel + row * args.strides.row;
    State row_sum = 0;
    for (int64_t column = threadIdx.x % kWarp; column < shape.width; column += kWarp) {
      row_sum += load_element<State>(args.images, start + column * args.strides.column, args.type);
    }
    sum += row_sum;
  }
  State* const sums = reinterpret_cast<State*>(dynamic_shared_memory());
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) args.partials[blockIdx.x * all_channels + channel] = sums[0];
}

template <typename State>
struct CombineArguments {
  Shape shape;
  GroupOrders orders;
  int64_t first_group;
  int64_t splits;
  const State* weight_partials;
  const State* bias_partials;
  void* weight_gradient;
  void* bias_gradient;
  ElementType type;
};

// Adds the blocks' sums, in order, and rounds once; a thread owns an entry. Entries that the solve never read are
// exactly 0: what the corner kind leaves out, and taps beyond the image. Grid: (blocks of entries, groups).
template <typename State>
__global__ void __launch_bounds__(kBusyThreads)
    combine_gradients_kernel(const __grid_constant__ CombineArguments<State> args) {
  const Shape& shape = args.shape;
  const int64_t group = args.first_group + blockIdx.y;
  const int order = args.orders[blockIdx.y];
  const int64_t taps = shape.kernel_h * shape.kernel_w;
  const int64_t entries = shape.channels * shape.channels * taps;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t entry = first; entry < entries; entry += stride) {
    const int64_t pair = entry / taps;
    const int64_t tap = entry - pair * taps;
    const int64_t row = tap / shape.kernel_w;
    const int64_t column = tap - row * shape.kernel_w;
    const int64_t a = (order & kMirrorRows) ? row : shape.kernel_h - 1 - row;
    const int64_t b = (order & kMirrorColumns) ? column : shape.kernel_w - 1 - column;
    const int64_t o = pair / shape.channels;
    const int64_t c = pair - o * shape.channels;
    const bool corner_is_read = shape.corner == kGeneral || (shape.corner == kUnitTriangular && c < o);
    const bool is_read = a < shape.height && b < shape.width && (a > 0 || b > 0 || corner_is_read);
    State sum = 0;
    for (int64_t split = 0; is_read && split < args.splits; ++split) {
      sum -= args.weight_partials[split * shape.groups * entries + group * entries + entry];
    }
    store_element(args.weight_gradient, group * entries + entry, args.type, sum);
  }
  for (int64_t c = first; c < shape.channels; c += stride) {
    const int64_t channel = group * shape.channels + c;
    State sum = 0;
    for (int64_t split = 0; split < args.splits; ++split) {
      sum -= args.bias_partials[split * shape.groups * shape.channels + channel];
    }
    store_element(args.bias_gradient, channel, args.type, sum);
  }
}

}  // namespace inverse_flow
