// New tensors, and contiguous ones, for both backends. What torch::stable has for this looks up an operator by its name
// and boxes its arguments, which takes as long as all checks of a small solve together.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"

namespace inverse_flow {

// Where a new tensor fails: the only reason there is, and more than reaches the caller from PyTorch.
template <class Sizes>
[[noreturn]] void no_room(const Sizes& sizes, ScalarType type) {
  int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes) bytes *= size;
  throw std::runtime_error("out of memory: no room for a tensor of " + std::to_string(bytes) + " bytes");
}

// Uninitialized, on the device of `like`; `sizes` and `strides` of the same length.
template <class Sizes, class NewStrides>
Tensor new_strided(const Tensor& like, const Sizes& sizes, const NewStrides& strides, ScalarType type) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError failed =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, device_type,
                               like.get_device_index(), &handle);
  if (failed) no_room(sizes, type);
  return Tensor(handle);
}

// Uninitialized and contiguous, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return new_strided(like, sizes, strides, type);
}

// Whether the image's elements lie side by side in some order of its dimensions.
template <class Sizes, class OfSizes>
bool is_dense(const Sizes& sizes, const OfSizes& strides) {
  int64_t expected = 1;
  size_t left = 0;
  for (const int64_t size : sizes) left += size > 1;
  for (bool found = true; left > 0 && found; left -= found) {
    found = false;
    for (size_t d = 0; d < sizes.size() && !found; ++d) {
      if (sizes[d] <= 1 || strides[d] != expected) continue;
      expected *= sizes[d];
      found = true;
    }
  }
  return left == 0;
}

// As torch.empty_like of an image: the memory format is kept.
inline Tensor new_image_like(const Tensor& image) {
  const auto sizes = image.sizes();
  const auto strides = image.strides();
  if (is_dense(sizes, strides)) return new_strided(image, sizes, strides, image.scalar_type());
  try {
    return torch::stable::empty_like(image);
  } catch (const std::runtime_error&) {
    no_room(sizes, image.scalar_type());
  }
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace inverse_flow
