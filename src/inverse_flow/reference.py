"""Slow, obvious solves to test the fast one against. Plain PyTorch, differentiable, any floating dtype and device.

In half precision the recurrence is one in float32, rounded once, as that of the fast one is.

Never an oracle: the paper's released code, whose gradients and inverses are wrong (see docs/mathematics.md).
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from inverse_flow.ops.causal import corner_index, effective_weight, mirrored, per_channel, tap
from inverse_flow.ops.checks import check_arguments
from inverse_flow.ops.spec import ORDERS, OrderNames, PerAxis, each_axis, make_spec

__all__ = [
    "dense_matrix",
    "inverse_conv1d",
    "inverse_conv1d_dense",
    "inverse_conv2d",
    "inverse_conv2d_dense",
    "inverse_conv3d",
    "inverse_conv3d_dense",
]


def dense_matrix(
    weight: Tensor,
    *sizes: int,
    order: OrderNames | None = None,
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    """The matrix of A(w) on images of ``dense_matrix(weight, height, width)``, or on signals or volumes.

    The other arguments are those of :func:`inverse_flow.functional.inverse_conv2d`, or of that of as many dimensions
    as there are sizes; the order is the first one, such as ``"top_left"``, unless given.

    Returns:
        (C·H·W, C·H·W), rows and columns in the order of ``x.flatten()`` for one image; differentiable in ``weight``.
    """
    dimensions = len(sizes)
    spec = make_spec(ORDERS[dimensions][0] if order is None else order, groups, corner, dimensions)
    distances = each_axis("dilation", dilation, dimensions)
    weight = effective_weight(weight, spec)
    channels, kernel = weight.shape[1], weight.shape[2:]
    blocks = []
    for code, window in zip(spec.orders, weight.split(channels), strict=True):
        block = weight.new_zeros(channels * math.prod(sizes), channels * math.prod(sizes))
        for place in product(*map(range, kernel)):
            matrix = tap(window, place)
            for size, index, corner_place, d in zip(sizes, place, corner_index(code, kernel), distances, strict=True):
                # An output pixel reads the input pixel so far behind it: ones on one diagonal.
                behind = (index - corner_place) * d
                matrix = torch.kron(matrix, weight.new_ones(size, size).tril(behind).triu(behind))
            block = block + matrix
        blocks.append(block)
    return torch.block_diag(*blocks)


def _dense(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: OrderNames,
    groups: int,
    dilation: PerAxis,
    corner: str,
) -> Tensor:
    """A dense solve in float64."""
    make_spec(order, groups, corner, dimensions)
    check_arguments(input, weight, bias, groups, dimensions)
    right = input.double() if bias is None else input.double() - per_channel(bias.double(), input)
    matrix = dense_matrix(
        weight.double(), *input.shape[2:], order=order, groups=groups, dilation=dilation, corner=corner
    )
    return torch.linalg.solve(matrix, right.flatten(1).mT).mT.reshape(input.shape)


def _recurrence(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: OrderNames,
    groups: int,
    dilation: PerAxis,
    corner: str,
) -> Tensor:
    """One pixel after the other."""
    spec = make_spec(order, groups, corner, dimensions)
    check_arguments(input, weight, bias, groups, dimensions)
    distances = each_axis("dilation", dilation, dimensions)
    dtype, state = input.dtype, torch.promote_types(input.dtype, torch.float32)
    input, weight = input.to(state), effective_weight(weight, spec).to(state)
    if bias is not None:
        input = input - per_channel(bias.to(state), input)
    channels = weight.shape[1]
    groups_of = zip(input.split(channels, 1), weight.split(channels), spec.orders, strict=True)
    return torch.cat([_sweep(images, window, code, distances) for images, window, code in groups_of], 1).to(dtype)


def _sweep(input: Tensor, weight: Tensor, order: int, dilation: tuple[int, ...]) -> Tensor:
    """One group: mirrors the image and the taps so that the order is the first one, and sweeps in raster order."""
    flips = [axis for axis, backwards in enumerate(mirrored(order, len(dilation)), 2) if backwards]
    input, weight = input.flip(flips), weight.flip(flips)
    kernel, sizes = weight.shape[2:], input.shape[2:]
    # The offsets to the pixels that are read, the pixel itself first, and the taps there.
    offsets = list(product(*map(range, kernel)))
    taps = [tap(weight, (-1 - q for q in offset)).mT for offset in offsets]
    pixels: dict[tuple[int, ...], Tensor] = {}
    for pixel in product(*map(range, sizes)):
        right = tap(input, pixel)
        for offset, values in zip(offsets[1:], taps[1:], strict=True):
            source = tuple(p - q * d for p, q, d in zip(pixel, offset, dilation, strict=True))
            if source in pixels:
                right = right - pixels[source] @ values
        pixels[pixel] = torch.linalg.solve(taps[0].mT, right.mT).mT
    return torch.stack(list(pixels.values()), -1).unflatten(-1, sizes).flip(flips)


def inverse_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    """:func:`inverse_flow.functional.inverse_conv1d` as the plain recurrence, one pixel after the other, in the
    dtype of ``input``, float32 at least: what rounding alone costs. Same arguments and errors."""
    return _recurrence(1, input, weight, bias, order, groups, dilation, corner)


def inverse_conv1d_dense(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    """:func:`inverse_flow.functional.inverse_conv1d` as a dense solve in float64: the oracle. Returns float64."""
    return _dense(1, input, weight, bias, order, groups, dilation, corner)


def inverse_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "top_left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    """:func:`inverse_flow.functional.inverse_conv2d` as the plain recurrence, one pixel after the other, in the
    dtype of ``input``, float32 at least: what rounding alone costs. Same arguments and errors."""
    return _recurrence(2, input, weight, bias, order, groups, dilation, corner)


def inverse_conv2d_dense(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "top_left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    """:func:`inverse_flow.functional.inverse_conv2d` as a dense solve in float64: the oracle. Returns float64."""
    return _dense(2, input, weight, bias, order, groups, dilation, corner)


def inverse_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "front_top_left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    """:func:`inverse_flow.functional.inverse_conv3d` as the plain recurrence, one pixel after the other, in the
    dtype of ``input``, float32 at least: what rounding alone costs. Same arguments and errors."""
    return _recurrence(3, input, weight, bias, order, groups, dilation, corner)


def inverse_conv3d_dense(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "front_top_left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    """:func:`inverse_flow.functional.inverse_conv3d` as a dense solve in float64: the oracle. Returns float64."""
    return _dense(3, input, weight, bias, order, groups, dilation, corner)
