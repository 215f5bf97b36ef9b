"""Transforms of torch.distributions, on which zuko and pyro build too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from inverse_flow.adapters.layer import event_dims, tensor_layer
from inverse_flow.flows import reverse
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible.layer import call_layer, input_shape, output_shape

if TYPE_CHECKING:
    from pyro.distributions import TransformModule
    from zuko.lazy import LazyTransform


class LayerTransform(Transform):
    """A layer as a transform: ``t(x)`` is its ``forward``, ``t.inv(z)`` its ``inverse``, for any batch shape.

    The log-determinant that a call has found is kept for ``log_abs_det_jacobian`` of its input and result, until the
    next call.

    Args:
        layer: from one tensor to one tensor.
        context: for the layer, or None; its batch shape and that of the events are broadcast.
        event_dims: dimensions of one input and of one output.
        context_dim: dimensions of one context.
        cache_size: as in ``torch.distributions.Transform``; 1 keeps the last pair (x, z), which a changed parameter
            makes wrong.
    """

    bijective = True

    def __init__(
        self,
        layer: nn.Module,
        context: Tensor | None,
        event_dims: tuple[int, int],
        context_dim: int,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size)
        check_integer("context_dim", context_dim, least=0)
        self.layer = layer
        self.context = context
        self.event_dims = event_dims
        self.context_dim = context_dim
        self.domain, self.codomain = (constraints.independent(constraints.real, dim) for dim in event_dims)
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None
        if context is not None:
            _cut("context", context, context_dim)

    def with_cache(self, cache_size: int = 1) -> Transform:
        if cache_size == self._cache_size:
            return self
        return type(self)(self.layer, self.context, self.event_dims, self.context_dim, cache_size)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        batch, event = _cut_shape("example", shape, self.event_dims[0])
        return torch.Size((*batch, *output_shape(self.layer, event)))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        batch, event = _cut_shape("example", shape, self.event_dims[1])
        return torch.Size((*batch, *input_shape(self.layer, event)))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z, log|det ∂z/∂x|), the latter of the batch shape."""
        z, logdet = self._run(x, inverse=False)
        self._latest = x, z, logdet
        return z, logdet

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._latest is not None and self._latest[0] is x and self._latest[1] is y:
            return self._latest[2]
        return self._run(x, inverse=False)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        x, logdet = self._run(y, inverse=True)
        self._latest = x, y, -logdet
        return x

    def _run(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        batch, event = _cut("example", x, self.event_dims[inverse])
        context = self.context
        if context is not None:
            own, one = _cut("context", context, self.context_dim)
            batch = torch.broadcast_shapes(batch, own)
            context = context.expand(*batch, *one).reshape(batch.numel(), *one)
        rows = x.expand(*batch, *event).reshape(batch.numel(), *event)
        result, logdet = call_layer(type(self.layer).__name__, self.layer, rows, context, inverse=inverse)
        return result.reshape(*batch, *result.shape[1:]), logdet.reshape(batch)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_latest": None}  # results with a graph cannot be copied


def to_torch_transform(
    layer: nn.Module, context: Tensor | None = None, *, event_dim: int | None = None, context_dim: int = 1
) -> Transform:
    """A layer or a flow as a transform of ``torch.distributions``, from data to latents.

    ``TransformedDistribution(base, [to_torch_transform(layer).inv])`` is the distribution of data whose latents have
    the density ``base``. Domain and codomain have the event dimension of data and of latents, and events may have any
    batch shape. A call's log-determinant is found with its result. The parameters stay those of the layer.

    Args:
        layer: a layer from one tensor to one tensor; or a flow, whose latents are flattened to one vector an example.
        context: for every call; its batch shape and that of the events are broadcast.
        event_dim: dimensions of one example of the data: 1 for vectors, 3 for images, 4 for volumes. None: as the
            flow's events, or as the layer was built for; 3 where neither says.
        context_dim: dimensions of one context: 0 for labels, 1 for vectors (C,), 3 for maps (C, H, W).

    Raises:
        TypeError: no layer, or one that splits off a latent.
        ValueError: an ``event_dim`` that is not the flow's; a context of fewer dimensions; events of too few.
        RuntimeError: batch shapes of context and events that do not broadcast.
    """
    layer = tensor_layer(layer)
    return LayerTransform(layer, context, event_dims(layer, event_dim), context_dim)


def to_zuko(layer: nn.Module, *, event_dim: int | None = None, context_dim: int = 1) -> LazyTransform:
    """A layer or a flow as a lazy transform of zuko, from data to latents.

    ``zuko.flows.Flow(to_zuko(layer), base)``; what the flow is called with is the layer's context, its batch shape and
    that of the events broadcast. A layer without use for a context ignores it, as zuko's do. The parameters are those
    of the layer.

    Args, Raises: as :func:`to_torch_transform`.
    """
    from inverse_flow.adapters.zuko import LazyLayerTransform

    layer = tensor_layer(layer)
    return LazyLayerTransform(layer, event_dims(layer, event_dim), context_dim)


def to_pyro(
    layer: nn.Module, context: Tensor | None = None, *, event_dim: int | None = None, context_dim: int = 1
) -> TransformModule:
    """A layer or a flow as a transform module of pyro, from latents to data.

    ``pyro.distributions.TransformedDistribution(base, [to_pyro(layer)])``. It holds the layer, so that ``pyro.module``
    finds the parameters.

    Args, Raises: as :func:`to_torch_transform`.
    """
    from inverse_flow.adapters.pyro import LayerTransformModule

    layer = tensor_layer(layer)
    data, latents = event_dims(layer, event_dim)
    return LayerTransformModule(reverse(layer), context, (latents, data), context_dim)


def _cut(what: str, values: Tensor, dims: int) -> tuple[torch.Size, torch.Size]:
    """The batch shape and the shape of one example."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{what}s are tensors, got {type(values).__name__}")
    return _cut_shape(what, values.shape, dims)


def _cut_shape(what: str, shape: torch.Size, dims: int) -> tuple[torch.Size, torch.Size]:
    if len(shape) < dims:
        raise ValueError(f"one {what} has {dims} dimensions here, got the shape {tuple(shape)}")
    return shape[: len(shape) - dims], shape[len(shape) - dims :]
