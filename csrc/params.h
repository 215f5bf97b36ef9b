// Plain description of one solve, shared by every backend. No torch, no CUDA: the kernels, the emulator
// and the tests can all include it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace inverse_flow {

// The corner of the image that a group pads, and recurs, from. Bit 0 mirrors the columns, bit 1 the rows, bit 2 the
// planes of a volume, so every order is the top-left recurrence on a mirrored image, and the transposed solve of an
// order is the solve from the opposite corner (order ^ kOppositeCorner). Mirroring the only plane of an image changes
// nothing.
constexpr int32_t kMirrorColumns = 1;
constexpr int32_t kMirrorRows = 2;
constexpr int32_t kMirrorPlanes = 4;
constexpr int32_t kOppositeCorner = kMirrorColumns | kMirrorRows | kMirrorPlanes;

// What is read of the corner tap M, the one that meets the output pixel itself.
enum Corner : int32_t {
  kIdentity = 0,        // nothing: M = I
  kUnitTriangular = 1,  // the strictly lower part: M = I + strict_lower(w)
  kGeneral = 2,         // all of it; must be invertible
};

// x = A(w)^-1 (y - bias), or A(w)^-T (y - bias) when `transposed`. An image is a volume of one plane.
struct Shape {
  int64_t batch;
  int64_t groups;
  int64_t channels;  // per group
  int64_t depth;
  int64_t height;
  int64_t width;
  int64_t kernel_d;
  int64_t kernel_h;
  int64_t kernel_w;
  Corner corner;
  bool transposed;

  int64_t pixels() const { return depth * height * width; }
  int64_t taps() const { return kernel_d * kernel_h * kernel_w; }
};

// Element strides of a tensor of images or volumes.
struct Strides {
  int64_t batch;
  int64_t channel;
  int64_t plane;
  int64_t row;
  int64_t column;
};

// The corner that a solve recurs from: a transposed one starts from the opposite corner.
INVERSE_FLOW_HOST_DEVICE constexpr int32_t solved_order(int32_t order, bool transposed) {
  return transposed ? order ^ kOppositeCorner : order;
}

// Row of a window of the tap that reaches p rows away from the output pixel, in a group of the given order; likewise
// planes and columns. Each is its own inverse. (0, 0, 0) is the corner tap.
template <typename Index>
INVERSE_FLOW_HOST_DEVICE constexpr Index tap_plane(Index kernel_d, int32_t order, Index a) {
  return (order & kMirrorPlanes) ? a : kernel_d - 1 - a;
}
template <typename Index>
INVERSE_FLOW_HOST_DEVICE constexpr Index tap_row(Index kernel_h, int32_t order, Index p) {
  return (order & kMirrorRows) ? p : kernel_h - 1 - p;
}
template <typename Index>
INVERSE_FLOW_HOST_DEVICE constexpr Index tap_column(Index kernel_w, int32_t order, Index q) {
  return (order & kMirrorColumns) ? q : kernel_w - 1 - q;
}

// Offset, inside one channel pair's window, of that tap.
INVERSE_FLOW_HOST_DEVICE inline int64_t tap_offset(const Shape& shape, int32_t order, int64_t a, int64_t p, int64_t q) {
  return (tap_plane(shape.kernel_d, order, a) * shape.kernel_h + tap_row(shape.kernel_h, order, p)) * shape.kernel_w +
         tap_column(shape.kernel_w, order, q);
}

}  // namespace inverse_flow
