"""Layers in a row, layers turned round, and the density model made of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, Shape, check_floating, input_shape, output_shape
from inverse_flow.flows.flattened import Flattened
from inverse_flow.flows.prior import StandardNormal
from inverse_flow.ops.bijection import Bijection
from inverse_flow.ops.checks import check_context
from inverse_flow.ops.spec import check_integer, check_number, check_sizes
from inverse_flow.reversible.chain import Link, links_of
from inverse_flow.reversible.layer import call_layer, check_layers, splits_off_latent, uses_context
from inverse_flow.reversible.rebuild import Rebuilding, run
from inverse_flow.reversible.sequential import Row


class Compose(Row, FlowLayer):
    """f = f_n ∘ … ∘ f_1 as one layer; the log-determinants add up. For layers that map a tensor to a tensor.

    Raises:
        TypeError: a layer without an inverse, or one that splits off a latent.
    """


class Reverse(FlowLayer):
    """The same bijection with its two directions exchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        (self.layer,) = check_layers([layer])

    @property
    def uses_context(self) -> bool:
        """Whether the layer within may use the context."""
        return uses_context(self.layer)

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return call_layer("layer", self.layer, x, context, inverse=True)

    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return call_layer("layer", self.layer, z, context, inverse=False)

    def links(self, inverse: bool) -> list[Link]:
        """(path, layer, direction) of the layer within."""
        return [Link("layer", self.layer, not inverse)]

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


class Flow(Bijection):
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
        TypeError: a layer has no ``inverse``; images that are no floating-point tensor; latents that are no tuple of
            tensors of one dtype; a context that is no tensor of real numbers.
        ValueError: the layers do not fit the event shape; a batch of another shape; a context with another batch, or
            one that no layer uses.
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
        self.layers = nn.ModuleList(check_layers(layers))
        self.event_shape: Shape = check_sizes(
            "event_shape", event_shape, "the shape of one example, such as (C, H, W)", range(1, sys.maxsize)
        )
        self.base = StandardNormal() if base is None else base
        if not isinstance(self.base, nn.Module):
            raise TypeError(
                "the base of a flow is a module with log_prob(latents, context) and sample(n, shapes, context, "
                f"temperature, generator), as StandardNormal is, got {type(base).__name__}"
            )
        Rebuilding(anchors, tolerance).checked()
        self.memory_efficient = memory_efficient
        self.anchors = anchors
        self.tolerance = tolerance
        self.latent_shapes = self._latent_shapes()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Data to latents: (latents, log|det ∂latents/∂x|), the latents in the order in which they split off."""
        check_floating(self, x)
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"this flow takes (B, {_join(self.event_shape)}), got {tuple(x.shape)}")
        self._check_context(x.shape[0], context)
        latents, logdet = run(self.links(inverse=False), (x,), context, self.rebuilding)
        given = tuple(tuple(z.shape[1:]) for z in latents)
        if given != self.latent_shapes:
            raise ValueError(
                f"the layers gave latents of the shapes {given}, and said {self.latent_shapes}: a layer that changes "
                "the shape needs the methods output_shape(shape) and input_shape(shape)"
            )
        return latents, logdet

    def inverse(self, latents: Sequence[Tensor], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents to data: (x, log|det ∂x/∂latents|)."""
        self.check_latents(latents)
        self._check_context(latents[-1].shape[0], context)
        (x,), logdet = run(self.links(inverse=True), tuple(latents), context, self.rebuilding)
        return x, logdet

    def flatten(self) -> Flattened:
        """This flow as a layer from data to one vector of latents, (B, D), and back; it shares the parameters."""
        return Flattened(self)

    def links(self, inverse: bool) -> list[Link]:
        """(path, layer, direction) of each layer, in the order in which they run."""
        return links_of(self.layers, inverse)

    @property
    def rebuilding(self) -> Rebuilding | None:
        """How activations are rebuilt; None where they are stored."""
        return Rebuilding(self.anchors, self.tolerance) if self.memory_efficient else None

    @property
    def uses_context(self) -> bool:
        """Whether a layer, or the base, may use the context."""
        return any(map(uses_context, (*self.layers, self.base)))

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
        has one row per sample.
        """
        return self.inverse(self.sample_latents(n, context, temperature, generator), context)[0]

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
        latents = self.sample_latents(n, context, temperature, generator)
        x, logdet = self.inverse(latents, context)
        return x, self.base.log_prob(latents, context) - logdet  # type: ignore[operator]

    def sample_latents(
        self, n: int, context: Tensor | None, temperature: float, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        """What :meth:`sample` makes its samples of: ``n`` rows of every latent."""
        if not isinstance(n, torch.SymInt):
            check_integer("the number of samples", n, least=0)
        check_number("the temperature", temperature)
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"the temperature must be a finite number of at least 0, got {temperature}")
        self._check_context(n, context)
        return self.base.sample(n, self.latent_shapes, context, temperature, generator)  # type: ignore[operator]

    def _latent_shapes(self) -> tuple[Shape, ...]:
        shape = self.event_shape
        shapes: list[Shape] = []
        for layer in self.layers:
            if splits_off_latent(layer):
                shapes.append(layer.latent_shape(shape))  # type: ignore[operator]
            shape = output_shape(layer, shape)
        return (*shapes, shape)

    def _check_context(self, batch: int, context: Tensor | None) -> None:
        check_context(context)
        if context is None:
            return
        if context.shape[0] != batch:
            raise ValueError(f"the context must have one row per example: {batch}, got {context.shape[0]}")
        if not self.uses_context:
            raise ValueError(
                "no layer of this flow uses a context, and one was given: leave it out, or build the flow for it"
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers") and isinstance(self.base, StandardNormal):
            self.base.follow(state_dict.values())  # it has nothing that a state_dict could bring

    def check_latents(self, latents: Sequence[Tensor]) -> None:
        """Refuses latents of other shapes than ``latent_shapes``, or of different batches or dtypes."""
        expected = ", ".join(f"(B, {_join(shape)})" for shape in self.latent_shapes)
        if not isinstance(latents, tuple | list) or not all(isinstance(z, Tensor) for z in latents):
            kinds = [type(z).__name__ for z in latents] if isinstance(latents, tuple | list) else type(latents).__name__
            raise TypeError(f"the latents must be a tuple of tensors, {expected}, got {kinds}")
        given = [tuple(z.shape[1:]) for z in latents]
        if given != list(self.latent_shapes) or any(z.shape[0] != latents[0].shape[0] for z in latents):
            raise ValueError(f"the latents must be {expected}, got {[tuple(z.shape) for z in latents]}")
        if any(z.dtype != latents[0].dtype for z in latents):
            raise TypeError(f"the latents must have one dtype, got {[z.dtype for z in latents]}")


def _join(shape: Shape) -> str:
    return ", ".join(map(str, shape))
