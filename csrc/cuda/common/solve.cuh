// What the kernels of all regimes share: the arguments of a launch, the part of the images that a block owns, and how
// pixels are written.
#pragma once

#include "element.cuh"
#include "fold.cuh"
#include "orders.h"
#include "problem.h"
#include "view.cuh"

namespace inverse_flow {

template <typename Element, typename Plan>
struct SolveArguments {
  using Image = Element;
  using State = typename StateOf<Element>::Type;

  Shape shape;
  Plan plan;
  GroupOrders orders;
  int64_t first_group;
  int64_t first_image;
  const Element* input;
  Strides input_strides;
  Element* output;
  Strides output_strides;
  // x unrounded, where later tiles and the weight gradient find it: the output itself if that is of the state type,
  // and then it is not written twice. Null when nothing needs it.
  State* state;
  Strides state_strides;
  bool write_state;
  const void* weight;
  const void* bias;  // may be null
  ElementType weight_type;
  const State* folded;  // null when the blocks fold for themselves
};

// Fills in all but the groups and images of a launch, and the folded weights.
template <typename Element, typename Plan>
void set_problem(SolveArguments<Element, Plan>& args, const SolveProblem& problem, const Plan& plan) {
  using State = typename StateOf<Element>::Type;
  args.shape = problem.shape;
  args.plan = plan;
  args.input = static_cast<const Element*>(problem.input);
  args.input_strides = problem.input_strides;
  args.output = static_cast<Element*>(problem.output);
  args.output_strides = problem.output_strides;
  if constexpr (sizeof(Element) == sizeof(State)) {
    args.state = args.output;
    args.state_strides = problem.output_strides;
  } else {
    args.state = static_cast<State*>(problem.state);
    args.state_strides = contiguous_strides(problem.shape);
    args.write_state = args.state != nullptr;
  }
  args.weight = problem.weight;
  args.bias = problem.bias;
  args.weight_type = problem.weight_type;
}

// The group that a block solves, and how its images are mirrored.
struct BlockGroup {
  int64_t number;
  int order;
  int flips;
};

template <typename Arguments>
__device__ BlockGroup block_group(const Arguments& args) {
  const int order = args.orders[blockIdx.y];
  return {args.first_group + blockIdx.y, order, solved_order(order, args.shape.transposed)};
}

template <typename T, typename Arguments>
__device__ ImageView<T> image_view(T* tensor, const Strides& strides, const Arguments& args, const BlockGroup& group) {
  return {tensor, strides, args.shape, group.number, group.flips};
}

template <typename Arguments>
__device__ WeightView group_weight(const Arguments& args, const BlockGroup& group) {
  return weight_view(args.shape, args.weight, args.weight_type, group.number, group.order);
}

// Zeros where there is no bias. The caller puts a barrier behind it.
template <typename State, typename Arguments>
__device__ void load_bias(const Arguments& args, const BlockGroup& group, int channels, State* bias) {
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    bias[c] =
        args.bias == nullptr ? State(0) : load_element<State>(args.bias, group.number * channels + c, args.weight_type);
  }
}

// The part of the images that a block owns, in mirrored coordinates.
struct Tile {
  int64_t first_image;
  int64_t first_row;
  int64_t first_column;
  int images;
  int rows;
  int columns;
};

__device__ inline int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// The block's share of whole images.
template <typename Arguments>
__device__ Tile whole_images(const Arguments& args) {
  Tile tile{};
  tile.first_image = args.first_image + static_cast<int64_t>(blockIdx.x) * args.plan.images;
  tile.images = smaller(args.plan.images, args.shape.batch - tile.first_image);
  tile.rows = static_cast<int>(args.shape.height);
  tile.columns = static_cast<int>(args.shape.width);
  return tile;
}

// One pack of channels of one pixel of the tile, of all that there are in the order of memory: neighbours are columns
// if the rows are contiguous, channels in channels_last images.
struct TilePack {
  int image;
  int row;
  int column;
  int pack;

  __device__ TilePack(const Tile& tile, int packs, const Strides& strides, int item) {
    const int pixels = tile.rows * tile.columns;
    const bool channels_first = strides.channel == 1 && packs > 1;
    image = item / (packs * pixels);
    const int rest = item - image * packs * pixels;
    pack = channels_first ? rest % packs : rest / pixels;
    const int pixel = channels_first ? rest / packs : rest % pixels;
    row = pixel / tile.columns;
    column = pixel - row * tile.columns;
  }
};

// Calls body(image, row, column, pack) for every pack of channels of every pixel of the tile.
template <typename Body>
__device__ void for_each_pack(const Tile& tile, int packs, const Strides& strides, Body body) {
  for (int item = threadIdx.x; item < tile.images * packs * tile.rows * tile.columns; item += blockDim.x) {
    const TilePack at(tile, packs, strides, item);
    body(at.image, at.row, at.column, at.pack);
  }
}

// Writes packs of channels of a group's pixels, rounded to the output and, where it is wanted, as they are.
template <typename Arguments>
struct PixelStore {
  using State = typename Arguments::State;

  const Arguments& args;
  BlockGroup group;
  ImageView<typename Arguments::Image> output;

  __device__ PixelStore(const Arguments& arguments, const BlockGroup& stored_group)
      : args(arguments),
        group(stored_group),
        output(image_view(arguments.output, arguments.output_strides, arguments, stored_group)) {}

  template <int kPack>
  __device__ void operator()(int64_t image, int64_t row, int64_t column, int pack,
                             const Pack<State, kPack>& packed) const {
    const int channels = static_cast<int>(args.shape.channels);
    auto* rounded = output.pixel(image, row, column);
    INVERSE_FLOW_UNROLL
    for (int u = 0; u < kPack; ++u) {
      const int c = pack * kPack + u;
      if (c < channels) from_state(packed.value[u], rounded[c * args.output_strides.channel]);
    }
    if (args.write_state) {
      const auto state = image_view(args.state, args.state_strides, args, group);
      State* exact = state.pixel(image, row, column);
      INVERSE_FLOW_UNROLL
      for (int u = 0; u < kPack; ++u) {
        const int c = pack * kPack + u;
        if (c < channels) exact[c * args.state_strides.channel] = packed.value[u];
      }
    }
  }
};

}  // namespace inverse_flow
