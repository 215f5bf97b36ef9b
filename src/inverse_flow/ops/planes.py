r"""Volumes plane by plane, where they have no kernel of their own: on a GPU.

With the planes of a volume as :math:`x_d`, and :math:`A_r` the two-dimensional convolution with the taps that lie
:math:`r` planes back,

.. math:: x_d = A_0^{-1}\Big(y_d - b - \sum_{r \ge 1} A_r x_{d-r}\Big)

is one solve of images per plane, and one convolution before it, of all planes that it reads stacked as channels. The
binding calls these operators (csrc/cuda/binding.cpp), so that programs see one solve and not the planes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv3d_weight

from inverse_flow.ops import library as ops
from inverse_flow.ops.causal import convolve, padded, read_part, sum_channels
from inverse_flow.ops.spec import GENERAL, Orders, Spec

MIRROR_PLANES = 4


def solve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Orders,
    corner: int,
    transposed: bool,
    allow_tf32: bool = False,
) -> Tensor:
    """The operator ``solve`` of volumes (B, C, D, H, W), with kernels for images alone."""
    output = torch.empty_like(input)
    state = torch.promote_types(input.dtype, torch.float32)
    if input.dtype != state:
        arguments = (weight.to(state), None if bias is None else bias.to(state), orders, corner, transposed, allow_tf32)
        return output.copy_(solve(input.to(state), *arguments))
    members, start = weight.shape[1], 0
    # Groups that go through the planes in the same direction go together.
    for _, run in groupby(orders, lambda order: order & MIRROR_PLANES):
        spec = Spec(tuple(run), corner, transposed, allow_tf32)
        part = slice(start, start + members * len(spec.orders))
        _sweep(input[:, part], weight[part], None if bias is None else bias[part], spec, output[:, part])
        start = part.stop
    return output


def solve_backward(
    grad_output: Tensor,
    output: Tensor,
    weight: Tensor,
    orders: Orders,
    corner: int,
    transposed: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``solve_backward`` of volumes: the transposed solve, and the sums of PyTorch's convolution."""
    state = torch.promote_types(output.dtype, torch.float32)
    u = solve(grad_output.to(state), weight.to(state), None, orders, corner, not transposed, allow_tf32)
    x = output.to(state)
    # ∂L/∂w = −Σ u xᵀ is the gradient of −⟨A(w) x, u⟩; transposed, −Σ x uᵀ.
    images, grads = (u, x) if transposed else (x, u)
    with _convolutions_in_tf32(allow_tf32, x):
        sums = conv3d_weight(padded(images, weight, orders), weight.shape, grads.contiguous(), groups=len(orders))
    grad_weight = read_part(sums, Spec(orders, corner)).neg_().to(weight.dtype)
    return torch.empty_like(grad_output).copy_(u), grad_weight, -sum_channels(u).to(weight.dtype)


def _sweep(input: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec, output: Tensor) -> None:
    """Solves groups whose orders agree about the planes into ``output``."""
    depth, kernel_d = input.shape[2], weight.shape[2]
    in_plane = spec._replace(orders=tuple(order % MIRROR_PLANES for order in spec.orders))
    corner_plane = weight[:, :, 0 if spec.orders[0] & MIRROR_PLANES else kernel_d - 1]
    # What is convolved and not solved is the transposed convolution as a plain one: from the opposite corner.
    taps, orders = (
        (_adjoint(weight, spec.orders), [7 - o for o in spec.orders]) if spec.transposed else (weight, spec.orders)
    )
    backwards = bool(orders[0] & MIRROR_PLANES)
    plain = Spec(tuple(order % MIRROR_PLANES for order in orders), GENERAL)
    for step in range(depth):
        plane = depth - 1 - step if backwards else step
        read = min(step, kernel_d - 1)
        right = input[:, :, plane]
        if read:
            done = slice(plane + 1, plane + 1 + read) if backwards else slice(plane - read, plane)
            of_done = slice(1, 1 + read) if backwards else slice(kernel_d - 1 - read, kernel_d - 1)
            with _convolutions_in_tf32(spec.allow_tf32, input):
                right = right - convolve(output[:, :, done].flatten(1, 2), taps[:, :, of_done].flatten(1, 2), plain)
        output[:, :, plane] = ops.solve(right, corner_plane, bias, *in_plane)


def _adjoint(weight: Tensor, orders: Orders) -> Tensor:
    """The weight whose convolution, from the opposite corners, is the adjoint of that of ``weight``."""
    swapped = weight.unflatten(0, (len(orders), -1)).transpose(1, 2).flatten(0, 1)
    return swapped.flip(tuple(range(2, weight.dim())))


@contextmanager
def _convolutions_in_tf32(allowed: bool, images: Tensor) -> Iterator[None]:
    """PyTorch's own switch as the solve was allowed to: its convolutions would round to TF32 by default."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    if images.is_cuda:
        convolutions.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if images.is_cuda:
            convolutions.fp32_precision = before


_LIBRARY = torch.library.Library("inverse_flow", "FRAGMENT")
for _name, _function in {"solve": solve, "solve_backward": solve_backward}.items():
    _schema = str(getattr(torch.ops.inverse_flow, _name).default._schema).partition("(")
    _LIBRARY.define(f"{_name}_by_planes({_schema[2]}")
    _LIBRARY.impl(f"{_name}_by_planes", _function, "CompositeExplicitAutograd")
