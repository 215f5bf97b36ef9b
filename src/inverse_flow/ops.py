"""Typed wrappers over ``torch.ops.inverse_flow`` and the fake kernels that let PyTorch trace them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native  # noqa: F401  (loads the operators)

Orders = tuple[int, ...]

# Looked up once: each dot of such a path costs a call.
_solve = torch.ops.inverse_flow.solve.default
_solve_backward = torch.ops.inverse_flow.solve_backward.default


def solve(input: Tensor, weight: Tensor, bias: Tensor | None, orders: Orders, corner: int, transposed: bool) -> Tensor:
    """A(w)⁻¹ (input − bias), or A(w)⁻ᵀ (input − bias): csrc/ops.cpp."""
    return _solve(input, weight, bias, orders, corner, transposed)


def solve_backward(
    grad_output: Tensor, output: Tensor, weight: Tensor, orders: Orders, corner: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`solve` for (input, weight, bias), from its output: csrc/ops.cpp."""
    return _solve_backward(grad_output, output, weight, orders, corner, transposed)


@torch.library.register_fake("inverse_flow::solve")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, orders: Orders, corner: int, transposed: bool) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("inverse_flow::solve_backward")
def _(
    grad_output: Tensor, output: Tensor, weight: Tensor, orders: Orders, corner: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(grad_output), grad_weight, weight.new_empty(weight.shape[0])
