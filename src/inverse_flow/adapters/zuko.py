"""Layers as lazy transforms of zuko."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributions import Transform
from zuko.lazy import LazyTransform

from inverse_flow.adapters.transforms import LayerTransform
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible.layer import uses_context


class LazyLayerTransform(LazyTransform):
    """A layer that becomes a transform when the context is known."""

    def __init__(self, layer: nn.Module, event_dims: tuple[int, int], context_dim: int) -> None:
        super().__init__()
        check_integer("context_dim", context_dim, least=0)
        self.layer = layer
        self.event_dims = event_dims
        self.context_dim = context_dim

    def forward(self, c: Tensor | None = None) -> Transform:
        """The transform of context ``c``, from data to latents; a layer without use for it ignores it, as zuko's do."""
        return LayerTransform(self.layer, c if uses_context(self.layer) else None, self.event_dims, self.context_dim)
