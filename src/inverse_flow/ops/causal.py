r"""The causal convolution A(w) and its adjoint in plain PyTorch, for any order of each group: of signals, images and
volumes.

.. math:: y_{b,o,p} = \sum_{c,\delta} w_{o,c,k-1-\delta}\, x_{b,c,p-\delta}

(order ``left``, ``top_left`` or ``front_top_left``; the others mirror the image). PyTorch's convolution does the work
and its autograd the gradients, so this file is also what sampling runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.ops.spec import GENERAL, IDENTITY, UNIT_TRIANGULAR, Orders, Spec

# PyTorch's convolutions and their adjoints, by the number of dimensions.
CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
    3: (F.conv3d, F.conv_transpose3d),
}


def mirrored(order: int, dimensions: int) -> list[bool]:
    """Whether an order runs backwards along each of the axes: its bits, those of the last axis lowest."""
    return [bool(order >> bit & 1) for bit in reversed(range(dimensions))]


def corner_index(order: int, kernel: Sequence[int]) -> tuple[int, ...]:
    """Where in the kernel window the tap lies that meets the output pixel itself."""
    return tuple(0 if back else size - 1 for size, back in zip(kernel, mirrored(order, len(kernel)), strict=True))


def tap(windows: Tensor, place: Iterable[int]) -> Tensor:
    """The values (...) in one place of every window (..., *kernel)."""
    index: Any = (..., *place)
    return windows[index]


def corner_taps(weight: Tensor, orders: Orders) -> Tensor:
    """M of every group: (groups, C / groups, C / groups)."""
    grouped = weight.unflatten(0, (len(orders), -1))
    corners = [corner_index(order, weight.shape[2:]) for order in orders]
    if len(set(corners)) == 1:
        return tap(grouped, corners[0])
    return torch.stack([tap(window, corner) for window, corner in zip(grouped, corners, strict=True)])


def with_corner_taps(weight: Tensor, matrices: Tensor, orders: Orders) -> Tensor:
    """``weight`` with other corner taps: ``matrices`` as :func:`corner_taps` gives them. Nothing is written in place,
    so that compilers can follow."""
    grouped = weight.unflatten(0, (len(orders), -1))
    corners = [corner_index(order, weight.shape[2:]) for order in orders]
    if len(set(corners)) == 1:
        return _with_corner(grouped, matrices, corners[0]).flatten(0, 1)
    parts = zip(grouped, matrices, corners, strict=True)
    return torch.cat([_with_corner(window, matrix, corner) for window, matrix, corner in parts])


def _with_corner(windows: Tensor, values: Tensor, corner: tuple[int, ...]) -> Tensor:
    """(..., *kernel) with ``values`` (...) in one place of every window."""
    if not corner:
        return values
    index, *rest = corner
    axis = -len(corner)
    return windows.select_scatter(_with_corner(windows.select(axis, index), values, tuple(rest)), axis, index)


def read_part(weight: Tensor, spec: Spec) -> Tensor:
    """``weight`` with zeros where the operator does not read it: linear, and its own adjoint."""
    if spec.corner == GENERAL:
        return weight
    taps = corner_taps(weight, spec.orders)
    read = taps.tril(-1) if spec.corner == UNIT_TRIANGULAR else torch.zeros_like(taps)
    return with_corner_taps(weight, read, spec.orders)


def effective_weight(weight: Tensor, spec: Spec) -> Tensor:
    """``weight`` with the entries that the corner kind does not read replaced by those of the identity."""
    if spec.corner == GENERAL:
        return weight
    taps = corner_taps(weight, spec.orders)
    unit = torch.eye(taps.shape[-1], dtype=taps.dtype, device=taps.device)
    whole = taps.tril(-1) + unit if spec.corner == UNIT_TRIANGULAR else unit.expand_as(taps)
    return with_corner_taps(weight, whole, spec.orders)


def folded_taps(weight: Tensor, spec: Spec) -> Tensor:
    """W′_δ = M⁻¹ W_δ of every tap but the corner, with zeros in the place of that, in float32 at least."""
    whole = effective_weight(weight, spec).to(torch.promote_types(weight.dtype, torch.float32))
    corners = corner_taps(whole, spec.orders)
    taps = with_corner_taps(whole, torch.zeros_like(corners), spec.orders)
    if spec.corner == IDENTITY:
        return taps
    columns = taps.unflatten(0, (len(spec.orders), -1)).flatten(2)
    if spec.corner == UNIT_TRIANGULAR:
        folded = torch.linalg.solve_triangular(corners, columns, upper=False, unitriangular=True)
    else:
        folded = torch.linalg.solve_ex(corners, columns).result  # looks at no value, so that a GPU need not wait
    return folded.reshape(taps.shape)


def limit_row_sums(weight: Tensor, spec: Spec, most: float) -> Tensor:
    """``weight`` with each row o of the folded taps scaled by min(1, ``most`` / s_o), s_o = Σ |W′_oδ| over inputs and
    taps δ ≠ 0. The corner tap stays, and so does every bit where no row sum is larger."""
    taps = folded_taps(weight, spec)
    sums = taps.abs().flatten(1).sum(1)
    surplus = taps.flatten(1) * (1 - most / sums.clamp(min=most))[:, None]
    corners = corner_taps(effective_weight(weight, spec), spec.orders).to(taps.dtype)
    with without_autocast(weight.device.type):
        unfolded = corners @ surplus.unflatten(0, (len(spec.orders), -1))
    return (weight - unfolded.reshape(weight.shape)).to(weight.dtype)


def per_channel(values: Tensor, images: Tensor) -> Tensor:
    """(C,) in a shape that broadcasts against ``images`` (B, C, ...)."""
    return values.view(-1, *(1,) * (images.dim() - 2))


def sum_channels(images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, C, ...) to (C,): the sum over everything but the channels."""
    return images.sum((0, *range(2, images.dim())), dtype=dtype)


def _runs(orders: Orders, channels: int) -> list[tuple[int, slice]]:
    """(order, channel slice) of each run of neighbouring groups that share an order."""
    runs, start = [], 0
    for order, members in groupby(orders):
        stop = start + len(list(members)) * channels
        runs.append((order, slice(start, stop)))
        start = stop
    return runs


def _reach(weight: Tensor, dilation: Sequence[int] | None) -> list[int]:
    """How far the taps reach along every axis."""
    kernel = weight.shape[2:]
    return [(size - 1) * step for size, step in zip(kernel, dilation or (1,) * len(kernel), strict=True)]


def _padding(order: int, reach: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) of every axis, where taps reach so far: all of it lies on the side of the order's corner."""
    backwards = mirrored(order, len(reach))
    return [(0, size) if back else (size, 0) for size, back in zip(reach, backwards, strict=True)]


def _pad(images: Tensor, padding: list[tuple[int, int]]) -> Tensor:
    return F.pad(images, [size for pair in reversed(padding) for size in pair])


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Within it autocast is off; on the meta device, which has none, it does nothing."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def padded(input: Tensor, weight: Tensor, orders: Orders, dilation: Sequence[int] | None = None) -> Tensor:
    """``input`` with zeros on the side of the corner of each group's order, as far as the taps reach."""
    runs = _runs(orders, weight.shape[1])
    parts = [_pad(input[:, channels], _padding(order, _reach(weight, dilation))) for order, channels in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def convolve(input: Tensor, weight: Tensor, spec: Spec, dilation: Sequence[int] | None = None) -> Tensor:
    """A(w) x, or A(w)ᵀ x where ``spec`` is transposed, reading every entry of ``weight`` whatever the corner kind.

    One grouped convolution serves all orders: the kernel window already has its corner tap on the right side, so
    only the padding differs from group to group. Autocast is switched off inside, since a convolution rounded to
    half precision would no longer be the inverse of the solve.
    """
    if weight.dtype != input.dtype:
        return convolve(input.to(weight.dtype), weight, spec, dilation).to(input.dtype)
    convolution, adjoint = CONVOLUTIONS[weight.dim() - 2]
    options = {"groups": len(spec.orders), "dilation": 1 if dilation is None else tuple(dilation)}
    with without_autocast(input.device.type):
        if not spec.transposed:
            output: Tensor = convolution(padded(input, weight, spec.orders, dilation), weight, **options)
            return output
        runs = _runs(spec.orders, weight.shape[1])
        paddings = [_padding(order, _reach(weight, dilation)) for order, _ in runs]
        return _crop(adjoint(input, weight, **options), input, runs, paddings)


def convolve_mixed(
    input: Tensor, weight: Tensor, bias: Tensor | None, orders: Orders, dilation: Sequence[int] | None = None
) -> Tensor:
    """A(w) K x + b for a matrix K that mixes all channels of a pixel, where ``weight`` is w K: (C, C, *kernel), each
    output channel with the window of its group's order.

    The image is padded on all sides, and every group keeps the part that the order's own padding would have given.
    For channels as few as a flow has, that is less work than the grouped convolution and K by themselves.
    """
    reach = _reach(weight, dilation)
    runs = _runs(orders, len(weight) // len(orders))
    step = 1 if dilation is None else tuple(dilation)
    with without_autocast(input.device.type):
        full = CONVOLUTIONS[len(reach)][0](input, weight, bias, padding=reach, dilation=step)
    # What lies on the other side of the order's own padding is too much.
    too_much = [[(after, before) for before, after in _padding(order, reach)] for order, _ in runs]
    return _crop(full, input, runs, too_much)


def _crop(full: Tensor, like: Tensor, runs: list[tuple[int, slice]], paddings: list[list[tuple[int, int]]]) -> Tensor:
    """Of each run of channels the part as large as ``like`` behind what lies before it."""
    parts = []
    for (_, channels), padding in zip(runs, paddings, strict=True):
        part = full[:, channels]
        for axis, (before, _) in enumerate(padding, 2):
            part = part.narrow(axis, before, like.shape[axis])
        parts.append(part)
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)
