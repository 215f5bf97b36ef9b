"""The operators of ``torch.ops.inverse_flow``, typed, and the fake kernels that let PyTorch trace them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _native
from ._checks import check_arguments

Orders = tuple[int, ...]

# Looked up once, and called without a wrapper: small solves are short. Their schemas are in csrc/ops.cpp.
solve: Callable[[Tensor, Tensor, Tensor | None, Orders, int, bool], Tensor] = torch.ops.inverse_flow.solve.default
"""``solve(input, weight, bias, orders, corner, transposed)``: A(w)⁻¹ (input − bias), or A(w)⁻ᵀ (input − bias)."""

solve_backward: Callable[[Tensor, Tensor, Tensor, Orders, int, bool], tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.inverse_flow.solve_backward.default
)
"""``solve_backward(grad_output, output, weight, orders, corner, transposed)``: the gradients of :func:`solve` for
(input, weight, bias), from its output."""


@torch.library.register_fake("inverse_flow::solve")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, orders: Orders, corner: int, transposed: bool) -> Tensor:
    check_arguments(input, weight, bias, len(orders))
    _native.check_device(input.device)
    return torch.empty_like(input)


@torch.library.register_fake("inverse_flow::solve_backward")
def _(
    grad_output: Tensor, output: Tensor, weight: Tensor, orders: Orders, corner: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(grad_output), grad_weight, weight.new_empty(weight.shape[0])
