r"""The causal convolution A(w) and its adjoint in plain PyTorch, for any order of each group.

.. math:: y_{b,o,i,j} = \sum_{c,p,q} w_{o,c,k_H-1-p,k_W-1-q}\, x_{b,c,i-p,j-q}

(order ``top_left``; the others mirror the image). PyTorch's convolution does the work and its autograd the
gradients, so this file is also what sampling runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.ops.spec import GENERAL, IDENTITY, MIRROR_COLUMNS, MIRROR_ROWS, UNIT_TRIANGULAR, Orders, Spec


def corner_index(order: int, kernel_h: int, kernel_w: int) -> tuple[int, int]:
    """Row and column, in the kernel window, of the tap that meets the output pixel itself."""
    return (0 if order & MIRROR_ROWS else kernel_h - 1, 0 if order & MIRROR_COLUMNS else kernel_w - 1)


def corner_taps(weight: Tensor, orders: Orders) -> Tensor:
    """M of every group: (groups, C / groups, C / groups)."""
    grouped = weight.unflatten(0, (len(orders), -1))
    corners = [corner_index(order, *weight.shape[2:]) for order in orders]
    if len(set(corners)) == 1:
        row, column = corners[0]
        return grouped[..., row, column]
    return torch.stack([window[..., row, column] for window, (row, column) in zip(grouped, corners, strict=True)])


def with_corner_taps(weight: Tensor, matrices: Tensor, orders: Orders) -> Tensor:
    """``weight`` with other corner taps: ``matrices`` as :func:`corner_taps` gives them. Nothing is written in place,
    so that compilers can follow."""
    grouped = weight.unflatten(0, (len(orders), -1))
    corners = [corner_index(order, *weight.shape[2:]) for order in orders]
    if len(set(corners)) == 1:
        return _with_corner(grouped, matrices, *corners[0]).flatten(0, 1)
    parts = zip(grouped, matrices, corners, strict=True)
    return torch.cat([_with_corner(window, matrix, *corner) for window, matrix, corner in parts])


def _with_corner(windows: Tensor, values: Tensor, row: int, column: int) -> Tensor:
    """(..., kH, kW) with ``values`` (...) in one place of every window."""
    return windows.select_scatter(windows[..., row, :].select_scatter(values, -1, column), -2, row)


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
    with _without_autocast(weight.device.type):
        unfolded = corners @ surplus.unflatten(0, (len(spec.orders), -1))
    return (weight - unfolded.reshape(weight.shape)).to(weight.dtype)


def _runs(orders: Orders, channels: int) -> list[tuple[int, slice]]:
    """(order, channel slice) of each run of neighbouring groups that share an order."""
    runs, start = [], 0
    for order, members in groupby(orders):
        stop = start + len(list(members)) * channels
        runs.append((order, slice(start, stop)))
        start = stop
    return runs


def _padding(order: int, kernel_h: int, kernel_w: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom): all of the padding lies on the side of the order's corner."""
    rows, columns = kernel_h - 1, kernel_w - 1
    left, right = (0, columns) if order & MIRROR_COLUMNS else (columns, 0)
    top, bottom = (0, rows) if order & MIRROR_ROWS else (rows, 0)
    return left, right, top, bottom


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    # The meta device has none.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def convolve(input: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    """A(w) x, or A(w)ᵀ x where ``spec`` is transposed, reading every entry of ``weight`` whatever the corner kind.

    One grouped convolution serves all orders: the kernel window already has its corner tap on the right side, so
    only the padding differs from group to group. Autocast is switched off inside, since a convolution rounded to
    half precision would no longer be the inverse of the solve.
    """
    if weight.dtype != input.dtype:
        return convolve(input.to(weight.dtype), weight, spec).to(input.dtype)
    groups, (kernel_h, kernel_w) = len(spec.orders), weight.shape[2:]
    runs = _runs(spec.orders, weight.shape[1])
    with _without_autocast(input.device.type):
        if not spec.transposed:
            padded = [F.pad(input[:, channels], _padding(order, kernel_h, kernel_w)) for order, channels in runs]
            return F.conv2d(padded[0] if len(runs) == 1 else torch.cat(padded, 1), weight, groups=groups)
        full = F.conv_transpose2d(input, weight, groups=groups)
        return _crop(full, input, runs, [_padding(order, kernel_h, kernel_w) for order, _ in runs])


def convolve_mixed(input: Tensor, weight: Tensor, bias: Tensor | None, orders: Orders) -> Tensor:
    """A(w) K x + b for a matrix K that mixes all channels of a pixel, where ``weight`` is w K: (C, C, kH, kW), each
    output channel with the window of its group's order.

    The image is padded on all sides, and every group keeps the part that the order's own padding would have given.
    For channels as few as a flow has, that is less work than the grouped convolution and K by themselves.
    """
    kernel_h, kernel_w = weight.shape[2:]
    runs = _runs(orders, len(weight) // len(orders))
    with _without_autocast(input.device.type):
        full = F.conv2d(input, weight, bias, padding=(kernel_h - 1, kernel_w - 1))
    # What lies on the other side of the order's own padding is too much.
    return _crop(full, input, runs, [_padding(_opposite(order), kernel_h, kernel_w) for order, _ in runs])


def _opposite(order: int) -> int:
    return order ^ (MIRROR_ROWS | MIRROR_COLUMNS)


def _crop(
    full: Tensor, like: Tensor, runs: list[tuple[int, slice]], margins: list[tuple[int, int, int, int]]
) -> Tensor:
    """Of each run of channels the part as large as ``like`` behind the margin (left, right, top, bottom)."""
    height, width = like.shape[2:]
    parts = [
        full[:, channels, top : top + height, left : left + width]
        for (_, channels), (left, _, top, _) in zip(runs, margins, strict=True)
    ]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)
