// The CUDA implementation of the operators: device guard, current stream, memory from the caching allocator (so that
// a graph can be captured), launches checked. Built with the host compiler, against torch's stable ABI alone.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <tuple>

#include "../checks.h"
#include "../tensors.h"
#include "device.h"
#include "gradient/launch.h"
#include "regimes.h"

namespace inverse_flow {
namespace {

ElementType element_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return ElementType::kDouble;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kHalf;
    default:
      return ElementType::kFloat;
  }
}

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "inverse_flow: CUDA: ", error); }

void check_same_device(const Tensor& a, const Tensor& b, const char* what) {
  STD_TORCH_CHECK(a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index(), "inverse_flow: ", what,
                  " must be on the images' GPU");
}

// Volumes have no kernel of their own. Python solves them plane by plane, with the solve of images below and PyTorch's
// convolution, as operators of the same arguments: src/inverse_flow/ops/planes.py.
bool by_planes(const Tensor& images) { return images.dim() == 5; }

// Calls such an operator; its results are the first values of what comes back.
template <class... Arguments>
std::array<StableIValue, sizeof...(Arguments)> call_by_planes(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor as_tensor(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

DeviceLimits current_limits() {
  DeviceLimits limits{};
  check_launch(device_limits(limits));
  return limits;
}

Tensor new_bytes(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

// Solves, with the device guarded by the caller. `state`, when asked for, receives x in the state type: `output` itself
// if that is of the state type, else a contiguous tensor.
Tensor run_solve(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::vector<int64_t>& orders, const Shape& shape, const DeviceLimits& limits, bool allow_tf32,
                 Tensor* state) {
  Tensor output = new_image_like(input);
  const ScalarType type = input.scalar_type();
  const ScalarType wide_type = state_type(type);
  const int64_t state_bytes = element_bytes(element_type(wide_type));
  const std::optional<SolvePlan> plan = plan_solve(shape, state_bytes, limits);
  STD_TORCH_CHECK(plan.has_value(), "inverse_flow: ", shape.channels,
                  " channels per group are more than fit this GPU's shared memory (", limits.shared_bytes, " bytes)");

  const bool is_half = type != wide_type;
  const Tensor weight_memory = as_contiguous(weight);
  std::optional<Tensor> bias_memory;
  if (bias.has_value()) bias_memory = as_contiguous(*bias);
  std::optional<Tensor> wide;
  if (is_half && (state != nullptr || state_needed(*plan))) {
    wide = new_tensor(input, {shape.batch, shape.groups * shape.channels, shape.height, shape.width}, wide_type);
  }
  std::optional<Tensor> workspace;
  const int64_t workspace_bytes = solve_workspace_bytes(shape, *plan, state_bytes);
  if (workspace_bytes > 0) workspace = new_bytes(input, workspace_bytes);

  SolveProblem problem{};
  problem.shape = shape;
  problem.orders = orders.data();
  problem.image_type = element_type(type);
  problem.input = input.const_data_ptr();
  problem.input_strides = strides_of(input);
  problem.output = output.mutable_data_ptr();
  problem.output_strides = strides_of(output);
  problem.weight = weight_memory.const_data_ptr();
  problem.bias = bias_memory.has_value() ? bias_memory->const_data_ptr() : nullptr;
  problem.weight_type = element_type(weight.scalar_type());
  problem.state = wide.has_value() ? wide->mutable_data_ptr() : nullptr;
  problem.workspace = workspace.has_value() ? workspace->mutable_data_ptr() : nullptr;
  problem.allow_tf32 = allow_tf32;
  check_launch(launch_solve(problem, *plan, current_stream(input)));
  if (state != nullptr) *state = is_half ? *wide : output;
  return output;
}

Tensor solve(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, std::vector<int64_t> orders,
             int64_t corner, bool transposed, bool allow_tf32) {
  const Shape shape = check_problem(input, weight, bias, orders, corner, transposed);
  check_same_device(input, weight, "the weight");
  if (bias.has_value()) check_same_device(input, *bias, "the bias");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  if (shape.batch == 0) return new_image_like(input);
  if (by_planes(input)) {
    return as_tensor(call_by_planes("inverse_flow::solve_by_planes", input, weight, bias, orders, corner, transposed,
                                    allow_tf32)[0]);
  }
  return run_solve(input, weight, bias, orders, shape, current_limits(), allow_tf32, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> solve_backward(const Tensor& grad_output, const Tensor& output, const Tensor& weight,
                                                  std::vector<int64_t> orders, int64_t corner, bool transposed,
                                                  bool allow_tf32) {
  check_same_images(grad_output, output);
  const Shape shape = check_problem(output, weight, std::nullopt, orders, corner, transposed);
  check_same_device(output, grad_output, "grad_output");
  check_same_device(output, weight, "the weight");
  const torch::stable::accelerator::DeviceGuard guard(output.get_device_index());
  const int64_t channels = shape.groups * shape.channels;
  std::vector<int64_t> weight_sizes{channels, shape.channels, shape.kernel_h, shape.kernel_w};
  if (by_planes(output)) weight_sizes.insert(weight_sizes.begin() + 2, shape.kernel_d);
  if (shape.batch == 0) {
    return {new_image_like(grad_output), torch::stable::new_zeros(weight, weight_sizes),
            torch::stable::new_zeros(weight, {channels})};
  }
  if (by_planes(output)) {
    const auto grads = call_by_planes("inverse_flow::solve_backward_by_planes", grad_output, output, weight, orders,
                                      corner, transposed, allow_tf32);
    return {as_tensor(grads[0]), as_tensor(grads[1]), as_tensor(grads[2])};
  }
  Tensor weight_gradient = new_tensor(weight, weight_sizes, weight.scalar_type());
  Tensor bias_gradient = new_tensor(weight, {channels}, weight.scalar_type());

  // u = A^-T grad_output (A^-1 for a transposed solve) is the gradient of the input.
  const DeviceLimits limits = current_limits();
  Shape adjoint_shape = shape;
  adjoint_shape.transposed = !transposed;
  Tensor adjoint = output;
  Tensor grad_input = run_solve(grad_output, weight, std::nullopt, orders, adjoint_shape, limits, allow_tf32, &adjoint);

  const ScalarType wide_type = state_type(output.scalar_type());
  const GradientPlan plan = plan_weight_gradient(shape, element_bytes(element_type(wide_type)), limits);
  Tensor workspace = new_tensor(weight, {plan.workspace_elements(shape)}, wide_type);
  GradientProblem problem{};
  problem.shape = shape;
  problem.orders = orders.data();
  problem.output_type = element_type(output.scalar_type());
  problem.output = output.const_data_ptr();
  problem.output_strides = strides_of(output);
  problem.adjoint_type = element_type(wide_type);
  problem.adjoint = adjoint.const_data_ptr();
  problem.adjoint_strides = strides_of(adjoint);
  problem.weight_type = element_type(weight.scalar_type());
  problem.weight_gradient = weight_gradient.mutable_data_ptr();
  problem.bias_gradient = bias_gradient.mutable_data_ptr();
  problem.workspace = workspace.mutable_data_ptr();
  problem.allow_tf32 = allow_tf32;
  check_launch(launch_gradient(problem, plan, current_stream(output)));
  return {grad_input, weight_gradient, bias_gradient};
}

}  // namespace
}  // namespace inverse_flow

STABLE_TORCH_LIBRARY_IMPL(inverse_flow, CUDA, m) {
  m.impl("solve", TORCH_BOX(&inverse_flow::solve));
  m.impl("solve_eager", TORCH_BOX(&inverse_flow::solve));
  m.impl("solve_backward", TORCH_BOX(&inverse_flow::solve_backward));
  m.impl("solve_backward_eager", TORCH_BOX(&inverse_flow::solve_backward));
}
