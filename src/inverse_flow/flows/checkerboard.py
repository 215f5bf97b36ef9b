"""Coupling with a checkerboard mask."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_images, logdet_dtype, sum_example
from inverse_flow.flows.conditioner import own_or_conv_net
from inverse_flow.flows.scale import Scale, check_scale, log_scale
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible.layer import uses_context

CheckerboardKind: TypeAlias = Literal["affine", "additive"]


class CheckerboardCoupling(FlowLayer):
    """z = m ⊙ x + (1 − m) ⊙ (x · exp(s(m ⊙ x)) + t(m ⊙ x)); log-determinant Σ (1 − m) ⊙ s.

    The mask m is 1 at the pixels whose coordinates add up to ``parity`` modulo 2: they condition and stay, in every
    channel, and the others change. Two layers of different parity change every pixel. It needs no second channel, so
    it works on images as they are. Dinh, Sohl-Dickstein & Bengio, "Real NVP", 2016, section 3.4, equation 9; s is that
    of :class:`AffineCoupling`.

    Args:
        channels: C of the images.
        hidden: width of the default conditioner, a :class:`ConvNet`.
        kind: ``"affine"``, or ``"additive"`` with s = 0.
        parity: 0 or 1.
        context_channels: channels of the context that the default conditioner takes.
        dimensions: of the default conditioner: 1 for signals (B, C, L), 2 for images, 3 for volumes.
        conditioner: a module of your own instead: ``conditioner(m ⊙ x, context)`` gives t, and for the affine kind the
            raw scales behind it, stacked along the channels: (B, 2C, H, W). What it gives where m is 1 is not used.
        scale: of the affine kind: the name of the function from raw scales to s, or the function, as for
            :class:`AffineCoupling`.

    Raises:
        ValueError: a kind, parity or scale that does not exist.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 64,
        *,
        kind: CheckerboardKind = "affine",
        parity: int = 0,
        context_channels: int = 0,
        dimensions: int = 2,
        conditioner: nn.Module | None = None,
        scale: Scale = "tanh",
    ) -> None:
        super().__init__()
        if kind not in ("affine", "additive"):
            raise ValueError(f'the kind of a checkerboard coupling must be "affine" or "additive", got {kind!r}')
        check_integer("parity", parity, least=0)
        if parity > 1:
            raise ValueError(f"the parity of a checkerboard must be 0 or 1, got {parity}")
        check_integer("channels", channels)
        self.channels, self.kind, self.parity = channels, kind, parity
        self.scale = check_scale(scale)
        out_channels = self.parameters_per_value(kind) * channels
        self.conditioner = own_or_conv_net(
            conditioner, channels, hidden, out_channels, context_channels=context_channels, dimensions=dimensions
        )

    @staticmethod
    def parameters_per_value(kind: CheckerboardKind) -> int:
        """Numbers that the conditioner gives for every value of an image."""
        return 2 if kind == "affine" else 1

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, stays = self._shift_and_log_scale(x, context)
        z = torch.where(stays, x, (x * log_scale.exp() + shift).to(x.dtype))
        return z, sum_example(log_scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, stays = self._shift_and_log_scale(z, context)
        x = torch.where(stays, z, ((z - shift) * (-log_scale).exp()).to(z.dtype))
        return x, -sum_example(log_scale)

    @property
    def uses_context(self) -> bool:
        """Whether the conditioner does."""
        return uses_context(self.conditioner)

    def extra_repr(self) -> str:
        text = f'{self.channels}, kind="{self.kind}", parity={self.parity}'
        return text if self.kind == "additive" else f"{text}, scale={self.scale!r}"

    def _shift_and_log_scale(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """t; s, zero where the mask is 1; and the mask as booleans, broadcasting against ``x``."""
        check_images(self, x, self.channels, spatial=True)
        stays = self._mask(x)
        parameters = self.conditioner(torch.where(stays, x, torch.zeros_like(x)), context)
        expected = (x.shape[0], self.parameters_per_value(self.kind) * self.channels, *x.shape[2:])
        if parameters.shape != expected:
            raise ValueError(f"the conditioner must give {expected}, got {tuple(parameters.shape)}")
        parameters = parameters.to(logdet_dtype(x.dtype))
        if self.kind == "additive":
            return parameters, torch.zeros_like(parameters), stays
        shift, raw = parameters.chunk(2, dim=1)
        return shift, torch.where(stays, torch.zeros_like(raw), log_scale(self.scale, raw)), stays

    def _mask(self, x: Tensor) -> Tensor:
        axes = [torch.arange(size, device=x.device) for size in x.shape[2:]]
        coordinates = torch.meshgrid(*axes, indexing="ij")
        return (torch.stack(coordinates).sum(0) % 2 == self.parity)[None, None]
