// Argument checks shared by the backends, and the translation from tensors to the plain structs of params.h.
// When one fails, the Python layer looks again and gives the friendlier error (src/inverse_flow/ops/checks.py).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace inverse_flow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Images are read and written in their own type; the recurrence runs in this one.
inline ScalarType state_type(ScalarType io) {
  return io == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_types(const Tensor& image, const Tensor& weight) {
  const ScalarType io = image.scalar_type();
  STD_TORCH_CHECK(
      io == ScalarType::Float || io == ScalarType::Double || io == ScalarType::BFloat16 || io == ScalarType::Half,
      "inverse_flow: images must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(weight.scalar_type() == io || weight.scalar_type() == state_type(io),
                  "inverse_flow: the weight must have the images' dtype, or float32 beside half-precision images");
}

inline Strides strides_of(const Tensor& image) {
  const auto strides = image.strides();
  return strides.size() == 5 ? Strides{strides[0], strides[1], strides[2], strides[3], strides[4]}
                             : Strides{strides[0], strides[1], 0, strides[2], strides[3]};
}

inline void check_same_images(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == b.dim() && a.scalar_type() == b.scalar_type(),
                  "inverse_flow: grad_output and output must agree in shape and dtype");
  for (int64_t d = 0; d < a.dim(); ++d) {
    STD_TORCH_CHECK(a.size(d) == b.size(d), "inverse_flow: grad_output and output must agree in shape");
  }
}

// Sizes as a tuple.
template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(size);
  return text + ")";
}

inline Shape check_problem(const Tensor& image, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::vector<int64_t>& orders, int64_t corner, bool transposed) {
  // Each question to a tensor is a call across the stable ABI: ask once.
  const auto size = image.sizes();
  const auto weight_size = weight.sizes();
  const size_t dims = size.size();
  const bool is_volume = dims == 5;
  STD_TORCH_CHECK(dims == 4 || is_volume, "inverse_flow: images must be (B, C, H, W), volumes (B, C, D, H, W), got ",
                  dims, " dimensions");
  check_types(image, weight);
  const int64_t channels = size[1];
  const int64_t groups = static_cast<int64_t>(orders.size());
  STD_TORCH_CHECK(groups >= 1 && channels >= 1 && channels % groups == 0, "inverse_flow: ", channels,
                  " channels do not divide into ", groups, " groups (one per entry of orders)");
  bool fits = weight_size.size() == dims && weight_size[0] == channels && weight_size[1] == channels / groups;
  bool has_pixels = true;
  for (size_t d = 2; d < dims; ++d) {
    fits = fits && weight_size[d] >= 1;
    has_pixels = has_pixels && size[d] >= 1;
  }
  STD_TORCH_CHECK(fits, "inverse_flow: the weight must be (", channels, ", ", channels / groups,
                  is_volume ? ", kD, kH, kW), got " : ", kH, kW), got ", text_of(weight_size));
  STD_TORCH_CHECK(has_pixels, "inverse_flow: images must have at least one pixel, got ", text_of(size));
  STD_TORCH_CHECK(corner >= kIdentity && corner <= kGeneral, "inverse_flow: corner must be 0, 1 or 2, got ", corner);
  const int64_t last_order = is_volume ? kOppositeCorner : kMirrorColumns | kMirrorRows;
  for (const int64_t order : orders) {
    STD_TORCH_CHECK(order >= 0 && order <= last_order, "inverse_flow: an order must be 0 to ", last_order, ", got ",
                    order);
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels && bias->scalar_type() == weight.scalar_type(),
                    "inverse_flow: the bias must be (", channels, ",) and of the weight's dtype");
  }
  return {size[0],
          groups,
          channels / groups,
          is_volume ? size[2] : 1,
          size[dims - 2],
          size[dims - 1],
          is_volume ? weight_size[2] : 1,
          weight_size[dims - 2],
          weight_size[dims - 1],
          static_cast<Corner>(corner),
          transposed};
}

}  // namespace inverse_flow
