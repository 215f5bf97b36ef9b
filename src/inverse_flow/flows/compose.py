"""Layers in a row, layers turned round, and the density model made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, Shape, check_floating, input_shape, output_shape, zero_logdet
from inverse_flow.flows.finite import call_layer
from inverse_flow.flows.prior import StandardNormal
from inverse_flow.flows.split import Split
from inverse_flow.reversible import check_options
from inverse_flow.reversible.chain import elementary_steps, run


class Compose(FlowLayer):
    """f = f_n ∘ … ∘ f_1 as one layer; the log-determinants add up. For layers that map a tensor to a tensor."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_checked(layers))
        if any(isinstance(layer, Split) for layer in layers):
            raise ValueError("a Split gives a latent of its own: put it into a Flow, which collects the latents")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet = zero_logdet(x)
        for i, layer in enumerate(self.layers):
            x, change = call_layer(f"layers.{i}", layer, x, context, inverse=False)
            logdet = logdet + change
        return x, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet = zero_logdet(z)
        for i, layer in reversed(list(enumerate(self.layers))):
            z, change = call_layer(f"layers.{i}", layer, z, context, inverse=True)
            logdet = logdet + change
        return z, logdet

    def elementary_layers(self, inverse: bool) -> list[tuple[str, nn.Module, bool]]:
        """(path, layer, direction) of each layer, in the order in which they run."""
        return _in_order(self.layers, inverse)

    def output_shape(self, shape: Shape) -> Shape:
        for layer in self.layers:
            shape = output_shape(layer, shape)
        return shape

    def input_shape(self, shape: Shape) -> Shape:
        for layer in reversed(self.layers):
            shape = input_shape(layer, shape)
        return shape


class Reverse(FlowLayer):
    """The same bijection with its two directions exchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        (self.layer,) = _checked([layer])

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return call_layer("layer", self.layer, x, context, inverse=True)

    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return call_layer("layer", self.layer, z, context, inverse=False)

    def elementary_layers(self, inverse: bool) -> list[tuple[str, nn.Module, bool]]:
        """(path, layer, direction) of the layer within."""
        return [("layer", self.layer, not inverse)]

    def output_shape(self, shape: Shape) -> Shape:
        return input_shape(self.layer, shape)

    def input_shape(self, shape: Shape) -> Shape:
        return output_shape(self.layer, shape)


def reverse(layer: nn.Module) -> nn.Module:
    """``layer`` with its two directions exchanged; that of a :class:`Reverse` is the layer within it.

    Of a :class:`Flow`, ``forward`` takes the tuple of latents and gives data, and ``inverse`` the other way round.
    The parameters are shared with ``layer``.
    """
    return layer.layer if isinstance(layer, Reverse) else Reverse(layer)


class Flow(nn.Module):
    """A normalizing flow, log p(x) = log p(latents) + log|det ∂latents/∂x|, of one scale or several.

    The layers run in the given order. Each :class:`Split` among them sends half of the channels on and turns the other
    half into a latent; what comes out of the last layer is the last latent. ``forward`` and ``inverse`` deal in
    the tuple of all of them.

    Args:
        layers: flow layers: modules with ``forward(x, context)`` and ``inverse(z, context)``.
        event_shape: shape of one example, such as (C, H, W).
        base: density of the latents, with the methods of :class:`StandardNormal`, the default.
        memory_efficient: do not store activations for the backward pass, in either direction, but rebuild them from
            the latents (or from the data, when it is ``inverse`` that is differentiated). Gradients are the same up
            to rounding, and training takes the memory of one layer whatever the depth. The attribute of this name
            may be changed at any time. See :class:`~inverse_flow.reversible.ReversibleSequential`.
        anchors, tolerance: for ``memory_efficient``, as in :class:`~inverse_flow.reversible.ReversibleSequential`.

    Raises:
        TypeError: a layer has no ``inverse``; images that are no floating-point tensor.
        ValueError: the layers do not fit the event shape; a batch of another shape; a context with another batch.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        event_shape: Sequence[int],
        *,
        base: nn.Module | None = None,
        memory_efficient: bool = False,
        anchors: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_checked(layers))
        self.event_shape: Shape = tuple(event_shape)
        self.base = StandardNormal() if base is None else base
        check_options(anchors, tolerance)
        self.memory_efficient = memory_efficient
        self.anchors = anchors
        self.tolerance = tolerance
        self.latent_shapes = self._latent_shapes()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Data to latents: (latents, log|det ∂latents/∂x|), the latents in the order in which they split off."""
        check_floating(self, x)
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"this flow takes (B, {_join(self.event_shape)}), got {tuple(x.shape)}")
        _check_context(x.shape[0], context)
        if self.memory_efficient:
            return self._rebuilding((x,), context, inverse=False)
        latents: list[Tensor] = []
        logdet = zero_logdet(x)
        for i, layer in enumerate(self.layers):
            result, change = call_layer(f"layers.{i}", layer, x, context, inverse=False)
            logdet = logdet + change
            if isinstance(layer, Split):
                x, latent = result
                latents.append(latent)
            else:
                x = result
        return (*latents, x), logdet

    def inverse(self, latents: Sequence[Tensor], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents to data: (x, log|det ∂x/∂latents|)."""
        self._check_latents(latents)
        *split_off, x = latents
        _check_context(x.shape[0], context)
        if self.memory_efficient:
            (x,), logdet = self._rebuilding(tuple(latents), context, inverse=True)
            return x, logdet
        logdet = zero_logdet(x)
        for i, layer in reversed(list(enumerate(self.layers))):
            z: Any = (x, split_off.pop()) if isinstance(layer, Split) else x
            x, change = call_layer(f"layers.{i}", layer, z, context, inverse=True)
            logdet = logdet + change
        return x, logdet

    def elementary_layers(self, inverse: bool) -> list[tuple[str, nn.Module, bool]]:
        """(path, layer, direction) of each layer, in the order in which they run."""
        return _in_order(self.layers, inverse)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B,) log-densities in nats, at least float32."""
        latents, logdet = self(x, context)
        result: Tensor = self.base.log_prob(latents, context) + logdet  # type: ignore[operator]
        return result

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` samples, without gradient. ``temperature`` scales the standard deviation of the latents; a context
        has one row a sample.
        """
        return self.inverse(self._sample_latents(n, context, temperature, generator), context)[0]

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``n`` samples and their log-densities under this flow, differentiable in its parameters.

        The density is that of ``log_prob``, whatever the temperature of the samples.
        """
        latents = self._sample_latents(n, context, temperature, generator)
        x, logdet = self.inverse(latents, context)
        return x, self.base.log_prob(latents, context) - logdet  # type: ignore[operator]

    def _sample_latents(
        self, n: int, context: Tensor | None, temperature: float, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        if n < 0:
            raise ValueError(f"the number of samples must be at least 0, got {n}")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"the temperature must be a finite number of at least 0, got {temperature}")
        _check_context(n, context)
        return self.base.sample(n, self.latent_shapes, context, temperature, generator)  # type: ignore[operator]

    def _rebuilding(
        self, inputs: tuple[Tensor, ...], context: Tensor | None, *, inverse: bool
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        steps = elementary_steps(self, inverse=inverse)
        return run(steps, inputs, context, anchors=self.anchors, tolerance=self.tolerance, call=call_layer)

    def _latent_shapes(self) -> tuple[Shape, ...]:
        shape = self.event_shape
        shapes: list[Shape] = []
        for layer in self.layers:
            if isinstance(layer, Split):
                shapes.append(layer.latent_shape(shape))
            shape = output_shape(layer, shape)
        return (*shapes, shape)

    def _check_latents(self, latents: Sequence[Tensor]) -> None:
        given = [tuple(z.shape[1:]) for z in latents]
        batches = {z.shape[0] for z in latents}
        if given != list(self.latent_shapes) or len(batches) != 1:
            expected = ", ".join(f"(B, {_join(shape)})" for shape in self.latent_shapes)
            raise ValueError(f"the latents must be {expected}, got {[tuple(z.shape) for z in latents]}")


def _checked(layers: Iterable[nn.Module]) -> list[nn.Module]:
    result = list(layers)
    for layer in result:
        if not isinstance(layer, nn.Module) or not callable(getattr(layer, "inverse", None)):
            raise TypeError(f"a flow is made of modules with an inverse method, got {type(layer).__name__}")
    return result


def _check_context(batch: int, context: Tensor | None) -> None:
    if context is not None and context.shape[0] != batch:
        raise ValueError(f"the context must have one row an example: {batch}, got {context.shape[0]}")


def _in_order(layers: nn.ModuleList, inverse: bool) -> list[tuple[str, nn.Module, bool]]:
    found = [(f"layers.{i}", layer, inverse) for i, layer in enumerate(layers)]
    return found[::-1] if inverse else found


def _join(shape: Shape) -> str:
    return ", ".join(map(str, shape))
