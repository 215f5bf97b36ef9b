"""Layers as transform modules of pyro."""

from __future__ import annotations

from pyro.distributions import TransformModule

from inverse_flow.adapters.transforms import LayerTransform


class LayerTransformModule(LayerTransform, TransformModule):
    """A layer as a transform that is a module too, so that pyro finds its parameters."""
