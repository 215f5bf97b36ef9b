"""Space to channels."""

from __future__ import annotations

from torch import Tensor

from inverse_flow.flows.base import FlowLayer, Shape, check_images, zero_logdet


class Squeeze(FlowLayer):
    """(B, C, H, W) → (B, C·f², H/f, W/f) in the order of ``F.pixel_unshuffle``; log-determinant 0.

    Signals (B, C, L) become (B, C·f, L/f), and volumes (B, C, D, H, W) become (B, C·f³, D/f, H/f, W/f), in the same
    order: channel, then offset along D, H and W. Written out, since ``F.pixel_unshuffle`` knows neither and returns an
    empty batch with its shape unchanged.

    Args:
        factor: f; D, H and W must be multiples of it.
    """

    uses_context = False

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"the factor of a squeeze must be at least 1, got {factor}")
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, spatial=True)
        shape = self.output_shape(tuple(x.shape[1:]))
        blocks = x
        for axis in range(x.dim() - 1, 1, -1):
            blocks = blocks.unflatten(axis, (-1, self.factor))
        # (B, C, D/f, f, H/f, f, W/f, f): the offsets go to the channels.
        order = (0, 1, *range(3, blocks.dim(), 2), *range(2, blocks.dim(), 2))
        return blocks.permute(order).reshape(x.shape[0], *shape).contiguous(), zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, spatial=True)
        shape = self.input_shape(tuple(z.shape[1:]))
        dimensions = z.dim() - 2
        blocks = z.unflatten(1, (-1, *(self.factor,) * dimensions))
        # (B, C, f, f, f, D, H, W): every offset goes behind its size.
        pairs = ((axis + dimensions, axis) for axis in range(2, 2 + dimensions))
        order = (0, 1, *(axis for pair in pairs for axis in pair))
        return blocks.permute(order).reshape(z.shape[0], *shape).contiguous(), zero_logdet(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both go back to where they came from."""
        return self.inverse(z)[0], self.inverse(grad_z)[0]

    def output_shape(self, shape: Shape) -> Shape:
        channels, *sizes = shape
        f = self.factor
        if any(size % f for size in sizes):
            given = " × ".join(map(str, sizes))
            raise ValueError(f"a squeeze by {f} needs sizes divisible by {f}, got {given}")
        return (channels * f ** len(sizes), *(size // f for size in sizes))

    def input_shape(self, shape: Shape) -> Shape:
        channels, *sizes = shape
        f = self.factor
        gathered = f ** len(sizes)
        if channels % gathered:
            raise ValueError(f"undoing a squeeze by {f} needs channels divisible by {gathered}, got {channels}")
        return (channels // gathered, *(size * f for size in sizes))

    def extra_repr(self) -> str:
        return f"{self.factor}"
