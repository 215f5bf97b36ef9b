// What the binding hands to a launch: plain data. No torch and no CUDA header on this side.
#pragma once

#include <cstdint>

#include "../../params.h"
#include "element_type.h"

namespace inverse_flow {

// Every launch returns the text of an error, or null.
struct SolveProblem {
  Shape shape;
  const int64_t* orders;  // one per group
  ElementType image_type;
  const void* input;
  Strides input_strides;
  void* output;
  Strides output_strides;
  const void* weight;  // contiguous
  const void* bias;    // contiguous, of the weight's type; may be null
  ElementType weight_type;
  // x in the state type, contiguous, for half-precision images when the plan needs it or the caller wants it; else
  // null.
  void* state;
  void* workspace;  // of the bytes that the plan asks for; null if that is 0
  bool allow_tf32;  // tensor cores multiply once, in TF32; else three times, which is as exact as float32
};

struct GradientProblem {
  Shape shape;  // of the solve whose gradient this is
  const int64_t* orders;
  ElementType output_type;
  const void* output;  // x
  Strides output_strides;
  ElementType adjoint_type;
  const void* adjoint;  // u
  Strides adjoint_strides;
  ElementType weight_type;
  void* weight_gradient;  // contiguous
  void* bias_gradient;    // contiguous
  void* workspace;        // of the bytes that the plan asks for; null if that is 0
  bool allow_tf32;        // as of the solve
};

// The limits of gridDim; that of y is GroupOrders::kMaxGroups.
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridZ = 65535;

inline Strides contiguous_strides(const Shape& shape) {
  const int64_t plane = shape.height * shape.width;
  return {shape.groups * shape.channels * shape.depth * plane, shape.depth * plane, plane, shape.width, 1};
}

}  // namespace inverse_flow
