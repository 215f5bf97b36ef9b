r"""The solve and its gradient as a pair of mutually recursive ``autograd.Function``\ s.

With :math:`x = A^{-1}(y - b)` and :math:`g = \partial L/\partial x`:

.. math:: u = A^{-T} g, \qquad \partial L/\partial y = u, \qquad \partial L/\partial b = -\sum u, \qquad
          \partial L/\partial w_{o,c,\delta} = -\sum_p u_{o,p}\, x_{c,p-\delta}

:math:`u` is the transposed solve, whose own gradients are the same formulas with :math:`A` transposed, so
derivatives of every order need these two Functions and no other kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch import eager_transforms
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from inverse_flow.ops import library as ops
from inverse_flow.ops import planes as _planes  # noqa: F401 - operators that the binding of the GPU calls
from inverse_flow.ops.causal import convolve, per_channel, read_part, sum_channels
from inverse_flow.ops.spec import Spec


class Solve(torch.autograd.Function):
    """``apply(input, weight, bias, spec) -> output``"""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
        return ops.solve(input, weight, bias, *spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, _, ctx.spec = inputs
        # Only the gradient of the weight is made of the output.
        ctx.save_for_backward(output if ctx.needs_input_grad[1] else None, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        output, weight = ctx.saved_tensors
        _, weight_needed, bias_needed, *_ = ctx.needs_input_grad
        if weight_needed:
            grads = solve_backward(grad_output, output, weight, ctx.spec)
            return (*grads[:2], grads[2] if bias_needed else None, None)
        grad_input = solve(grad_output, weight, None, ctx.spec.adjoint())
        grad_bias = -sum_channels(grad_input, weight.dtype) if bias_needed else None
        return grad_input, None, grad_bias, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], input: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec
    ) -> tuple[Tensor, int]:
        size, (input_dim, weight_dim, bias_dim, _) = info.batch_size, in_dims
        if weight_dim is None and bias_dim is None:
            images = input.movedim(input_dim, 0)
            output = solve(images.flatten(0, 1), weight, bias, spec)
            return output.unflatten(0, images.shape[:2]), 0
        output = solve(
            into_channels(input, input_dim, size, 1),
            into_channels(weight, weight_dim, size, 0),
            None if bias is None else into_channels(bias, bias_dim, size, 0),
            spec.repeated(size),
        )
        return output.unflatten(1, (size, -1)), 1


class SolveBackward(torch.autograd.Function):
    """``apply(grad_output, output, weight, spec) -> (grad_input, grad_weight, grad_bias)``"""

    @staticmethod
    def forward(grad_output: Tensor, output: Tensor, weight: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
        return ops.solve_backward(grad_output, output, weight, *spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        _, output, weight, ctx.spec = inputs
        ctx.save_for_backward(output, outputs[0], weight)

    @staticmethod
    def backward(ctx: Any, into_u: Tensor, into_weight: Tensor, into_bias: Tensor) -> tuple[Tensor | None, ...]:
        (x, u, weight), adjoint = ctx.saved_tensors, ctx.spec.adjoint()
        # ∂L/∂w = −Σ u xᵀ (transposed: −Σ x uᵀ) is bilinear: its derivatives are convolutions with the incoming
        # gradient as the weight.
        taps = read_part(into_weight, ctx.spec)
        into_u = into_u - convolve(x, taps, ctx.spec)
        into_u = into_u - per_channel(into_bias.to(into_u.dtype), into_u)
        into_x = -convolve(u, taps, adjoint) if ctx.needs_input_grad[1] else None
        # u = A⁻ᵀ g is a solve like any other.
        into_grad, into_w, _ = solve_backward(into_u, u, weight, adjoint)
        return into_grad, into_x, into_w, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, output: Tensor, weight: Tensor, spec: Spec
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        size, (grad_dim, output_dim, weight_dim, _) = info.batch_size, in_dims
        # Each sample has a weight gradient of its own, so samples become groups even where they share a weight.
        grad_input, grad_weight, grad_bias = solve_backward(
            into_channels(grad_output, grad_dim, size, 1),
            into_channels(output, output_dim, size, 1),
            into_channels(weight, weight_dim, size, 0),
            spec.repeated(size),
        )
        split = (size, -1)
        grads = grad_input.unflatten(1, split), grad_weight.unflatten(0, split), grad_bias.unflatten(0, split)
        return grads, (1, 0, 0)


class SolveForwardMode(Solve):
    """:class:`Solve` with a forward-mode rule. A class of its own, since ``torch.compile`` refuses Functions that
    define ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Solve.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output, inputs[1])

    @staticmethod
    def jvp(
        ctx: Any, input_tangent: Tensor | None, weight_tangent: Tensor | None, bias_tangent: Tensor | None, _: None
    ) -> Tensor:
        """ẋ = A⁻¹(ẏ − ḃ − A(ẇ) x)"""
        output, weight = ctx.saved_tensors
        tangent = torch.zeros_like(output) if input_tangent is None else input_tangent
        if bias_tangent is not None:
            tangent = tangent - per_channel(bias_tangent.to(tangent.dtype), tangent)
        if weight_tangent is not None:
            tangent = tangent - convolve(output, read_part(weight_tangent, ctx.spec), ctx.spec)
        return solve(tangent, weight, None, ctx.spec)


class SolveBackwardForwardMode(SolveBackward):
    """:class:`SolveBackward` with a forward-mode rule, for forward mode over reverse mode (Hessians)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        SolveBackward.setup_context(ctx, inputs, outputs)
        ctx.save_for_forward(inputs[0], inputs[1], outputs[0], inputs[2])

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: Tensor | None, output_tangent: Tensor | None, weight_tangent: Tensor | None, _: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u̇ = A⁻ᵀ(ġ − A(ẇ)ᵀ u); the weight gradient −Σ u xᵀ is bilinear, and each half of its tangent is what this
        very Function gives, once for (u̇, x) and once for (u, ẋ)."""
        grad_output, output, u, weight = ctx.saved_tensors
        tangent = torch.zeros_like(grad_output) if grad_tangent is None else grad_tangent
        if weight_tangent is not None:
            tangent = tangent - convolve(u, read_part(weight_tangent, ctx.spec), ctx.spec.adjoint())
        u_tangent, weight_part, bias_part = solve_backward(tangent, output, weight, ctx.spec)
        if output_tangent is not None:
            weight_part = weight_part + solve_backward(grad_output, output_tangent, weight, ctx.spec)[1]
        return u_tangent, weight_part, bias_part


def into_channels(tensor: Tensor, vmap_dim: int | None, size: int, channel_dim: int) -> Tensor:
    """Folds the vmapped dimension into the channels (a sample becomes a group); an unmapped tensor is repeated."""
    if vmap_dim is None:
        tensor, vmap_dim = tensor.expand(size, *tensor.shape), 0
    return tensor.movedim(vmap_dim, channel_dim).flatten(channel_dim, channel_dim + 1)


def in_forward_mode() -> bool:
    """Whether derivatives run forward here.

    Raises:
        NotImplementedError: forward mode inside forward mode, where PyTorch's Functions silently give zeros.
    """
    if forward_ad._current_level < 0:
        return False
    if eager_transforms.JVP_NESTING > 1:
        raise NotImplementedError(
            "the inverse convolution cannot be differentiated in forward mode twice: put forward mode over reverse "
            "mode, as torch.func.hessian does"
        )
    return True


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without what that spends in Python on functorch's transforms where none is active:
    it would take several times as long as a small solve."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


def _records_gradients(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a backward pass may come: otherwise the operator can be called as it is, which is cheaper."""
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return True
    return torch._C._are_functorch_transforms_active()


def _is_traced() -> bool:
    """Whether a program is being made, that keeps the operator and with it the formula registered below.

    Raises:
        NotImplementedError: ``torch.func.functionalize`` with another transform, together with which it has no rule for
            operators of others.
    """
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling():
        return not transformed
    if transformed:
        levels = {level.key() for level in get_interpreter_stack()}
        if TransformType.Functionalize in levels and len(levels) > 1:
            raise NotImplementedError(
                "inverse_conv2d cannot be functionalized together with another transform of torch.func: PyTorch has no "
                "rule for that"
            )
        return TransformType.Functionalize in levels
    return torch._C._get_tracing_state() is not None


def solve(input: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
    """The differentiable solve, in reverse mode and, inside a forward-mode level, in forward mode."""
    if in_forward_mode():
        return _apply(SolveForwardMode, input, weight, bias, spec)
    if _is_traced():
        return ops.traced_solve(input, weight, bias, *spec)
    if _records_gradients(input, weight, bias):
        return _apply(Solve, input, weight, bias, spec)
    return ops.solve(input, weight, bias, *spec)


def solve_backward(grad_output: Tensor, output: Tensor, weight: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`solve`, themselves differentiable in both modes."""
    if in_forward_mode():
        return _apply(SolveBackwardForwardMode, grad_output, output, weight, spec)
    if _is_traced():
        return ops.traced_solve_backward(grad_output, output, weight, *spec)
    if _records_gradients(grad_output, output, weight):
        return _apply(SolveBackward, grad_output, output, weight, spec)
    return ops.solve_backward(grad_output, output, weight, *spec)


def _register_formula(operator: str, function: type[torch.autograd.Function]) -> None:
    """Gives the operator itself the derivatives of the Function around it, whose last argument is the Spec."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, orders, corner, transposed, allow_tf32 = inputs
        function.setup_context(ctx, (*tensors, Spec(tuple(orders), corner, transposed, allow_tf32)), output)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *found, _ = function.backward(ctx, *grads)
        return (*found, *(None for _ in Spec._fields))

    torch.library.register_autograd(operator, backward, setup_context=setup_context)


_register_formula("inverse_flow::solve", Solve)
_register_formula("inverse_flow::solve_backward", SolveBackward)
