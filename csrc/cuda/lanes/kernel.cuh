// The regime "lanes": the solve of few channels per group. A warp sweeps a band of rows, a few lanes on each row,
// without a barrier per step.
//
//   fold     every block makes the folded weights in shared memory.
//   prepare  z_p = M^-1 (y_p - bias) of the block's pixels, into shared memory; a thread owns a pixel, or, where the
//            tensor allows 16 bytes of a row to move at once, four of them.
//   margin   of an image of several tiles: the solved rows above and columns to the left, from global memory.
//   sweep    the lanes of a row own its output channels and keep their weights in registers. At step s row r is at
//            column s - r, so what it needs of the row above was solved a step ago. A pixel is added, as soon as it is
//            known, to the sums of all columns that it reaches: a lane keeps kTaps of them an output. Rows further up
//            are ahead, so of those it takes the next column's pixel: only the left neighbour and the row above are
//            waited for. x overwrites z. One lane per row: the left neighbour is in its registers, the row above comes
//            by shuffle, and of the rows further up the lane above had it; the first row of a band reads them from
//            shared memory.
//            A warp that has swept its band goes on with one further down, if there are more bands than warps.
//            Several lanes per row: they read all neighbours from shared memory, 16 bytes at a time.
//   store    a thread owns a pixel, or four, again.
// Shared memory: [folded weights: tap, input channel, output channel] [bias] [a pixel of zeros] [image, row, column,
// channel], with the margin's rows and columns in front.
// Barriers: after the fold (its scratch lies where z will), after prepare, after the sweep; if an image has several
// bands, after each phase of kPhase steps: the band below reads rows that the phase wrote; and of several lanes per row
// those of a warp before each step: it reads what the step before wrote.
// Blocks of one image wait for each other's tiles: a block takes a ticket, tickets follow the anti-diagonals of tiles,
// so a tile that is waited for is one that a running block already has. Flags say which tiles are in global memory.
// Bytes: y in and x out once. A step of a warp: (kTaps^2 - 1) x kChannels multiply-adds per output of a lane, and a
// store; one lane per row: kTaps loads and (kTaps - 1) x kChannels shuffles; several: a load, and kTaps for every 4
// channels of a pixel.
#pragma once

#include <type_traits>

#include "../common/solve.cuh"
#include "plan.h"

namespace inverse_flow {

template <typename Element>
struct LanesArguments : SolveArguments<Element, LanesPlan> {
  int32_t* progress;  // of images of several tiles, a group: the next ticket, then a flag for every tile of every image
  Access input_access;
  Access output_access;
};

// What one kernel is compiled for.
template <int channels, int taps>
struct LanesShape {
  static constexpr int kChannels = channels;
  static constexpr int kTaps = taps;
  static constexpr int kLanes = lanes_of_pixel(channels);
  static constexpr int kOutputs = outputs_of_lane(channels);
  static constexpr int kPitch = pitch_of_pixel(channels);
  static constexpr int kPhase = steps_of_phase(channels);
  // Blocks that a multiprocessor's registers hold: two hide each other's waits, and three where a lane has few weights;
  // but 24 taps of two channels, or more than 8 channels, leave no room for them.
  static constexpr int blocks() {
    if (kLanes == 1 && taps * taps * channels * channels <= 36) return 3;
    return kLanes <= 8 && taps <= 3 ? 2 : 1;
  }
};

// The block's tile, and whether solved pixels lie above it and to its left.
struct LanesTile {
  Tile tile;
  int above;  // rows of margin: 0 at the edge of the image
  int left;   // columns of margin
};

template <typename Element>
__device__ int32_t* block_progress(const LanesArguments<Element>& args) {
  const int64_t flags = args.shape.batch * args.plan.tiles();
  return args.progress + (args.first_group + blockIdx.y) * (1 + flags);
}

// Tickets count the tiles of all images, one anti-diagonal after the other.
template <typename Element>
__device__ LanesTile claim_tile(const LanesArguments<Element>& args, int32_t* shared_ticket) {
  const Shape& shape = args.shape;
  const LanesPlan& plan = args.plan;
  LanesTile claimed{};
  if (plan.single_tile()) {
    claimed.tile = whole_images(args);
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
  claimed.above = tile_row > 0 ? plan.margin_h : 0;
  claimed.left = tile_column > 0 ? plan.margin_w : 0;
  return claimed;
}

// Made anew where it is needed: kept, it would cost two registers all the while.
template <typename Element>
__device__ int32_t* flag_of_tile(const LanesArguments<Element>& args, const Tile& tile) {
  const LanesPlan& plan = args.plan;
  const int64_t number = tile.first_row / plan.tile_h * plan.tiles_w + tile.first_column / plan.tile_w;
  return block_progress(args) + 1 + tile.first_image * plan.tiles() + number;
}

// Returns when the tiles above and to the left are in global memory, and so those that they waited for.
template <typename Element>
__device__ void wait_for_neighbours(const LanesArguments<Element>& args, const LanesTile& claimed) {
  const LanesPlan& plan = args.plan;
  if (threadIdx.x == 0) {
    const int32_t* done = flag_of_tile(args, claimed.tile);
    if (claimed.above > 0) wait_for_flag(done - plan.tiles_w);
    if (claimed.left > 0) wait_for_flag(done - 1);
  }
  __syncthreads();  // all threads may read what the flags stand for
}

// Where pixel (row, column) of the tile lies in shared memory; the margin has negative rows and columns.
__device__ inline int place_in_tile(const LanesPlan& plan, const LanesTile& claimed, int image, int row, int column) {
  return (image * (plan.tile_h + plan.margin_h) + plan.margin_h + row) * plan.row_stride + claimed.left + column;
}

// The channels of a pixel move in packs of 16 bytes at most.
template <typename S>
__device__ void write_pixel(float* pixel, const float (&values)[S::kChannels]) {
  constexpr int kPack = S::kPitch < 4 ? S::kPitch : 4;
  INVERSE_FLOW_UNROLL
  for (int first = 0; first < S::kPitch; first += kPack) {
    Pack<float, kPack> packed;
    INVERSE_FLOW_UNROLL
    for (int c = 0; c < kPack; ++c) packed.value[c] = first + c < S::kChannels ? values[first + c] : 0.0f;
    *reinterpret_cast<Pack<float, kPack>*>(pixel + first) = packed;
  }
}

template <typename S>
__device__ void read_pixel(const float* pixel, float (&values)[S::kChannels]) {
  constexpr int kPack = S::kPitch < 4 ? S::kPitch : 4;
  INVERSE_FLOW_UNROLL
  for (int first = 0; first < S::kPitch; first += kPack) {
    const auto packed = *reinterpret_cast<const Pack<float, kPack>*>(pixel + first);
    INVERSE_FLOW_UNROLL
    for (int c = first; c < S::kChannels && c < first + kPack; ++c) values[c] = packed.value[c - first];
  }
}

// Column c of M^-1 from the folded weights, which begin with it.
template <typename S>
__device__ void read_column(const float* weights, int c, float (&column)[S::kChannels]) {
  constexpr int kPack = S::kChannels % 4 == 0 ? 4 : 1;
  INVERSE_FLOW_UNROLL
  for (int first = 0; first < S::kChannels; first += kPack) {
    const auto packed = *reinterpret_cast<const Pack<float, kPack>*>(weights + c * S::kChannels + first);
    INVERSE_FLOW_UNROLL
    for (int k = 0; k < kPack; ++k) column[first + k] = packed.value[k];
  }
}

// A thread moves kPixels neighbours of a row between global and shared memory: one access per channel there (of a
// single pixel also one of several channels), one per pixel and 16 bytes here. Lanes write, or read, their pixels in
// different orders, so that they meet different banks.
//                 lane      0             1             2             3        (3 or 4 channels: 16 bytes per pixel,
//   access 0, pixel     0   .   .   .  4   .   .   .   .  9   .   .   .  13 ..   8 of them are all banks)
//   access 1, pixel     .   1   .   .  .   5   .   .   8   .  .   .   12 ..
// With one channel or two, as many more lanes have the same order; with 5 to 8 two lanes share a bank.
template <typename S, int kPixels>
struct RowPart {
  int turn;    // access j is to pixel j ^ turn of the part
  int mirror;  // which is pixel j ^ turn ^ mirror in global memory

  __device__ explicit RowPart(int flips)
      : turn(static_cast<int>(threadIdx.x) * S::kPitch / (kWarp / kPixels) % kPixels),
        mirror(flips & kMirrorColumns ? kPixels - 1 : 0) {}

  // values[j] <-> values[j ^ turn ^ mirror], by exchanges of neighbours and of pairs: no index is known at run time
  // only.
  __device__ void reorder(float (&values)[kPixels]) const {
    INVERSE_FLOW_UNROLL
    for (int bit = 1; bit < kPixels; bit *= 2) {
      const bool exchanges = ((turn ^ mirror) & bit) != 0;
      INVERSE_FLOW_UNROLL
      for (int j = 0; j < kPixels; ++j) {
        if ((j & bit) == 0) {
          const float low = values[j];
          values[j] = exchanges ? values[j | bit] : low;
          values[j | bit] = exchanges ? low : values[j | bit];
        }
      }
    }
  }
};

// Of a tile's pixels in parts of kPixels: one of them.
struct PartPlace {
  int image;
  int row;
  int column;

  __device__ PartPlace(const Tile& tile, int pixels, unsigned part) {
    const unsigned parts = static_cast<unsigned>(tile.columns / pixels);
    const unsigned line = part / parts;
    column = static_cast<int>(part - line * parts) * pixels;
    image = static_cast<int>(line / static_cast<unsigned>(tile.rows));
    row = static_cast<int>(line) - image * tile.rows;
  }

  // Where it begins in the memory of the tensor: mirrored columns are those before.
  template <typename T>
  __device__ T* in(const ImageView<T>& view, const Tile& tile, int mirror) const {
    return view.pixel(tile.first_image + image, tile.first_row + row, tile.first_column + column) - mirror;
  }
};

__device__ inline unsigned parts_of_tile(const Tile& tile, int pixels) {
  return static_cast<unsigned>(tile.images * tile.rows) * static_cast<unsigned>(tile.columns / pixels);
}

// Calls body with the access as a constant. A pixel's channels are accessed together only if that leaves none over.
template <typename S, typename Body>
__device__ void with_access(Access access, Body body) {
  if (access == Access::kPixels) {
    body(std::integral_constant<Access, Access::kPixels>());
    return;
  }
  if constexpr (S::kChannels % kAccessWidth == 0) {
    if (access == Access::kChannels) {
      body(std::integral_constant<Access, Access::kChannels>());
      return;
    }
  }
  body(std::integral_constant<Access, Access::kValue>());
}

template <typename S, Access kAccess, typename Element>
__device__ void prepare_lanes(const LanesArguments<Element>& args, const LanesTile& claimed, const BlockGroup& group,
                              const float* weights, const float* bias, float* x) {
  constexpr int kChannels = S::kChannels;
  constexpr int kPixels = pixels_of(kAccess);
  constexpr int kTogether = channels_of(kAccess);
  using Accessed = Pack<Element, kPixels * kTogether>;
  // Parts whose loads are under way before the first is used.
  constexpr int kInFlight = kChannels * kPixels <= 4 ? 4 : kChannels * kPixels <= 16 ? 2 : 1;
  const auto input = image_view(args.input, args.input_strides, args, group);
  const RowPart<S, kPixels> part(group.flips);
  const bool is_identity = args.shape.corner == kIdentity;
  // M^-1 stays in registers where they hold it beside all else.
  constexpr bool kKept = kChannels <= 4;
  float inverse[kKept ? kChannels : 1][kChannels];
  INVERSE_FLOW_UNROLL
  for (int c = 0; kKept && c < kChannels; ++c) read_column<S>(weights, c, inverse[c]);
  const Tile& tile = claimed.tile;
  const unsigned parts = parts_of_tile(tile, kPixels);
  for (unsigned first = threadIdx.x; first < parts; first += kInFlight * blockDim.x) {
    Accessed y[kInFlight][kChannels / kTogether];
    int place[kInFlight];
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned item = first + static_cast<unsigned>(i) * blockDim.x;
      place[i] = -1;
      if (item < parts) {
        const PartPlace at(tile, kPixels, item);
        const Element* const from = at.in(input, tile, part.mirror);
        INVERSE_FLOW_UNROLL
        for (int c = 0; c < kChannels; c += kTogether) {
          y[i][c / kTogether] = *reinterpret_cast<const Accessed*>(from + c * args.input_strides.channel);
        }
        place[i] = place_in_tile(args.plan, claimed, at.image, at.row, at.column);
      }
    }
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (place[i] < 0) break;
      float z[kPixels][kChannels] = {};
      // Calls use(c, y - bias of this channel) for all channels.
      const auto for_channels = [&](auto use) {
        INVERSE_FLOW_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          const float shift = bias[c];
          float right[kPixels];
          INVERSE_FLOW_UNROLL
          for (int j = 0; j < kPixels; ++j) {
            right[j] = to_state(y[i][c / kTogether].value[c % kTogether + j]) - shift;
          }
          part.reorder(right);
          use(c, right);
        }
      };
      if (is_identity) {  // a product with its zeros would be NaN where y is infinite
        for_channels([&](int c, const float (&right)[kPixels]) {
          INVERSE_FLOW_UNROLL
          for (int j = 0; j < kPixels; ++j) z[j][c] = right[j];
        });
      } else {
        for_channels([&](int c, const float (&right)[kPixels]) {
          float (&column)[kChannels] = inverse[kKept ? c : 0];
          if (!kKept) read_column<S>(weights, c, column);
          INVERSE_FLOW_UNROLL
          for (int j = 0; j < kPixels; ++j) {
            INVERSE_FLOW_UNROLL
            for (int o = 0; o < kChannels; ++o) z[j][o] += column[o] * right[j];
          }
        });
      }
      INVERSE_FLOW_UNROLL
      for (int j = 0; j < kPixels; ++j) write_pixel<S>(x + (place[i] + (j ^ part.turn)) * S::kPitch, z[j]);
    }
  }
}

template <typename S, typename Element>
__device__ void load_margin(const LanesArguments<Element>& args, const LanesTile& claimed, const BlockGroup& group,
                            float* x) {
  const auto solved = image_view<const float>(args.state, args.state_strides, args, group);
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
    write_pixel<S>(x + place_in_tile(args.plan, claimed, 0, row, column) * S::kPitch, values);
  }
}

// What a lane keeps while it sweeps: its weights, its place in the band, and what it knows of the pixels around.
template <typename S>
class LaneSweep {
 public:
  __device__ LaneSweep(const LanesPlan& plan, const LanesTile& claimed, const float* weights, const float* zeros)
      : zeros_(zeros), left_margin_(claimed.left) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int part = lane % kLanes;
    const bool has_outputs = part * kOutputs < S::kPitch;
    first_output_ = has_outputs ? part * kOutputs : 0;
    const int slot = lane / kLanes;
    // A warp holds a band of one image, or several whole images.
    const int image_of_warp = plan.bands > 1 ? 0 : slot / plan.tile_h;
    image_ = warp / plan.band_warps * plan.images_per_warp + image_of_warp;
    skew_ = slot - image_of_warp * plan.tile_h;
    has_image_ = warp < plan.sweep_warps && image_of_warp < plan.images_per_warp && image_ < claimed.tile.images &&
                 skew_ < plan.rows && has_outputs;
    // Which lanes read the rows above them from shared memory: those of several a pixel, and of the others those of the
    // first row of a warp or an image, which have nobody to shuffle from. Above the image is nothing; above the first
    // row of a warp there are all rows that the taps reach, or none.
    reads_above_ = kLanes > 1 || skew_ == 0;
    INVERSE_FLOW_UNROLL
    for (int tap = 1; tap < kTaps * kTaps; ++tap) {
      INVERSE_FLOW_UNROLL
      for (int k = 0; k < kOutputs; ++k) {
        const int o = part * kOutputs + k;
        INVERSE_FLOW_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          weight_[tap][k][c] = o < kChannels ? -weights[(tap * kChannels + c) * kChannels + o] : 0.0f;
        }
      }
    }
  }

  // Goes to the row of this lane in another band, left of the image, where all is zero.
  __device__ void start_band(const LanesPlan& plan, const LanesTile& claimed, int band, float* x) {
    const int row = band * plan.rows + skew_;
    const bool has_row = has_image_ && row < claimed.tile.rows;
    columns_ = has_row ? static_cast<unsigned>(claimed.left + claimed.tile.columns) : 0;
    rows_above_ = reads_above_ ? row + claimed.above : 0;
    column_ = -skew_;
    float* const line = x + (place_in_tile(plan, claimed, image_, row, -claimed.left) + column_) * S::kPitch;
    behind_ = zeros_;
    here_ = line + first_output_;
    const int row_floats = plan.row_stride * S::kPitch;
    INVERSE_FLOW_UNROLL
    for (int a = 1; a < kTaps; ++a) over_[a - 1] = line - a * row_floats;
    INVERSE_FLOW_UNROLL
    for (int k = 0; k < kOutputs; ++k) solved_[k] = 0;
    INVERSE_FLOW_UNROLL
    for (int a = 0; a < kTaps - 1; ++a) {
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < kChannels; ++c) above_[a][c] = 0;
    }
    INVERSE_FLOW_UNROLL
    for (int b = 0; b < kTaps; ++b) {
      INVERSE_FLOW_UNROLL
      for (int k = 0; k < kOutputs; ++k) sums_[b][k] = 0;
    }
    // The first row begins in the image at once, and has not looked ahead.
    INVERSE_FLOW_UNROLL
    for (int a = 2; a < kTaps; ++a) {
      const bool is_there = column_ >= 0 && has_row && rows_above_ >= rows_needed(a);
      read_pixel<S>(is_there ? over_[a - 1] : zeros_, above_[a - 1]);
      INVERSE_FLOW_UNROLL
      for (int k = 0; k < kOutputs; ++k) {
        INVERSE_FLOW_UNROLL
        for (int b = 0; b < kTaps; ++b) sums_[b][k] += times(weight_[a * kTaps + b][k], above_[a - 1]);
      }
    }
  }

  // Solves a pixel, and goes on to the next.
  __device__ void step() {
    const bool is_inside = static_cast<unsigned>(column_) < columns_;
    float left[kChannels];
    look_around(is_inside, left);
    solve_pixel(is_inside, left);
    carry_sums(left);
    ++column_;
    here_ += S::kPitch;
    INVERSE_FLOW_UNROLL
    for (int a = 1; a < kTaps; ++a) over_[a - 1] += S::kPitch;
  }

 private:
  static constexpr int kChannels = S::kChannels;
  static constexpr int kTaps = S::kTaps;
  static constexpr int kOutputs = S::kOutputs;
  static constexpr int kLanes = S::kLanes;
  using OutputPack = Pack<float, kOutputs>;

  // Rows above that the pixel a rows up takes: a lane that has nobody to shuffle from has all that the taps reach, or
  // none.
  static INVERSE_FLOW_HOST_DEVICE constexpr int rows_needed(int a) { return kLanes == 1 ? kTaps - 1 : a; }

  static __device__ float times(const float (&weights)[kChannels], const float (&pixel)[kChannels]) {
    float sum = 0;
    INVERSE_FLOW_UNROLL
    for (int c = 0; c < kChannels; ++c) sum += weights[c] * pixel[c];
    return sum;
  }

  // Fetches the left neighbour, the pixel above, and of the rows further up, which are ahead, those of the next column.
  __device__ void look_around(bool is_inside, float (&left)[kChannels]) {
    if constexpr (kLanes == 1) {
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < kChannels; ++c) left[c] = solved_[c];
    } else {
      __syncwarp();  // all lanes of a pixel have written the step before
      read_pixel<S>(behind_, left);
    }
    const bool next_is_inside = static_cast<unsigned>(column_ + 1) < columns_;
    // From the third row up each takes what the row above it had, the farthest first; then come the first row and the
    // second, which takes what the row above it has now.
    constexpr int kFar = kTaps > 3 ? kTaps - 3 : 0;
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kTaps - 1; ++i) {
      const int a = i < kFar ? kTaps - 1 - i : i - kFar + 1;
      if constexpr (kLanes == 1) {
        INVERSE_FLOW_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          above_[a - 1][c] = __shfl_up_sync(kFullWarp, a > 1 ? above_[a - 2][c] : solved_[c], kLanes);
        }
      }
      float pixel[kChannels];
      const bool is_there = (a == 1 ? is_inside : next_is_inside) && rows_above_ >= rows_needed(a);
      read_pixel<S>(is_there ? over_[a - 1] + (a == 1 ? 0 : S::kPitch) : zeros_, pixel);
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < kChannels; ++c) above_[a - 1][c] = reads_above_ ? pixel[c] : above_[a - 1][c];
    }
  }

  // What is known longest goes in first; only the left neighbour and the row above are news.
  __device__ void solve_pixel(bool is_inside, const float (&left)[kChannels]) {
    const float* const source = is_inside ? here_ : zeros_ + first_output_;
    const OutputPack z = *reinterpret_cast<const OutputPack*>(source);
    behind_ = source - first_output_;
    INVERSE_FLOW_UNROLL
    for (int k = 0; k < kOutputs; ++k) {
      // Side by side, so that the chain from step to step is short.
      constexpr int kParts = kChannels > 8 ? 4 : 2;
      float parts[kParts] = {sums_[0][k]};
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        parts[c % (kParts / 2)] += weight_[1][k][c] * left[c];
        parts[kParts / 2 + c % (kParts / 2)] += weight_[kTaps][k][c] * above_[0][c];
      }
      INVERSE_FLOW_UNROLL
      for (int half = kParts / 2; half > 0; half /= 2) {
        INVERSE_FLOW_UNROLL
        for (int j = 0; j < half; ++j) parts[j] += parts[j + half];
      }
      // In the margin z is x already. Left of it all is zero; what is right of the image reaches nobody in it.
      solved_[k] = column_ < left_margin_ ? z.value[k] : z.value[k] + parts[0];
    }
    if (is_inside) {
      OutputPack packed;
      INVERSE_FLOW_UNROLL
      for (int k = 0; k < kOutputs; ++k) packed.value[k] = solved_[k];
      *reinterpret_cast<OutputPack*>(here_) = packed;
    }
  }

  // The sums move one column on, and take in what this step brought.
  __device__ void carry_sums(const float (&left)[kChannels]) {
    INVERSE_FLOW_UNROLL
    for (int b = 1; b <= kTaps; ++b) {
      INVERSE_FLOW_UNROLL
      for (int k = 0; k < kOutputs; ++k) {
        float sum = b < kTaps ? sums_[b][k] : 0;
        if (b + 1 < kTaps) {
          INVERSE_FLOW_UNROLL
          for (int c = 0; c < kChannels; ++c) sum += weight_[b + 1][k][c] * left[c];
        }
        if (b < kTaps) {
          INVERSE_FLOW_UNROLL
          for (int c = 0; c < kChannels; ++c) sum += weight_[kTaps + b][k][c] * above_[0][c];
        }
        INVERSE_FLOW_UNROLL
        for (int a = 2; a < kTaps; ++a) {  // the pixel of the next column
          INVERSE_FLOW_UNROLL
          for (int c = 0; c < kChannels; ++c) sum += weight_[a * kTaps + b - 1][k][c] * above_[a - 1][c];
        }
        sums_[b - 1][k] = sum;
      }
    }
  }

  const float* zeros_;
  int left_margin_;
  int image_;
  int skew_;  // the row within the band
  int first_output_;
  bool has_image_;
  bool reads_above_;
  float weight_[kTaps * kTaps][kOutputs][kChannels];  // the corner's is never used

  // Of the band that is swept: of this lane's row, columns of the image (0 without a row) and rows above it.
  unsigned columns_ = 0;
  int rows_above_ = 0;
  // What moves on by a column a step.
  int column_ = 0;
  const float* behind_;  // the pixel of the step before, or zeros outside of the image
  float* here_;
  const float* over_[kTaps - 1];

  float solved_[kOutputs];             // of the step before
  float above_[kTaps - 1][kChannels];  // row r - 1 in this column; r - 2, ... in the next
  float sums_[kTaps][kOutputs];        // of this column and those that follow
};

template <typename S>
__device__ void sweep_lanes(const LanesPlan& plan, const LanesTile& claimed, const float* weights, const float* zeros,
                            float* x) {
  LaneSweep<S> lane(plan, claimed, weights, zeros);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int band = warp % plan.band_warps;
  int phase = -band * plan.lag;  // of the band
  for (int time = 0; time < plan.phases(); ++time) {
    if (phase == 0) lane.start_band(plan, claimed, band, x);
    if (warp < plan.sweep_warps && phase >= 0 && phase < plan.band_phases) {
      INVERSE_FLOW_UNROLL_BY(1)
      for (int step = 0; step < S::kPhase; ++step) lane.step();
    }
    ++phase;
    if (phase == plan.band_phases && band + plan.band_warps < plan.bands) {
      band += plan.band_warps;
      phase -= plan.band_warps * plan.lag;
    }
    if (plan.bands > 1) __syncthreads();  // the band below reads what this phase wrote
  }
}

template <typename S, Access kAccess, typename Element>
__device__ void store_lanes(const LanesArguments<Element>& args, const LanesTile& claimed, const BlockGroup& group,
                            const float* x) {
  constexpr int kPixels = pixels_of(kAccess);
  constexpr int kTogether = channels_of(kAccess);
  using Accessed = Pack<Element, kPixels * kTogether>;
  const auto output = image_view(args.output, args.output_strides, args, group);
  const auto state = image_view(args.state, args.state_strides, args, group);
  const RowPart<S, kPixels> part(group.flips);
  const Tile& tile = claimed.tile;
  const unsigned parts = parts_of_tile(tile, kPixels);
  for (unsigned item = threadIdx.x; item < parts; item += blockDim.x) {
    const PartPlace at(tile, kPixels, item);
    const int place = place_in_tile(args.plan, claimed, at.image, at.row, at.column);
    float values[S::kChannels][kPixels];
    INVERSE_FLOW_UNROLL
    for (int j = 0; j < kPixels; ++j) {
      float pixel[S::kChannels];
      read_pixel<S>(x + (place + (j ^ part.turn)) * S::kPitch, pixel);
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < S::kChannels; ++c) values[c][j] = pixel[c];
    }
    Element* const rounded = at.in(output, tile, part.mirror);
    INVERSE_FLOW_UNROLL
    for (int first = 0; first < S::kChannels; first += kTogether) {
      Accessed packed;
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < kTogether; ++c) {
        part.reorder(values[first + c]);
        INVERSE_FLOW_UNROLL
        for (int j = 0; j < kPixels; ++j) from_state(values[first + c][j], packed.value[c + j]);
      }
      store_pack(reinterpret_cast<Accessed*>(rounded + first * args.output_strides.channel), packed);
    }
    if (args.write_state) {
      float* const exact = at.in(state, tile, part.mirror);
      INVERSE_FLOW_UNROLL
      for (int c = 0; c < S::kChannels; ++c) {
        Pack<float, kPixels> packed;
        INVERSE_FLOW_UNROLL
        for (int j = 0; j < kPixels; ++j) packed.value[j] = values[c][j];
        store_pack(reinterpret_cast<Pack<float, kPixels>*>(exact + c * args.state_strides.channel), packed);
      }
    }
  }
}

// Grid: (blocks of images, or tiles of all images; groups).
template <typename Element, int kChannels, int kTaps>
__global__ void __launch_bounds__(lanes_threads(kChannels), LanesShape<kChannels, kTaps>::blocks())
    lanes_kernel(const __grid_constant__ LanesArguments<Element> args) {
  using S = LanesShape<kChannels, kTaps>;
  const LanesPlan& plan = args.plan;
  const BlockGroup group = block_group(args);

  unsigned char* const shared = dynamic_shared_memory();
  float* const weights = reinterpret_cast<float*>(shared);
  float* const bias = reinterpret_cast<float*>(shared + plan.bias_offset);
  float* const x = reinterpret_cast<float*>(shared + plan.image_offset);
  float* const zeros = reinterpret_cast<float*>(shared + plan.zeros_offset);
  const LanesTile claimed = claim_tile(args, reinterpret_cast<int32_t*>(x));
  if (threadIdx.x < S::kPitch) zeros[threadIdx.x] = 0.0f;
  load_bias(args, group, kChannels, bias);
  // All sizes are constants here, so that no place in memory takes a division.
  WeightView weight = group_weight(args, group);
  weight.channels = kChannels;
  weight.kernel_h = weight.kernel_w = kTaps;
  // Four loads of a thread are the weights of most channels, and what its registers hold.
  fold_in_block<4>(weight, PackedTaps{kTaps, kTaps, kChannels, 1, kChannels}, x, weights);
  __syncthreads();  // weights, bias and zeros are complete, and the fold's scratch is free for z

  with_access<S>(args.input_access,
                 [&](auto access) { prepare_lanes<S, access.value>(args, claimed, group, weights, bias, x); });
  if (claimed.above > 0 || claimed.left > 0) {
    wait_for_neighbours(args, claimed);
    load_margin<S>(args, claimed, group, x);
  }
  __syncthreads();  // z and the margin are complete
  sweep_lanes<S>(plan, claimed, weights, zeros, x);
  __syncthreads();  // x is complete
  // The group is made anew: kept, it would cost registers all through the sweep.
  with_access<S>(args.output_access,
                 [&](auto access) { store_lanes<S, access.value>(args, claimed, block_group(args), x); });
  if (!plan.single_tile()) {
    __syncthreads();  // the whole tile is written before one thread says so
    if (threadIdx.x == 0) store_release(flag_of_tile(args, claimed.tile), 1);
  }
}

}  // namespace inverse_flow
