"""Matrices that differ from the identity by one of low rank, along the channels and along the pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_images, expand_logdet, logdet_dtype
from inverse_flow.ops.causal import without_autocast
from inverse_flow.ops.spec import SIZE_FORMS, check_integer, check_sizes

DEFAULT_RANK = 8


class Woodbury(FlowLayer):
    r"""Z = (I + U_C V_C) X (I + U_P V_P), X the image as a matrix of C channels and P = H·W pixels.

    .. math:: \log|\det| = P \log|\det(I + V_C U_C)| + C \log|\det(I + V_P U_P)|

    (Sylvester's identity), and (I + U V)⁻¹ = I − U (I + V U)⁻¹ V (Woodbury's): determinants and inverses are of d × d
    matrices for rank d. They are formed in float64 and rounded once. Every pixel sees all others, through weights that
    know where it lies, so the layer is for images of one size. Lu & Huang, "Woodbury Transformations for Deep
    Generative Flows", 2020.

    Nothing keeps I + V U from becoming singular but the log-determinant, which would be −∞ there.

    Args:
        channels: C of the images.
        size: of the images, (H, W); (L,) of signals, (D, H, W) of volumes.
        rank: d, of both products; no more than there are channels, or pixels, are used.

    Parameters:
        channel_u, channel_v: (C, d), (d, C).
        pixel_u, pixel_v: (P, d), (d, P). U_C and U_P begin as zeros, so that the layer begins as the identity.

    Raises:
        ValueError: an option that does not fit, naming it; images of another shape.
    """

    uses_context = False

    def __init__(
        self,
        channels: int,
        size: tuple[int, ...],
        rank: int = DEFAULT_RANK,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("channels", channels)
        check_integer("rank", rank)
        self.channels, self.size = channels, check_sizes("size", size, SIZE_FORMS, range(1, 4))
        self.dimensions = len(self.size)

        def factors(length: int) -> tuple[nn.Parameter, nn.Parameter]:
            used = min(rank, length)
            v = torch.randn(used, length, device=device, dtype=dtype) / math.sqrt(length)
            return nn.Parameter(torch.zeros(length, used, device=device, dtype=dtype)), nn.Parameter(v)

        self.channel_u, self.channel_v = factors(channels)
        self.pixel_u, self.pixel_v = factors(math.prod(self.size))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._transform(x, self.channel_v, self.pixel_v, 1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        channel_v, pixel_v = (
            -torch.linalg.solve_ex(_small(u, v), v.double()).result  # looks at no value: a GPU need not wait
            for u, v in ((self.channel_u, self.channel_v), (self.pixel_u, self.pixel_v))
        )
        return self._transform(z, channel_v, pixel_v, -1)

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}, rank={len(self.pixel_v)}"

    def _transform(self, x: Tensor, channel_v: Tensor, pixel_v: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """X + U_C (V_C X), then the same from the right; both commute, so their order does not matter."""
        check_images(self, x, self.channels, spatial=True)
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(f"Woodbury was built for images of size {self.size}, got {tuple(x.shape)}")
        compute = logdet_dtype(x.dtype)
        with without_autocast(x.device.type):
            matrix = x.to(compute).flatten(2)
            matrix = matrix + self.channel_u.to(compute) @ (channel_v.to(compute) @ matrix)
            matrix = matrix + (matrix @ self.pixel_u.to(compute)) @ pixel_v.to(compute)
        channel, pixel = (
            torch.linalg.slogdet(_small(u, v)).logabsdet
            for u, v in ((self.channel_u, self.channel_v), (self.pixel_u, self.pixel_v))
        )
        logdet = sign * (math.prod(self.size) * channel + self.channels * pixel)
        return matrix.to(x.dtype).reshape(x.shape), expand_logdet(logdet, x)


def _small(u: Tensor, v: Tensor) -> Tensor:
    """I + V U in float64, (d, d)."""
    return torch.eye(len(v), dtype=torch.float64, device=v.device) + v.double() @ u.double()
