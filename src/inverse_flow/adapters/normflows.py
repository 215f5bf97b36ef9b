"""Layers in normflows, which takes any module with its two methods."""

from __future__ import annotations

from torch import nn

from inverse_flow.adapters.layer import tensor_layer
from inverse_flow.flows import reverse


def to_normflows(layer: nn.Module) -> nn.Module:
    """A layer or a flow as a flow of normflows, whose ``forward`` goes from latents to data.

    ``normflows.NormalizingFlow(base, [to_normflows(layer), …])``: the first of the list meets the latents, so layers
    that run one after the other from data to latents stand in the opposite order. In a
    ``ConditionalNormalizingFlow`` the layer gets the context.

    Args:
        layer: a layer from one tensor to one tensor; or a flow, whose latents are flattened to one vector an example.

    Returns:
        A module with ``forward(z, context=None) -> (x, log|det ∂x/∂z|)`` and
        ``inverse(x, context=None) -> (z, log|det ∂z/∂x|)``, which shares the layer's parameters.

    Raises:
        TypeError: no layer, or one that splits off a latent.
    """
    return reverse(tensor_layer(layer))
