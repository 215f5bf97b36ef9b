"""Space to channels."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor

from inverse_flow.flows.base import FlowLayer, Shape, check_images, zero_logdet

Pattern: TypeAlias = Literal["checkerboard", "patch", "column"]


class Squeeze(FlowLayer):
    """(B, C, H, W) → (B, C·f², H/f, W/f) in the order of ``F.pixel_unshuffle``; log-determinant 0.

    Signals (B, C, L) become (B, C·f, L/f), and volumes (B, C, D, H, W) become (B, C·f³, D/f, H/f, W/f), in the same
    order: channel, then offset along D, H and W. Written out, since ``F.pixel_unshuffle`` knows neither and returns an
    empty batch with its shape unchanged.

    The patterns of Orozco et al., "InvertibleNetworks.jl", 2023: which of the f² channels made of one, counted from 0,
    a pixel of a 4×4 image goes to ::

        checkerboard    patch      column
          0 1 0 1      0 0 1 1    0 1 2 3
          2 3 2 3      0 0 1 1    0 1 2 3
          0 1 0 1      2 2 3 3    0 1 2 3
          2 3 2 3      2 2 3 3    0 1 2 3

    Args:
        factor: f; D, H and W must be multiples of it.
        pattern: ``"checkerboard"``: each channel has every f-th pixel of each axis. ``"patch"``: each has a part
            of the image of its own. ``"column"``: the image, read column by column (the first axis fastest), is cut
            into f² pieces, and each is written into its channel in the same order; export it for fixed
            sizes, since with open ones ``torch.export`` demands more than that they are multiples of f.

    Raises:
        ValueError: a factor below 1; a pattern that does not exist; sizes that are no multiple of the factor.
    """

    uses_context = False

    def __init__(self, factor: int = 2, pattern: Pattern = "checkerboard") -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"the factor of a squeeze must be at least 1, got {factor}")
        if pattern not in get_args(Pattern):
            raise ValueError(f'the pattern must be "checkerboard", "patch" or "column", got {pattern!r}')
        self.factor, self.pattern = factor, pattern

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, spatial=True)
        shape = self.output_shape(tuple(x.shape[1:]))
        if self.pattern == "column":
            return _reshape_by_columns(x, shape), zero_logdet(x)
        blocks = x
        for axis in range(x.dim() - 1, 1, -1):
            blocks = blocks.unflatten(axis, (-1, self.factor) if self.pattern == "checkerboard" else (self.factor, -1))
        # (B, C, D/f, f, H/f, f, W/f, f), or of patches each f in front: the offsets go to the channels.
        sizes, offsets = range(2, blocks.dim(), 2), range(3, blocks.dim(), 2)
        if self.pattern == "patch":
            sizes, offsets = offsets, sizes
        return blocks.permute(0, 1, *offsets, *sizes).reshape(x.shape[0], *shape).contiguous(), zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, spatial=True)
        shape = self.input_shape(tuple(z.shape[1:]))
        if self.pattern == "column":
            return _reshape_by_columns(z, shape), zero_logdet(z)
        dimensions = z.dim() - 2
        blocks = z.unflatten(1, (-1, *(self.factor,) * dimensions))
        # (B, C, f, f, f, D, H, W): every offset goes behind its size, or of patches before it.
        pairs = [
            (axis + dimensions, axis)[:: 1 if self.pattern == "checkerboard" else -1] for axis in range(2, z.dim())
        ]
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
        return f"{self.factor}" if self.pattern == "checkerboard" else f"{self.factor}, pattern={self.pattern!r}"


def _reshape_by_columns(x: Tensor, shape: Shape) -> Tensor:
    """``x.reshape(-1, *shape)`` for the order in memory in which the first axis of an image is the fastest."""
    axes = range(x.dim() - 1, 1, -1)
    channels, *sizes = shape
    return x.permute(0, 1, *axes).reshape(x.shape[0], channels, *sizes[::-1]).permute(0, 1, *axes).contiguous()
