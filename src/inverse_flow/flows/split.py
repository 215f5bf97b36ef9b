"""Factoring out half of the channels between two scales."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import (
    FlowLayer,
    Shape,
    check_images,
    first_half,
    logdet_dtype,
    per_example,
    sum_example,
    zero_logdet,
)
from inverse_flow.flows.conditioner import ConvNet
from inverse_flow.flows.scale import tanh_scale
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible import backpropagate
from inverse_flow.reversible.layer import uses_context

SplitPrior: TypeAlias = Literal["conditional", "standard"]


class Split(FlowLayer):
    """x = (x₁, x₂) → ((x₁, ε), logdet): the first half of the channels goes on, the second becomes a latent.

    ``prior="conditional"`` gives x₂ the Gaussian density N(μ(x₁), σ(x₁)²), with μ and log σ learned. It is written as
    the bijection ε = (x₂ − μ) / σ with log-determinant −Σ log σ, so that the latents of every scale are standard
    normal and one temperature serves them all. ``prior="standard"`` is ε = x₂. log σ lies in [−2, 2], by the ``tanh``
    of a coupling's log scale. Source: Dinh et al., "Real NVP", 2016, section 3.6; Kingma &
    Dhariwal, "Glow", 2018.

    In a :class:`~inverse_flow.flows.Flow` the ε are collected; the method ``inverse`` takes the pair (x₁, ε).

    Args:
        channels: C ≥ 2 of the images; the first ⌈C/2⌉ go on.
        prior: ``"conditional"`` or ``"standard"``.
        hidden: width of the prior's network; 0 makes it one 3×3 convolution, starting at zero.
        context_channels: channels of the context that the prior's network takes.
        dimensions: of the prior's network: 0 for vectors (B, C), 1 for signals (B, C, L), 2 for images, 3
            for volumes.
    """

    splits_off_latent = True

    def __init__(
        self,
        channels: int,
        *,
        prior: SplitPrior = "conditional",
        hidden: int = 0,
        context_channels: int = 0,
        dimensions: int = 2,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, least=2)
        if prior not in ("conditional", "standard"):
            raise ValueError(f'the prior of a split must be "conditional" or "standard", got {prior!r}')
        self.channels = channels
        self.kept = first_half(channels)
        self.prior_net: nn.Module | None = None
        if prior == "conditional":
            out_channels = 2 * (channels - self.kept)
            self.prior_net = ConvNet(
                self.kept, hidden, out_channels, context_channels=context_channels, dimensions=dimensions
            )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        check_images(self, x, self.channels)
        # Copies, not views: what a layer gives is laid out as its input is.
        kept, factored = (part.contiguous() for part in x.split((self.kept, self.channels - self.kept), dim=1))
        if self.prior_net is None:
            return (kept, factored), zero_logdet(x)
        mean, log_std = self._mean_and_log_std(kept, context)
        epsilon = (factored - mean) * (-log_std).exp()
        return (kept, epsilon.to(x.dtype)), -sum_example(log_std)

    def inverse(self, z: tuple[Tensor, Tensor], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, epsilon = z
        check_images(self, kept, self.kept)
        check_images(self, epsilon, self.channels - self.kept)
        if self.prior_net is None:
            return torch.cat((kept, epsilon), dim=1), zero_logdet(kept)
        mean, log_std = self._mean_and_log_std(kept, context)
        factored = epsilon * log_std.exp() + mean
        return torch.cat((kept, factored.to(kept.dtype)), dim=1), sum_example(log_std)

    def backward_from_output(
        self,
        z: tuple[Tensor, Tensor],
        grad_z: tuple[Tensor, Tensor],
        grad_logdet: Tensor,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x₂ = ε · σ + μ, ∂x₂ = ∂ε / σ, ∂μ = −∂x₂ and ∂log σ = −ε · ∂ε − ∂logdet, with one run of the network."""
        (kept, epsilon), (grad_kept, grad_epsilon) = z, grad_z
        if self.prior_net is None:
            return torch.cat(z, dim=1), torch.cat(grad_z, dim=1)
        kept = kept.detach().requires_grad_()
        with torch.enable_grad():
            mean, log_std = self._mean_and_log_std(kept, context)
        std = log_std.exp()
        grad_factored = grad_epsilon / std
        backpropagate([mean, log_std], [-grad_factored, -(epsilon * grad_epsilon) - per_example(grad_logdet, epsilon)])
        factored = epsilon * std + mean
        if kept.grad is not None:
            grad_kept = grad_kept + kept.grad
        x = torch.cat((kept, factored.to(kept.dtype)), dim=1)
        return x, torch.cat((grad_kept, grad_factored.to(kept.dtype)), dim=1)

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of what goes on."""
        return (self.kept, *shape[1:])

    def latent_shape(self, shape: Shape) -> Shape:
        """Shape of the latent that is factored out."""
        return (self.channels - self.kept, *shape[1:])

    def input_shape(self, shape: Shape) -> Shape:
        return (self.channels, *shape[1:])

    @property
    def uses_context(self) -> bool:
        """Whether the prior's network does."""
        return self.prior_net is not None and uses_context(self.prior_net)

    def extra_repr(self) -> str:
        return f'{self.channels}, prior="{"standard" if self.prior_net is None else "conditional"}"'

    def _mean_and_log_std(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.prior_net is not None
        mean, raw = self.prior_net(kept, context).to(logdet_dtype(kept.dtype)).chunk(2, dim=1)
        return mean, tanh_scale(raw)
