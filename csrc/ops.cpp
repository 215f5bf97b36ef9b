// Operator schemas, nothing else. `orders` has one entry a group (see Order in params.h), so its length is the
// number of groups; `corner` is a Corner of params.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(inverse_flow, m) {
  // A(w)^-1 (input - bias), or A(w)^-T (input - bias). With `allow_tf32` the tensor cores of a GPU may round the
  // factors of float32 products to TF32; the CPU never does.
  m.def(
      "solve(Tensor input, Tensor weight, Tensor? bias, int[] orders, int corner, bool transposed,"
      " bool allow_tf32=False) -> Tensor");
  // The gradients of `solve` from its output: (grad_input, grad_weight, grad_bias).
  m.def(
      "solve_backward(Tensor grad_output, Tensor output, Tensor weight, int[] orders, int corner, bool transposed,"
      " bool allow_tf32=False) -> (Tensor, Tensor, Tensor)");
}
