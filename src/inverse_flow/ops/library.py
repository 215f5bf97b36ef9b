"""The operators of ``torch.ops.inverse_flow``, typed, and the fake kernels that let PyTorch trace them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inverse_flow.ops import native
from inverse_flow.ops.checks import check_arguments
from inverse_flow.ops.spec import Orders

# Looked up once, and called without a wrapper: small solves are short. Their schemas are in csrc/ops.cpp.
solve: Callable[..., Tensor] = torch.ops.inverse_flow.solve_eager.default
"""``solve(input, weight, bias, *spec)``: A(w)⁻¹ (input − bias), or A(w)⁻ᵀ (input − bias)."""

solve_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.inverse_flow.solve_backward_eager.default
"""``solve_backward(grad_output, output, weight, *spec)``: the gradients of :func:`solve` for (input, weight, bias),
from its output."""

traced_solve: Callable[..., Tensor] = torch.ops.inverse_flow.solve.default
"""The same with a formula of its derivatives (see :mod:`inverse_flow.ops.autograd`): what exported and compiled
programs keep, and what ``torch.ops.inverse_flow.solve`` is to others."""

traced_solve_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.inverse_flow.solve_backward.default


def switches_allow_tf32() -> bool:
    """Whether PyTorch's switches allow TF32 now, both for matrix products and for convolutions."""
    backends: Any = torch.backends  # PyTorch's own description of it lacks cudnn.conv
    # The one that is off by default first: each costs a microsecond.
    return bool(backends.cuda.matmul.fp32_precision == "tf32" and backends.cudnn.conv.fp32_precision == "tf32")


# torch.compile refuses to trace the switches. What torch.compiler.assume_constant_result does, which would import the
# compiler, seconds of it, into every program.
switches_allow_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def allows_tf32(images: Tensor) -> bool:
    """Whether the solve of these images may multiply in TF32: on a GPU, with a float32 recurrence, where PyTorch's
    switches allow it both for matrix products and for convolutions. Compiled code keeps what held when it was compiled.
    """
    # What is no tensor is refused where the arguments are checked.
    return getattr(images, "is_cuda", False) and images.dtype != torch.float64 and switches_allow_tf32()


@torch.library.register_fake("inverse_flow::solve")
@torch.library.register_fake("inverse_flow::solve_eager")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Orders,
    corner: int,
    transposed: bool,
    allow_tf32: bool = False,
) -> Tensor:
    check_arguments(input, weight, bias, len(orders), 3 if input.dim() == 5 else 2)
    native.check_device(input.device)
    return torch.empty_like(input)


@torch.library.register_fake("inverse_flow::solve_backward")
@torch.library.register_fake("inverse_flow::solve_backward_eager")
def _(
    grad_output: Tensor,
    output: Tensor,
    weight: Tensor,
    orders: Orders,
    corner: int,
    transposed: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(grad_output), grad_weight, weight.new_empty(weight.shape[0])
