"""Slow, obvious solves to test the fast one against. Plain PyTorch, differentiable, any floating dtype and device.

Never an oracle: the paper's released code, whose gradients and inverses are wrong (see docs/mathematics.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse_flow.ops.causal import corner_index, effective_weight
from inverse_flow.ops.checks import check_arguments
from inverse_flow.ops.spec import MIRROR_COLUMNS, MIRROR_ROWS, OrderNames, make_spec

__all__ = ["dense_matrix", "inverse_conv2d", "inverse_conv2d_dense"]


def dense_matrix(
    weight: Tensor,
    height: int,
    width: int,
    *,
    order: OrderNames = "top_left",
    groups: int = 1,
    corner: str = "general",
) -> Tensor:
    """The matrix of A(w) on images of ``height`` × ``width``.

    Returns:
        (C·H·W, C·H·W), rows and columns in the order of ``x.flatten()`` for one image; differentiable in ``weight``.
    """
    spec = make_spec(order, groups, corner)
    weight = effective_weight(weight, spec)
    channels, (kernel_h, kernel_w) = weight.shape[1], weight.shape[2:]
    blocks = []
    for group, code in enumerate(spec.orders):
        block = weight.new_zeros(channels, height, width, channels, height, width)
        row, column = corner_index(code, kernel_h, kernel_w)
        for i in range(kernel_h):
            for j in range(kernel_w):
                tap = weight[group * channels : (group + 1) * channels, :, i, j]
                # Output pixel (h, v) reads input pixel (h + down, v + right).
                down, right = i - row, j - column
                block = block + torch.einsum(
                    "oc,hg,vu->ohvcgu",
                    tap,
                    torch.eye(height, dtype=weight.dtype, device=weight.device).roll(down, 1).tril(down).triu(down),
                    torch.eye(width, dtype=weight.dtype, device=weight.device).roll(right, 1).tril(right).triu(right),
                )
        blocks.append(block.reshape(channels * height * width, -1))
    return torch.block_diag(*blocks)


def inverse_conv2d_dense(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "top_left",
    groups: int = 1,
    corner: str = "general",
) -> Tensor:
    """:func:`inverse_flow.functional.inverse_conv2d` as a dense solve in float64: the oracle. Returns float64."""
    make_spec(order, groups, corner)
    check_arguments(input, weight, bias, groups)
    right = input.double() if bias is None else input.double() - bias.double().view(-1, 1, 1)
    matrix = dense_matrix(weight.double(), *input.shape[2:], order=order, groups=groups, corner=corner)
    return torch.linalg.solve(matrix, right.flatten(1).mT).mT.reshape(input.shape)


def inverse_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "top_left",
    groups: int = 1,
    corner: str = "general",
) -> Tensor:
    """:func:`inverse_flow.functional.inverse_conv2d` as the plain recurrence, one pixel after the other, in the
    dtype of ``input``: what rounding alone costs. Same arguments and errors."""
    spec = make_spec(order, groups, corner)
    check_arguments(input, weight, bias, groups)
    weight = effective_weight(weight, spec).to(input.dtype)
    if bias is not None:
        input = input - bias.to(input.dtype).view(-1, 1, 1)
    channels = weight.shape[1]
    parts = [
        _recurrence(input[:, part], weight[part], code)
        for group, code in enumerate(spec.orders)
        for part in [slice(group * channels, (group + 1) * channels)]
    ]
    return torch.cat(parts, 1)


def _recurrence(input: Tensor, weight: Tensor, order: int) -> Tensor:
    """One group: mirrors the image and the taps so that the order is top-left, and sweeps in raster order."""
    mirrored = [dim for dim, bit in ((2, MIRROR_ROWS), (3, MIRROR_COLUMNS)) if order & bit]
    input, weight = input.flip(mirrored), weight.flip(mirrored)
    kernel_h, kernel_w = weight.shape[2:]
    corner_tap = weight[:, :, -1, -1]
    pixels: dict[tuple[int, int], Tensor] = {}
    for i in range(input.shape[2]):
        for j in range(input.shape[3]):
            right = input[:, :, i, j]
            for p in range(min(kernel_h, i + 1)):
                for q in range(min(kernel_w, j + 1)):
                    if p or q:
                        right = right - pixels[i - p, j - q] @ weight[:, :, kernel_h - 1 - p, kernel_w - 1 - q].mT
            pixels[i, j] = torch.linalg.solve(corner_tap, right.mT).mT
    rows = [torch.stack([pixels[i, j] for j in range(input.shape[3])], -1) for i in range(input.shape[2])]
    return torch.stack(rows, 2).flip(mirrored)
