// Where the pixels of a group stand in a tensor of images, mirrored so that the group's corner is the top left one.
#pragma once

#include "../../params.h"
#include "device.cuh"

namespace inverse_flow {

// In elements, from the tensor's first.
struct MirroredView {
  int64_t base;
  Strides strides;

  __device__ MirroredView(const Strides& tensor_strides, const Shape& shape, int64_t group, int flips)
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

// The same for a tensor of a type known at compile time.
template <typename T>
struct ImageView {
  T* data;
  Strides strides;

  __device__ ImageView(T* tensor, const Strides& tensor_strides, const Shape& shape, int64_t group, int flips)
      : ImageView(tensor, MirroredView(tensor_strides, shape, group, flips)) {}

  __device__ T* pixel(int64_t image, int64_t row, int64_t column) const {
    return data + image * strides.batch + row * strides.row + column * strides.column;
  }

 private:
  __device__ ImageView(T* tensor, const MirroredView& view) : data(tensor + view.base), strides(view.strides) {}
};

}  // namespace inverse_flow
