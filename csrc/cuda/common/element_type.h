// The element types of images and weights, on both sides of the launch.
#pragma once

#include <cstdint>

namespace inverse_flow {

enum class ElementType : int32_t { kFloat, kDouble, kBFloat16, kHalf };

constexpr int64_t element_bytes(ElementType type) {
  return type == ElementType::kDouble ? 8 : type == ElementType::kFloat ? 4 : 2;
}

}  // namespace inverse_flow
