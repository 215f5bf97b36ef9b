// Operator schemas, nothing else. `orders` has one entry per group (see kMirrorColumns in params.h), so its length is
// the number of groups; `corner` is a Corner of params.h. With `allow_tf32` the tensor cores of a GPU may round the
// factors of float32 products to TF32; the CPU never does.
//
// Each operator has a twin, `_eager`, that does the same (no overload: opcheck takes no operator with two). Python
// gives the plain one a formula of its derivatives, which exported and compiled programs need; calls of it pass through
// Python twice. The functions of src/inverse_flow/ops/autograd.py, which differentiate by themselves, call the other.
#include <torch/csrc/stable/library.h>

// A(w)^-1 (input - bias), or A(w)^-T (input - bias).
#define INVERSE_FLOW_SOLVE                                                                 \
  "(Tensor input, Tensor weight, Tensor? bias, int[] orders, int corner, bool transposed," \
  " bool allow_tf32=False) -> Tensor"
// The gradients of `solve` from its output: (grad_input, grad_weight, grad_bias).
#define INVERSE_FLOW_SOLVE_BACKWARD                                                               \
  "(Tensor grad_output, Tensor output, Tensor weight, int[] orders, int corner, bool transposed," \
  " bool allow_tf32=False) -> (Tensor, Tensor, Tensor)"

STABLE_TORCH_LIBRARY(inverse_flow, m) {
  m.def("solve" INVERSE_FLOW_SOLVE);
  m.def("solve_eager" INVERSE_FLOW_SOLVE);
  m.def("solve_backward" INVERSE_FLOW_SOLVE_BACKWARD);
  m.def("solve_backward_eager" INVERSE_FLOW_SOLVE_BACKWARD);
}
