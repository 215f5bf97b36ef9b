"""Recursive coupling."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_images, first_half
from inverse_flow.flows.compose import Compose
from inverse_flow.flows.coupling import AffineCoupling
from inverse_flow.ops.spec import check_function, check_integer
from inverse_flow.reversible.layer import call_layer, shortcut, uses_context


class OnChannels(FlowLayer):
    """A layer on the channels start … stop−1; the others go through untouched.

    Args:
        layer: a layer that keeps shapes, built for stop − start channels.
        start, stop: the range.
        channels: C of the images.
    """

    def __init__(self, layer: nn.Module, start: int, stop: int, channels: int) -> None:
        super().__init__()
        self.layer = layer
        self.start = start
        self.stop = stop
        self.channels = channels

    @property
    def uses_context(self) -> bool:
        """Whether the layer does."""
        return uses_context(self.layer)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        part, logdet = call_layer("layer", self.layer, self._part(x), context, inverse=False)
        return self._replace(x, part), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        part, logdet = call_layer("layer", self.layer, self._part(z), context, inverse=True)
        return self._replace(z, part), logdet

    def extra_repr(self) -> str:
        return f"{self.start}, {self.stop}, channels={self.channels}"

    def _part(self, x: Tensor) -> Tensor:
        check_images(self, x, self.channels)
        return x[:, self.start : self.stop]

    def _replace(self, x: Tensor, part: Tensor) -> Tensor:
        return torch.cat((x[:, : self.start], part, x[:, self.stop :]), dim=1)


class _OnChannelsClosedForm(OnChannels):
    """Where the layer has a closed form of its backward pass."""

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """That of the layer, on its channels."""
        part, grad_part = self.layer.backward_from_output(  # type: ignore[operator]
            self._part(z), self._part(grad_z), grad_logdet, context
        )
        return self._replace(z, part), self._replace(grad_z, grad_part)


class HINT(Compose):
    """f(x) = (f₁(x₁), C(f₂(x₂) | x₁)): a coupling C whose two halves go through a HINT of their own; log-dets summed.

    A coupling's Jacobian is triangular but mostly zero, since x₁ goes through untouched and the values of x₂ do not
    meet each other. Here f₁ and f₂ are the same construction on half of the channels, until a half has fewer than
    ``least_channels``, where f is the identity. So every channel depends on all the channels before it: the Jacobian
    at a pixel is a dense lower triangle. Each coupling has its own network. Kruse, Detommaso, Köthe & Scheichl,
    "HINT: Hierarchical Invertible Neural Transport for Density Estimation and Bayesian Inference", AAAI 2021.

    The recursion is unrolled into couplings on nested ranges of channels, in the order f₂, C, f₁, which are the
    ``layers``. Put an invertible 1×1 convolution or a permutation before a HINT, so that the last channels are not
    always those that see all the others.

    Args:
        channels: C ≥ 2 of the images; the first ⌈C/2⌉ are x₁.
        hidden: width of every coupling's :class:`~inverse_flow.flows.ConvNet`.
        least_channels: the fewest channels that are coupled, 2 … C. With C there is one coupling, as without HINT.
        context_channels: channels of the context that the networks take.
        dimensions: of the networks: 0 for vectors (B, C), 1 for signals (B, C, L), 2 for images, 3
            for volumes.
        coupling: a function of your own that makes C for a number of channels, in place of the
            :class:`~inverse_flow.flows.AffineCoupling` with the options above, such as
            ``lambda channels: AdditiveCoupling(channels, 32)``. C must leave the first ⌈channels/2⌉ as they are.

    Raises:
        TypeError: a ``coupling`` that is no function.
        ValueError: fewer than 2 channels; ``least_channels`` out of range; images of another shape.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 64,
        *,
        least_channels: int = 2,
        context_channels: int = 0,
        dimensions: int = 2,
        coupling: Callable[[int], nn.Module] | None = None,
    ) -> None:
        check_integer("channels", channels, least=2)  # to split
        check_integer("least_channels", least_channels)
        check_integer("hidden", hidden, least=0)
        check_function("coupling", coupling)
        if not 2 <= least_channels <= channels:
            raise ValueError(f"least_channels must lie between 2 and {channels}, the channels, got {least_channels}")

        def affine(channels: int) -> nn.Module:
            return AffineCoupling(channels, hidden, context_channels=context_channels, dimensions=dimensions)

        def on_range(start: int, stop: int) -> OnChannels:
            layer = (affine if coupling is None else coupling)(stop - start)
            kind = _OnChannelsClosedForm if shortcut(layer, "backward_from_output") else OnChannels
            return kind(layer, start, stop, channels)

        super().__init__(*(on_range(start, stop) for start, stop in _ranges(0, channels, least_channels)))


def _ranges(start: int, stop: int, least_channels: int) -> Iterator[tuple[int, int]]:
    """The ranges of channels of f on start … stop−1: those of f₂, that of C, those of f₁."""
    if stop - start < least_channels:
        return
    middle = start + first_half(stop - start)
    yield from _ranges(middle, stop, least_channels)
    yield start, stop
    yield from _ranges(start, middle, least_channels)
