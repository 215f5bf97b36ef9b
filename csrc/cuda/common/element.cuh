// Element types of images and weights, and their conversion to and from the state type: float for float, bfloat16
// and float16 images, double for double.
#pragma once

#include "device.cuh"
#include "element_type.h"

namespace inverse_flow {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <typename Element>
struct StateOf {
  using Type = float;
};
template <>
struct StateOf<double> {
  using Type = double;
};

__device__ inline float to_state(float value) { return value; }
__device__ inline double to_state(double value) { return value; }
__device__ inline float to_state(Half value) { return half_bits_to_float(value.bits); }
__device__ inline float to_state(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

__device__ inline void from_state(float value, float& out) { out = value; }
__device__ inline void from_state(double value, double& out) { out = value; }
__device__ inline void from_state(float value, Half& out) { out.bits = float_to_half_bits(value); }
__device__ inline void from_state(float value, BFloat16& out) {
  const uint32_t bits = float_bits(value);
  // Round to nearest, ties to even; a NaN must not be carried over into infinity.
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Types known only at run time: for weights, biases and gradients, whose traffic is small.
template <typename State>
__device__ inline State load_element(const void* data, int64_t index, ElementType type) {
  switch (type) {
    case ElementType::kFloat:
      return static_cast<State>(static_cast<const float*>(data)[index]);
    case ElementType::kDouble:
      return static_cast<State>(static_cast<const double*>(data)[index]);
    case ElementType::kBFloat16:
      return static_cast<State>(to_state(static_cast<const BFloat16*>(data)[index]));
    default:
      return static_cast<State>(to_state(static_cast<const Half*>(data)[index]));
  }
}

// Calls body with the typed pointer: the choice stands outside of a loop over the elements, so that their loads do not
// wait for each other. Elements of a problem whose state is of type State: double has no other, and no other has
// double.
template <typename State, typename Body>
__device__ void with_elements(const void* data, ElementType type, Body body) {
  if constexpr (sizeof(State) == sizeof(double)) {
    body(static_cast<const double*>(data));
  } else {
    switch (type) {
      case ElementType::kBFloat16:
        return body(static_cast<const BFloat16*>(data));
      case ElementType::kHalf:
        return body(static_cast<const Half*>(data));
      default:
        return body(static_cast<const float*>(data));
    }
  }
}

// The same for elements of any type.
template <typename Body>
__device__ void with_elements(const void* data, ElementType type, Body body) {
  if (type == ElementType::kDouble) return with_elements<double>(data, type, body);
  with_elements<float>(data, type, body);
}

template <typename State>
__device__ inline void store_element(void* data, int64_t index, ElementType type, State value) {
  switch (type) {
    case ElementType::kFloat:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case ElementType::kDouble:
      static_cast<double*>(data)[index] = static_cast<double>(value);
      break;
    case ElementType::kBFloat16:
      from_state(static_cast<float>(value), static_cast<BFloat16*>(data)[index]);
      break;
    default:
      from_state(static_cast<float>(value), static_cast<Half*>(data)[index]);
  }
}

}  // namespace inverse_flow
