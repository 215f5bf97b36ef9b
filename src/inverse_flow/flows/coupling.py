"""Additive and affine coupling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import (
    FlowLayer,
    check_images,
    first_half,
    logdet_dtype,
    per_example,
    sum_example,
    zero_logdet,
)
from inverse_flow.flows.conditioner import own_or_conv_net
from inverse_flow.flows.scale import Scale, check_scale, log_scale
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible import backpropagate
from inverse_flow.reversible.layer import uses_context


def _sum(grad: Tensor, more: Tensor | None) -> Tensor:
    return grad if more is None else grad + more


class ChannelCoupling(FlowLayer):
    """Splits the channels, x = (x₁, x₂), and changes x₂ as the conditioner of x₁ says; x₁ goes through untouched."""

    parameters_per_value: int

    def __init__(
        self,
        channels: int,
        hidden: int = 64,
        *,
        kept: int | None = None,
        context_channels: int = 0,
        dimensions: int = 2,
        conditioner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, least=2)  # to split
        self.channels = channels
        self.kept = first_half(channels) if kept is None else kept
        check_integer("kept", self.kept)
        if self.kept >= channels:
            raise ValueError(f"kept must be at most {channels - 1} of {channels} channels, got {kept}")
        self.changed = channels - self.kept
        out_channels = self.parameters_per_value * self.changed
        self.conditioner = own_or_conv_net(
            conditioner, self.kept, hidden, out_channels, context_channels=context_channels, dimensions=dimensions
        )

    @property
    def uses_context(self) -> bool:
        """Whether the conditioner does."""
        return uses_context(self.conditioner)

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def _condition(self, x1: Tensor, context: Tensor | None) -> Tensor:
        """The conditioner's output, in at least float32 even when the network itself ran in half precision."""
        parameters = self.conditioner(x1, context)
        expected = (x1.shape[0], self.parameters_per_value * self.changed, *x1.shape[2:])
        if parameters.shape != expected:
            raise ValueError(f"the conditioner must give {expected}, got {tuple(parameters.shape)}")
        result: Tensor = parameters.to(logdet_dtype(x1.dtype))
        return result

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels)
        return x[:, : self.kept], x[:, self.kept :]


class AdditiveCoupling(ChannelCoupling):
    """z₁ = x₁, z₂ = x₂ + t(x₁); log-determinant 0 (Dinh, Krueger & Bengio, "NICE", 2014).

    Args:
        channels: C ≥ 2 of the images.
        hidden: width of the default conditioner, a :class:`ConvNet`.
        kept: how many of the channels, the first ones, are x₁; ⌈C/2⌉ unless given.
        context_channels: channels of the context that the default conditioner takes.
        dimensions: of the default conditioner: 0 for vectors (B, C), 1 for signals (B, C, L), 2 for images, 3
            for volumes.
        conditioner: a module of your own instead: ``conditioner(x1, context) -> t`` of the shape of x₂.
    """

    parameters_per_value = 1

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = self._halves(x)
        z2 = x2 + self._condition(x1, context)
        return torch.cat((x1, z2.to(x.dtype)), dim=1), zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z1, z2 = self._halves(z)
        x2 = z2 - self._condition(z1, context)
        return torch.cat((z1, x2.to(z.dtype)), dim=1), zero_logdet(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x₂ = z₂ − t and ∂t = ∂z₂, with one run of the conditioner."""
        (z1, z2), (grad_z1, grad_z2) = self._halves(z), self._halves(grad_z)
        z1 = z1.detach().requires_grad_()
        with torch.enable_grad():
            shift = self._condition(z1, context)
        backpropagate([shift], [grad_z2.to(shift.dtype)])
        x2 = (z2 - shift).to(z.dtype)
        return torch.cat((z1, x2), dim=1), torch.cat((_sum(grad_z1, z1.grad), grad_z2), dim=1)


class AffineCoupling(ChannelCoupling):
    """z₁ = x₁, z₂ = x₂ · exp(s(x₁)) + t(x₁); log-determinant Σ s (Dinh, Sohl-Dickstein & Bengio, "Real NVP", 2016).

    s is a function of the conditioner's raw output r, ``scale``. Each is 0 at r = 0:

    - ``"tanh"``: s = 2·tanh(r/2), so that every scale lies in [e⁻², e²] in both directions;
    - ``"exp_clamp"``: s = 2·(2/π)·atan(r), with the same bounds (Ardizzone et al., 2019; InvertibleNetworks.jl);
    - ``"sigmoid"``: exp(s) = 0.5 + 1.5·σ(r − log 2), in (0.5, 2);
    - ``"softplus"``: exp(s) = log(1 + exp(r + log(e − 1))), without an upper bound;
    - ``"exp"``: s = r, without bounds, as Real NVP is written;
    - a function of your own from r to s, such as a ``functools.partial`` of those in ``inverse_flow.flows.scale`` with
      other bounds.

    Args:
        channels: C ≥ 2 of the images.
        hidden: width of the default conditioner, a :class:`ConvNet`.
        kept: how many of the channels, the first ones, are x₁; ⌈C/2⌉ unless given.
        context_channels: channels of the context that the default conditioner takes.
        dimensions: of the default conditioner: 0 for vectors (B, C), 1 for signals (B, C, L), 2 for images, 3
            for volumes.
        conditioner: a module of your own instead: ``conditioner(x1, context)`` gives t and r, each of the shape of
            x₂, stacked along the channels.
        scale: the name of the function from r to s, or the function.

    Raises:
        ValueError: fewer than 2 channels; none kept or all of them; a scale that does not exist.
    """

    parameters_per_value = 2

    def __init__(
        self,
        channels: int,
        hidden: int = 64,
        *,
        kept: int | None = None,
        context_channels: int = 0,
        dimensions: int = 2,
        conditioner: nn.Module | None = None,
        scale: Scale = "tanh",
    ) -> None:
        super().__init__(
            channels,
            hidden,
            kept=kept,
            context_channels=context_channels,
            dimensions=dimensions,
            conditioner=conditioner,
        )
        self.scale = check_scale(scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = self._halves(x)
        shift, log_scale = self._shift_and_log_scale(x1, context)
        z2 = x2 * log_scale.exp() + shift
        return torch.cat((x1, z2.to(x.dtype)), dim=1), sum_example(log_scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z1, z2 = self._halves(z)
        shift, log_scale = self._shift_and_log_scale(z1, context)
        x2 = (z2 - shift) * (-log_scale).exp()
        return torch.cat((z1, x2.to(z.dtype)), dim=1), -sum_example(log_scale)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x₂ = (z₂ − t) · e⁻ˢ, ∂x₂ = ∂z₂ · eˢ, ∂t = ∂z₂ and ∂s = (z₂ − t) · ∂z₂ + ∂logdet, with one run of the
        conditioner."""
        (z1, z2), (grad_z1, grad_z2) = self._halves(z), self._halves(grad_z)
        z1 = z1.detach().requires_grad_()
        with torch.enable_grad():
            shift, log_scale = self._shift_and_log_scale(z1, context)
        centred = z2 - shift
        grad_log_scale = torch.addcmul(per_example(grad_logdet, z), centred, grad_z2)
        backpropagate([shift, log_scale], [grad_z2.to(shift.dtype), grad_log_scale])
        scale = log_scale.exp()
        x2, grad_x2 = (centred / scale).to(z.dtype), (grad_z2 * scale).to(z.dtype)
        return torch.cat((z1, x2), dim=1), torch.cat((_sum(grad_z1, z1.grad), grad_x2), dim=1)

    def extra_repr(self) -> str:
        return f"{self.channels}, scale={self.scale!r}"

    def _shift_and_log_scale(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, raw = self._condition(x1, context).chunk(2, dim=1)
        return shift, log_scale(self.scale, raw)
