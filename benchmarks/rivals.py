"""Other ways to solve, as rivals: what the inverse of a convolution costs without a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.reference import dense_matrix

Solve = Callable[[Tensor], Tensor]


def by_pixel(weight: Tensor, height: int, width: int) -> Tensor:
    """A(w) with rows and columns in the order (pixel, channel), in which it is lower triangular: unit triangular
    corner, order top-left."""
    channels, pixels = len(weight), height * width
    matrix = dense_matrix(weight, height, width, corner="unit_triangular")
    return matrix.view(channels, pixels, channels, pixels).permute(1, 0, 3, 2).reshape(channels * pixels, -1)


def _solve_pixels(matrix: Tensor, images: Tensor) -> Tensor:
    """Of images (B, C, pixels)."""
    flat = images.transpose(1, 2).flatten(1)
    solved = torch.linalg.solve_triangular(matrix, flat.mT, upper=False, unitriangular=True).mT
    return solved.unflatten(1, (images.shape[2], -1)).transpose(1, 2)


def row_solver(size: int, weight: Tensor) -> Solve:
    """Rows from the top: what the rows above contribute is a convolution, and a row by itself a triangular matrix."""
    above, row_matrix, reach = weight[:, :, :-1], by_pixel(weight[:, :, -1:], 1, size), weight.shape[-1] - 1

    def solve(images: Tensor) -> Tensor:
        output = torch.zeros_like(images)
        for i in range(size):
            right = images[:, :, i]
            if reach and i:
                first = max(i - reach, 0)
                taps = above[:, :, reach - (i - first) :]
                right = right - F.conv2d(F.pad(output[:, :, first:i], (reach, 0, 0, 0)), taps)[:, :, 0]
            output[:, :, i] = _solve_pixels(row_matrix, right)
        return output

    return solve


def dense_solver(size: int, weight: Tensor) -> Solve:
    """The whole matrix, made once, and a triangular solve."""
    matrix = by_pixel(weight, size, size)
    return lambda images: _solve_pixels(matrix, images.flatten(2)).reshape(images.shape)


class PlainSolve(nn.Module):
    """An :class:`InverseConv2d` whose solve is one gather and one matrix product for each of the H + W − 1 diagonals.

    The pixels of a diagonal do not depend on one another, so all of them are computed at once, in all images, channels
    and groups. The corner is folded into the other taps beforehand, like in the kernels. The weights are fixed.
    """

    taps: Tensor
    corner_inverse: Tensor

    def __init__(self, layer: InverseConv2d) -> None:
        super().__init__()
        self.groups, self.kernel = layer.groups, layer.kernel_size
        self.orders = [layer.order] * layer.groups if isinstance(layer.order, str) else list(layer.order)
        with torch.no_grad():
            taps = layer.complete_weight().double().unflatten(0, (self.groups, -1))
            # Every group mirrored, so that its recurrence starts at the top left.
            mirrored = torch.stack([_mirror(w, order) for w, order in zip(taps, self.orders, strict=True)])
            corner_inverse = torch.linalg.inv(mirrored[..., -1, -1])
            folded = torch.einsum("gop,gpcij->goijc", corner_inverse, mirrored)
            folded[:, :, -1, -1] = 0
            dtype = layer.weight.dtype
            self.register_buffer("corner_inverse", corner_inverse.to(dtype))
            self.register_buffer("taps", folded.flatten(2).mT.to(dtype).contiguous())
            self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The solve, and a log-determinant of zeros: it is only sampled with."""
        batch, _, height, width = x.shape
        if self.bias is not None:
            x = x - self.bias.view(-1, 1, 1)
        groups = zip(x.unflatten(1, (self.groups, -1)).unbind(1), self.orders, strict=True)
        right = torch.stack([_mirror(part, order) for part, order in groups])  # (G, B, C, H, W)
        right = (right.permute(3, 4, 0, 1, 2) @ self.corner_inverse.mT).flatten(0, 1)  # (pixels, G, B, C)
        (kernel_h, kernel_w), padded_width = self.kernel, width + self.kernel[1] - 1
        state = right.new_zeros((height + kernel_h - 1) * padded_width, *right.shape[1:])
        for pixels, targets, windows in _diagonals(height, width, kernel_h, kernel_w, x.device):
            seen = state[windows].unflatten(0, (len(pixels), -1))  # (n, taps, G, B, C)
            seen = seen.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (G, n·B, taps·C)
            known = (seen @ self.taps).unflatten(1, (len(pixels), batch)).transpose(0, 1)
            state[targets] = right[pixels] - known
        images = state.unflatten(0, (-1, padded_width))[kernel_h - 1 :, kernel_w - 1 :].permute(2, 3, 4, 0, 1)
        parts = [_mirror(part, order) for part, order in zip(images, self.orders, strict=True)]
        return torch.cat(parts, dim=1), x.new_zeros(batch)


def _mirror(images: Tensor, order: str) -> Tensor:
    return images.flip([dim for dim, side in ((-2, "bottom"), (-1, "right")) if side in order])


@cache
def _diagonals(
    height: int, width: int, kernel_h: int, kernel_w: int, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For every diagonal its pixels, their places in the padded image, and those of the window of each."""
    padded_width = width + kernel_w - 1
    window = torch.arange(kernel_h)[:, None] * padded_width + torch.arange(kernel_w)
    found = []
    for diagonal in range(height + width - 1):
        rows = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        columns = diagonal - rows
        first = rows * padded_width + columns
        places = (first[:, None] + window.flatten()).flatten()
        last = first + window[-1, -1]
        found.append(tuple(index.to(device) for index in (rows * width + columns, last, places)))
    return found  # type: ignore[return-value]
