"""Two flows side by side, the second one conditioned on the first: a joint density p(x, y) with p(y) and p(x | y)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_floating, output_shape
from inverse_flow.flows.compose import Flow
from inverse_flow.flows.coupling import AffineCoupling
from inverse_flow.ops.bijection import Bijection
from inverse_flow.ops.checks import check_context
from inverse_flow.ops.spec import check_function, check_integer
from inverse_flow.reversible.chain import Link
from inverse_flow.reversible.layer import call_layer, splits_off_latent, uses_context
from inverse_flow.reversible.rebuild import Rebuilding, run

Latents: TypeAlias = tuple[Tensor, ...]


class Lanes(FlowLayer):
    """(y, x) → (f(y), g(x)) on channels side by side; log-determinants summed.

    Args:
        first, second: f and g, layers that do the same to the axes behind the channels, and both split off a latent or
            neither.
        before, after, latent: channels of y, of f(y), and of the latent that f splits off.
    """

    def __init__(self, first: nn.Module, second: nn.Module, before: int, after: int, latent: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.before, self.after, self.latent = before, after, latent

    @property
    def splits_off_latent(self) -> bool:  # type: ignore[override]
        """Whether its layers do."""
        return splits_off_latent(self.first)

    @property
    def uses_context(self) -> bool:
        """Whether one of its layers may."""
        return uses_context(self.first) or uses_context(self.second)

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        parts = x[:, : self.before], x[:, self.before :]
        found = [self._call(i, part, context, inverse=False) for i, part in enumerate(parts)]
        (first, logdet), (second, more) = found
        if not self.splits_off_latent:
            return torch.cat((first, second), dim=1), logdet + more
        return tuple(torch.cat(both, dim=1) for both in zip(first, second, strict=True)), logdet + more

    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        if self.splits_off_latent:
            cuts = zip(z, (self.after, self.latent), strict=True)
            first, second = zip(*((part[:, :cut], part[:, cut:]) for part, cut in cuts), strict=True)
        else:
            first, second = z[:, : self.after], z[:, self.after :]
        (y, logdet), (x, more) = (self._call(i, part, context, inverse=True) for i, part in enumerate((first, second)))
        return torch.cat((y, x), dim=1), logdet + more

    def _call(self, i: int, x: Any, context: Tensor | None, *, inverse: bool) -> tuple[Any, Tensor]:
        name = ("first", "second")[i]
        return call_layer(name, getattr(self, name), x, context, inverse=inverse)


class JointFlow(Bijection):
    """p(x, y) = p(y) · p(x | y): two flows side by side, where after each pair of layers y conditions x.

    Layer i of the flow ``observed`` acts on y, and layer i of ``own`` on x. If neither changes the shape, a coupling
    x ← C(x | y) follows. What becomes of y does not depend on x, so that one network gives the
    joint density, the marginal p(y), and the posterior p(x | y) with samples of it. With two
    :class:`~inverse_flow.models.Hint` this is the conditional HINT of Kruse et al., "HINT: Hierarchical Invertible
    Neural Transport for Density Estimation and Bayesian Inference", AAAI 2021, and with several levels its multi-scale
    form in Orozco et al., "InvertibleNetworks.jl", 2023.

    Args:
        observed: the flow of y.
        own: the flow of x, with as many layers, which split where those of ``observed`` do. x and y have the same sizes
            behind their channels, of which each has a number of its own.
        hidden: width of the couplings' networks.
        coupling: a function of your own that makes C from the number of all channels and of those of y, which come
            first and must be kept, in place of ``AffineCoupling(channels, hidden, kept=of_y)``.
        memory_efficient: as for :class:`~inverse_flow.flows.Flow`; that of the two flows is ignored.

    Raises:
        TypeError: what is no :class:`~inverse_flow.flows.Flow`; a ``coupling`` that is no function; x and y of two
            dtypes.
        ValueError: flows that do not go side by side; data or latents of another shape.
    """

    def __init__(
        self,
        observed: Flow,
        own: Flow,
        hidden: int = 64,
        *,
        coupling: Callable[[int, int], nn.Module] | None = None,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        for flow in (observed, own):
            if not isinstance(flow, Flow):
                raise TypeError(f"a joint flow is made of two Flows, got {type(flow).__name__}")
        check_integer("hidden", hidden, least=0)
        check_function("coupling", coupling)
        self.observed, self.own = observed, own
        self.memory_efficient = memory_efficient
        dimensions = len(observed.event_shape) - 1

        def affine(channels: int, of_y: int) -> nn.Module:
            return AffineCoupling(channels, hidden, kept=of_y, dimensions=dimensions)

        self._states = self._states_of_both()
        make = affine if coupling is None else coupling
        self.couplings = nn.ModuleDict()
        for i, (y, x) in enumerate(self._states[1:]):
            if (y, x) != self._states[i]:
                continue
            made = make(y[0] + x[0], y[0])
            if getattr(made, "kept", y[0]) < y[0]:
                raise ValueError(
                    f"a coupling must keep the {y[0]} channels of y, which come first, got kept={made.kept}"
                )
            self.couplings[str(i)] = made

    def forward(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> tuple[tuple[Latents, Latents], Tensor]:
        """Data to latents: ((latents of x, latents of y), log|det ∂latents/∂(x, y)|)."""
        for name, value, flow in (("x", x, self.own), ("y", y, self.observed)):
            check_floating(self, value)
            if tuple(value.shape[1:]) != flow.event_shape or len(value) != len(x):
                raise ValueError(f"{name} must be {_batch(len(x), flow.event_shape)}, got {tuple(value.shape)}")
        _check_dtypes(x, y)
        self._check_context(len(x), context)
        latents, logdet = run(self.links(inverse=False), (torch.cat((y, x), dim=1),), context, self.rebuilding)
        cuts = [shape[0] for shape in self.observed.latent_shapes]
        of_y = tuple(z[:, :cut] for z, cut in zip(latents, cuts, strict=True))
        of_x = tuple(z[:, cut:] for z, cut in zip(latents, cuts, strict=True))
        return (of_x, of_y), logdet

    def inverse(
        self, latents: tuple[Sequence[Tensor], Sequence[Tensor]], context: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Latents of x and of y to data: ((x, y), log|det ∂(x, y)/∂latents|)."""
        of_x, of_y = latents
        self.own.check_latents(of_x)
        self.observed.check_latents(of_y)
        if len(of_x[-1]) != len(of_y[-1]):
            raise ValueError(f"x and y have latents of as many examples, got {len(of_x[-1])} and {len(of_y[-1])}")
        _check_dtypes(of_x[-1], of_y[-1])
        self._check_context(len(of_x[-1]), context)
        stacked = tuple(torch.cat(both, dim=1) for both in zip(of_y, of_x, strict=True))
        (both,), logdet = run(self.links(inverse=True), stacked, context, self.rebuilding)
        cut = self.observed.event_shape[0]
        return (both[:, cut:], both[:, :cut]), logdet

    def forward_y(self, y: Tensor, context: Tensor | None = None) -> tuple[Latents, Tensor]:
        """y alone to its latents: (latents of y, log|det ∂latents/∂y|)."""
        result: tuple[Latents, Tensor] = self.observed(y, context)
        return result

    def inverse_y(self, latents: Sequence[Tensor], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents of y alone to y: (y, log|det ∂y/∂latents|)."""
        return self.observed.inverse(latents, context)

    def links(self, inverse: bool) -> list[Link]:
        """(path, layer, direction) of each pair of layers and each coupling, in the order in which they run."""
        found = []
        for i, layer in enumerate(self.layers):
            found.append(Link(f"layers.{i}", layer, False))
            if str(i) in self.couplings:
                found.append(Link(f"couplings.{i}", self.couplings[str(i)], False))
        return [link.turned for link in reversed(found)] if inverse else found

    @property
    def layers(self) -> nn.ModuleList:
        """Of the two flows each pair of layers as one, ``first`` of y and ``second`` of x, as errors name them."""
        lanes = []
        for i, (first, second) in enumerate(zip(self.observed.layers, self.own.layers, strict=True)):
            (before, _), (after, _) = self._states[i], self._states[i + 1]
            latent = first.latent_shape(before)[0] if splits_off_latent(first) else 0  # type: ignore[operator]
            lanes.append(Lanes(first, second, before[0], after[0], latent))
        return nn.ModuleList(lanes)

    @property
    def uses_context(self) -> bool:
        """Whether one of the flows or couplings may use the context."""
        return any(map(uses_context, (self.observed, self.own, *self.couplings.values())))

    @property
    def rebuilding(self) -> Rebuilding | None:
        """How activations are rebuilt; None where they are stored."""
        return Rebuilding() if self.memory_efficient else None

    def log_prob(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """(B,) joint log-densities log p(x, y) in nats."""
        (of_x, of_y), logdet = self(x, y, context)
        for flow, latents in ((self.own, of_x), (self.observed, of_y)):
            logdet = logdet + flow.base.log_prob(latents, _of(flow, context))  # type: ignore[operator]
        return logdet

    def log_prob_given(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """(B,) log-densities of the posterior, log p(x | y) = log p(x, y) − log p(y)."""
        return self.log_prob(x, y, context) - self.observed.log_prob(y, _of(self.observed, context))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``n`` samples (x, y), without gradient."""
        of_x, of_y = (
            flow.sample_latents(n, _of(flow, context), temperature, generator) for flow in (self.own, self.observed)
        )
        return self.inverse((of_x, of_y), context)[0]

    @torch.no_grad()
    def sample_given(
        self,
        y: Tensor,
        context: Tensor | None = None,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of x from the posterior p(x | y), one for each row of ``y``, without gradient."""
        of_y, _ = self.forward_y(y, _of(self.observed, context))
        of_x = self.own.sample_latents(len(y), _of(self.own, context), temperature, generator)
        return self.inverse((of_x, of_y), context)[0][0]

    def _check_context(self, batch: int, context: Tensor | None) -> None:
        check_context(context)
        if context is None:
            return
        if len(context) != batch:
            raise ValueError(f"the context must have one row for each example: {batch}, got {len(context)}")
        if not self.uses_context:
            raise ValueError("neither the flows nor the couplings use a context, and one was given: leave it out")

    def _states_of_both(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The shapes of y and x before the first pair of layers and behind each."""
        y, x = self.observed.event_shape, self.own.event_shape
        states = [(y, x)]
        counts = len(self.observed.layers), len(self.own.layers)
        if counts[0] != counts[1]:
            raise ValueError(f"flows side by side have as many layers, got {counts[0]} of y and {counts[1]} of x")
        for i, (first, second) in enumerate(zip(self.observed.layers, self.own.layers, strict=True)):
            y, x = output_shape(first, y), output_shape(second, x)
            if splits_off_latent(first) != splits_off_latent(second):
                raise ValueError(f"of the pair of layers {i} one splits off a latent, and the other one does not")
            states.append((y, x))
        for y, x in states:
            if y[1:] != x[1:]:
                raise ValueError(f"x and y have the same sizes behind their channels, got {x} beside {y}")
        return states


def _check_dtypes(of_x: Tensor, of_y: Tensor) -> None:
    if of_x.dtype != of_y.dtype:
        raise TypeError(f"x and y must have one dtype, got {of_x.dtype} and {of_y.dtype}")


def _of(flow: Flow, context: Tensor | None) -> Tensor | None:
    """What of the context a flow takes."""
    return context if flow.uses_context else None


def _batch(count: int, shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, (count, *shape)))})"
