"""Space to channels by the Haar wavelet transform."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from inverse_flow.flows.base import check_images, logdet_dtype, zero_logdet
from inverse_flow.flows.squeeze import Squeeze

BandOrder: TypeAlias = Literal["band", "channel"]


class HaarSqueeze(Squeeze):
    """(B, C, H, W) → (B, 4·C, H/2, W/2) by one step of the orthonormal Haar transform; log-determinant 0.

    Along every axis in turn a pair of neighbours (a, b) becomes their low-pass (a + b)/√2 and their high-pass
    (a − b)/√2. That gives two sub-bands of a signal (B, C, L), four of an image, and eight of a volume. They are
    numbered in binary, a digit for each of D, H and W with W the lowest, and 1 for high-pass. So of an image, band 0 is
    twice the mean of a 2×2 block, band 1 left minus right, band 2 top minus bottom, band 3 the difference of the
    diagonals, each but the first divided by 2.

    The transform is orthogonal, and its inverse is its transpose. Source: Haar, "Zur Theorie der orthogonalen
    Funktionensysteme", 1910; as the squeeze of a flow: Ardizzone et al., "Guided Image Generation with Conditional
    Invertible Neural Networks", 2019.

    Args:
        order: ``"band"``: output channel ``band · C + c``, so that a :class:`~inverse_flow.flows.Split` sends the
            coarse picture on. ``"channel"``: output channel ``c · bands + band``, as :class:`Squeeze` counts, so that
            what came from the first half of the channels stays the first half.

    Raises:
        ValueError: an order that does not exist; an odd size; channels that are no multiple of the number of bands.
    """

    def __init__(self, order: BandOrder = "band") -> None:
        super().__init__(2)
        if order not in ("band", "channel"):
            raise ValueError(f'order must be "band" or "channel", got {order!r}')
        self.order = order

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, spatial=True)
        self.output_shape(tuple(x.shape[1:]))
        channels, axes = x.shape[1], range(2, x.dim())
        z = x.to(logdet_dtype(x.dtype))
        for axis in reversed(axes):
            first, second = z.unflatten(axis, (-1, 2)).unbind(axis + 1)
            # The band of the axis that comes last is the slowest index.
            z = torch.cat((first + second, first - second), dim=1)
        if self.order == "channel":
            z = z.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1, 2)
        return (z * _scale(x)).to(x.dtype), zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, spatial=True)
        channels = self.input_shape(tuple(z.shape[1:]))[0]
        x = z.to(logdet_dtype(z.dtype))
        if self.order == "channel":
            x = x.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1, 2)
        for axis in range(2, z.dim()):
            low, high = x.chunk(2, dim=1)
            x = torch.stack((low + high, low - high), dim=axis + 1).flatten(axis, axis + 1)
        return (x * _scale(z)).to(z.dtype), zero_logdet(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transform is orthogonal: both go back through its inverse."""
        return self.inverse(z)[0], self.inverse(grad_z)[0]

    def extra_repr(self) -> str:
        return f'order="{self.order}"'


def _scale(x: Tensor) -> float:
    """1/√2 for each axis, in one factor: exactly ½ for images."""
    return math.pow(0.5, (x.dim() - 2) / 2)
