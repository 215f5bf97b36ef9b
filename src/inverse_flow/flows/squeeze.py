"""Space to channels."""

from __future__ import annotations

from torch import Tensor

from inverse_flow.flows.base import FlowLayer, Shape, check_images, zero_logdet


class Squeeze(FlowLayer):
    """(B, C, H, W) → (B, C·f², H/f, W/f) in the order of ``F.pixel_unshuffle``; log-determinant 0.

    Written out, since ``F.pixel_unshuffle`` returns an empty batch with its shape unchanged.

    Args:
        factor: f; H and W must be multiples of it.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"the factor of a squeeze must be at least 1, got {factor}")
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x)
        shape = self.output_shape(tuple(x.shape[1:]))
        blocks = x.unflatten(3, (-1, self.factor)).unflatten(2, (-1, self.factor))
        return blocks.permute(0, 1, 3, 5, 2, 4).reshape(x.shape[0], *shape), zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z)
        shape = self.input_shape(tuple(z.shape[1:]))
        blocks = z.unflatten(1, (-1, self.factor, self.factor))
        return blocks.permute(0, 1, 4, 2, 5, 3).reshape(z.shape[0], *shape), zero_logdet(z)

    def output_shape(self, shape: Shape) -> Shape:
        channels, height, width = shape
        f = self.factor
        if height % f or width % f:
            raise ValueError(f"a squeeze by {f} needs height and width divisible by {f}, got {height} × {width}")
        return channels * f * f, height // f, width // f

    def input_shape(self, shape: Shape) -> Shape:
        channels, height, width = shape
        f = self.factor
        if channels % (f * f):
            raise ValueError(f"undoing a squeeze by {f} needs channels divisible by {f * f}, got {channels}")
        return channels // (f * f), height * f, width * f

    def extra_repr(self) -> str:
        return f"{self.factor}"
