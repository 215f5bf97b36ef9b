"""A flow as one layer from a tensor to a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, Shape
from inverse_flow.reversible.layer import call_layer, uses_context


class Flattened(FlowLayer):
    """A flow's bijection onto one vector per example: (B, *event_shape) → (B, D), D the size of an event.

    The latents of all scales stand side by side in the order in which they split off; the log-determinant is the
    flow's. The flow's base is left out, as other libraries bring one of their own. The parameters are the flow's.

    Args:
        flow: a flow, with ``event_shape`` and ``latent_shapes``.

    Raises:
        ValueError: a vector of another size; as the flow.
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    @property
    def event_shape(self) -> Shape:
        """Shape of one example of the data."""
        shape: Shape = self.flow.event_shape  # type: ignore[assignment]
        return shape

    @property
    def uses_context(self) -> bool:
        """Whether the flow may use the context."""
        return uses_context(self.flow)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        latents, logdet = call_layer("flow", self.flow, x, context, inverse=False)
        return torch.cat([latent.flatten(1) for latent in latents], dim=1), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shapes: tuple[Shape, ...] = self.flow.latent_shapes  # type: ignore[assignment]
        sizes = list(map(math.prod, shapes))
        if z.dim() != 2 or z.shape[1] != sum(sizes):
            raise ValueError(f"the latents of this flow, flattened, are (B, {sum(sizes)}), got {tuple(z.shape)}")
        parts = zip(z.split(sizes, dim=1), shapes, strict=True)
        latents = tuple(part.unflatten(1, shape) for part, shape in parts)
        return call_layer("flow", self.flow, latents, context, inverse=True)

    def output_shape(self, shape: Shape) -> Shape:
        return (math.prod(self.event_shape),)

    def input_shape(self, shape: Shape) -> Shape:
        return self.event_shape
