"""Cutting a flow into parts that follow one another, and running it part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from inverse_flow.flows import Flow
from inverse_flow.flows.base import Shape, output_shape, zero_logdet
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible.chain import Link, run_links
from inverse_flow.reversible.layer import splits_off_latent

if TYPE_CHECKING:
    from inverse_flow.parts.config import Cut


class Carried(NamedTuple):
    """What one part hands to the next: all that is known of a batch at a cut of the flow.

    Attributes:
        x: (B, C, H, W), the values that go on.
        latents: the latents factored out so far, in the order of the flow.
        logdet: (B,), log|det| of everything that has run.
    """

    x: Tensor
    latents: tuple[Tensor, ...]
    logdet: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Carried:
        """The images themselves, before the first part."""
        return cls(x, (), zero_logdet(x))

    def detach(self) -> Carried:
        """The same values without their history: no gradient passes from one part into another."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> Carried:
        """``function`` of every tensor."""
        return Carried(function(self.x), tuple(map(function, self.latents)), function(self.logdet))


class Part:
    """The layers ``start`` to ``stop`` − 1 of a flow. It shares them with the flow and owns nothing."""

    def __init__(self, flow: Flow, start: int, stop: int) -> None:
        self.flow = flow
        self.start = start
        self.stop = stop

    def __call__(self, carried: Carried, context: Tensor | None = None) -> Carried:
        """Runs the part on what came out of the part before it."""
        links = [Link(name, layer, False) for name, layer in self.layers.items()]
        (*latents, x), logdet = run_links(links, (*carried.latents, carried.x), context, logdet=carried.logdet)
        return Carried(x, tuple(latents), logdet)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Its layers under their names in the flow."""
        return {f"layers.{i}": self.flow.layers[i] for i in range(self.start, self.stop)}

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        """Shapes, without the batch, of the latents factored out before this part, and of the values that come in."""
        shapes = [self.flow.event_shape, *_shapes(self.flow)]
        splits = [i for i in range(self.start) if splits_off_latent(self.flow.layers[i])]
        return (*self.flow.latent_shapes[: len(splits)], shapes[self.start])

    def state(self, flow: Flow) -> dict[str, Tensor]:
        """What the ``state_dict`` of a flow, this one or its twin, holds of the layers of this part."""
        prefixes = tuple(f"{name}." for name in self.layers)
        return {name: tensor for name, tensor in flow.state_dict().items() if name.startswith(prefixes)}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The learnable tensors of its layers, under their names in the flow."""
        return [named for name, layer in self.layers.items() for named in layer.named_parameters(name)]

    def __repr__(self) -> str:
        return f"Part(layers {self.start} to {self.stop - 1})"


def truncated_log_prob(flow: Flow, carried: Carried, context: Tensor | None = None) -> Tensor:
    """(B,) log-densities, in nats, of the flow truncated after the part that gave ``carried``.

    log p_z(f^(1:k)(x)) + log|det J_f^(1:k)|, with the values that go on taken for the last latent. Without gradient
    through the earlier parts, their log-determinants and the latents that they factored out are constants: they change
    the value, so that it is the log-likelihood of a density on images and can be compared from part to part, and not
    the gradient of part k, which is that of log p_z(f^(1:k)(x)) + log|det J_{f_k}|.
    """
    result: Tensor = flow.base.log_prob((*carried.latents, carried.x), context) + carried.logdet  # type: ignore[operator]
    return result


@torch.no_grad()
def run_frozen(parts: Sequence[Part], x: Tensor, context: Tensor | None = None) -> Carried:
    """What ``parts`` make of a batch of images, without a graph."""
    carried = Carried.of(x)
    for part in parts:
        carried = part(carried, context)
    return carried


def split_flow(flow: Flow, cut: Cut, count: int) -> list[Part]:
    """Cuts a flow into ``count`` parts, so that the part with the most work has as little as can be.

    ``cut="blocks"`` cuts at the ends of blocks alone. A block is one scale: a squeeze, its steps, and the split that
    ends them. ``cut="across"`` cuts after any step, so that a part may hold some steps of one block and
    some of the next; its parts are of nearly equal work, where blocks are not. A split always goes with the step before
    it, and layers before the first squeeze go with the first part.

    The parts follow one another in the order of computation: f = f_n ∘ … ∘ f_1. That alone makes them isolated with one
    boundary each, and lets the first ones be computed once when they are frozen.

    The work of a layer is estimated as (learnable numbers) · (pixels of its output), which is the number of
    multiplications of a convolution.

    Args:
        flow: all of whose parameters are in its layers: every part is trained against the same base density.
        cut: ``"blocks"`` or ``"across"``.
        count: of parts.

    Raises:
        TypeError: a count that is no integer.
        ValueError: another cut; the flow cannot be cut into ``count`` parts, or has parameters outside its layers.
    """
    check_integer("count", count)
    if cut not in [*PLACES]:
        raise ValueError(f'cut must be "blocks" or "across", got {cut!r}')
    outside = [name for name, _ in flow.named_parameters() if not name.startswith("layers.")]
    if outside:
        raise ValueError(f"a part is made of layers: there is none to train {', '.join(outside)} with")
    places = _useful(flow, PLACES[cut](flow))
    most = len(places) + 1
    if count > most:
        where = "by blocks" if cut == "blocks" else "across blocks"
        raise ValueError(f"this flow can be cut {where} into 1 to {most} parts, got {count}")
    work = _work(flow)
    bounds = _balanced([0, *places, len(flow.layers)], work, count)
    return [Part(flow, start, stop) for start, stop in pairwise(bounds)]


def part_shares(parts: Sequence[Part]) -> list[float]:
    """The estimated share of the work in each part; they add up to 1."""
    work = _work(parts[0].flow)
    total = sum(work)
    return [sum(work[part.start : part.stop]) / total for part in parts]


def _shapes(flow: Flow) -> list[Shape]:
    """Shape of what goes on after each layer."""
    shapes, shape = [], flow.event_shape
    for layer in flow.layers:
        shape = output_shape(layer, shape)
        shapes.append(shape)
    return shapes


def _work(flow: Flow) -> list[float]:
    return [
        float(math.prod(shape[1:]) * sum(parameter.numel() for parameter in layer.parameters()))
        for layer, shape in zip(flow.layers, _shapes(flow), strict=True)
    ]


def _block_ends(flow: Flow) -> list[int]:
    """After each split; and before a layer that lowers the resolution again, if there was no split since the last."""
    ends: list[int] = []
    lowered, before = False, flow.event_shape
    for i, (layer, shape) in enumerate(zip(flow.layers, _shapes(flow), strict=True)):
        lowers = shape[1:] != before[1:]
        if lowers and lowered:
            ends.append(i)
        lowered, before = lowered or lowers, shape
        if splits_off_latent(layer):
            ends.append(i + 1)
            lowered = False
    return ends


def _step_ends(flow: Flow) -> list[int]:
    """Before each layer but a split."""
    return [i for i, layer in enumerate(flow.layers) if not splits_off_latent(layer)]


# Where each cut may be made: before these layers.
PLACES = {"blocks": _block_ends, "across": _step_ends}


def _useful(flow: Flow, ends: Sequence[int]) -> list[int]:
    """Those that leave something to learn on both sides: since the one before, and to the end of the flow."""
    learns = [any(True for _ in layer.parameters()) for layer in flow.layers]
    kept = [0]
    for end in ends:
        if any(learns[kept[-1] : end]) and any(learns[end:]):
            kept.append(end)
    return kept[1:]


def _balanced(places: Sequence[int], work: Sequence[float], count: int) -> list[int]:
    """Of ``places``, the first, the last and ``count`` − 1 between them, so that the largest sum of ``work`` between
    two neighbours is least. Dynamic programming over the places.
    """
    # best[j]: (the largest sum, the places chosen) for a way from the first place to places[j] in so many parts
    best = {0: (0.0, [places[0]])}
    for _ in range(count):
        best = {
            j: min(
                (max(largest, sum(work[places[i] : places[j]])), [*chosen, places[j]])
                for i, (largest, chosen) in best.items()
                if i < j
            )
            for j in range(1, len(places))
            if any(i < j for i in best)
        }
    return best[len(places) - 1][1]
