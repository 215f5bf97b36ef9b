"""The density of the latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import Shape, logdet_dtype, sum_example


class StandardNormal(nn.Module):
    """Independent N(0, 1) for every latent value: log p(z) = −½ Σ (z² + log 2π), over the latents of every scale."""

    uses_context = False
    origin: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Carries device and dtype for sampling; there is nothing to save.
        self.register_buffer("origin", torch.zeros(()), persistent=False)

    def log_prob(self, latents: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        """(B,) log-densities, in at least float32."""
        values = [z.to(logdet_dtype(z.dtype)) for z in latents]
        return torch.stack([sum_example(-0.5 * (z.square() + math.log(2 * math.pi))) for z in values]).sum(0)

    def sample(
        self,
        n: int,
        shapes: Sequence[Shape],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """``n`` draws of latents of the given shapes, each value N(0, temperature²)."""
        # Not torch.randn, which torch.compile does not take with a generator and a number of rows that varies.
        draws = [self.origin.new_empty((n, *shape)).normal_(generator=generator) for shape in shapes]
        return tuple(temperature * z for z in draws)

    def follow(self, weights: Iterable[object]) -> None:
        """Draws where the weights are and in their dtype."""
        like = next((value for value in weights if isinstance(value, Tensor) and value.is_floating_point()), None)
        if like is not None:
            self.origin = like.new_zeros(())
