"""Rivals: other ways to solve, without a kernel of one's own, and other convolutions in place of the inverse one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from runs import Candidate
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.flows import FlowLayer, PeriodicConv
from inverse_flow.flows.base import count_pixels, sum_example
from inverse_flow.models import KINDS, GlowConfig, ImageFlow
from inverse_flow.models.config import InverseConvKind
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


class SelfNormalizing(FlowLayer):
    """z = W x, a periodic convolution, learned together with a convolution R ≈ W⁻¹ of the same size, which samples.

    Exact: z, and the value of each log-determinant: W's of ``forward``, R's of ``inverse``. Approximate: ``inverse`` is
    R, so a round trip comes back only about; and the gradient of log|det W| in W, the exact one with R for W⁻¹.
    R follows W by the gradient of −penalty·‖R W x − x‖², which ``forward`` adds to that of its log-determinant, not to
    its value. Keller et al., "Self Normalizing Flows", 2021; with zeros around the image in place of its other side,
    the log-determinant would need the whole matrix.

    Args:
        layer: W at the beginning, near the identity I; R begins as 2 I − W. Its kernel is odd.
        penalty: of a squared error of reconstruction, summed over an image, in nats.
    """

    uses_context = False

    def __init__(self, layer: PeriodicConv, penalty: float) -> None:
        super().__init__()
        self.penalty = penalty
        if any(taps % 2 == 0 for taps in layer.kernel_size):
            raise ValueError(f"the kernel must be odd, to be turned round, got {layer.kernel_size}")
        self.direct, self.back = layer, copy.deepcopy(layer)
        with torch.no_grad():
            self.back.weight.copy_(2 * nn.init.dirac_(torch.empty_like(layer.weight)) - layer.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logdet = self.direct.log_det(x)
        if torch.is_grad_enabled():
            learned = self._what_is_learned(x)
            logdet = logdet + (learned - learned.detach())
        return self.direct.convolve(x), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.back(z)

    def _what_is_learned(self, x: Tensor) -> Tensor:
        weight, approximate, x = self.direct.weight, self.back.weight.detach(), x.detach()
        turned = approximate.flip(list(range(2, weight.dim()))).transpose(0, 1)
        error = self.back.convolve(self.direct.convolve(x)) - x
        return count_pixels(x) * (turned * weight).sum() - self.penalty * sum_example(error.square())


@dataclass(frozen=True)
class SelfNormalizingConfig(GlowConfig):
    inverse_conv: InverseConvKind = "periodic"
    # The default of the release.
    penalty: float = 1.0


class SelfNormalizingFlow(ImageFlow):
    """A Glow with a :class:`SelfNormalizing` convolution at the head of every step."""

    config_type = SelfNormalizingConfig

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.config.memory_efficient:
            raise ValueError("memory_efficient needs inverses, and R is one only about")
        for path, layer in list(self.named_modules()):
            if isinstance(layer, PeriodicConv):
                self.set_submodule(path, SelfNormalizing(layer, self.config.penalty))


KINDS[SelfNormalizingFlow.__name__] = SelfNormalizingFlow
OTHER_CONVOLUTIONS = ("emerging", "periodic", "exponential", "woodbury")
# A step of InverseFlow with another layer in place of the inverse convolution.
RIVALS = {
    **{kind.capitalize(): Candidate("Glow", {"inverse_conv": kind}) for kind in OTHER_CONVOLUTIONS},
    "SNF": Candidate(SelfNormalizingFlow.__name__, {}),
}
# Of these a round trip says how good the inverse is, and not whether it is right.
APPROXIMATE = ("SNF",)
