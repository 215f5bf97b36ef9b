"""What a chain of layers is, and the one loop that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.reversible.layer import DIRECTIONS, call_layer, is_changed, shortcut, splits_off_latent


class Link(NamedTuple):
    """One layer of a chain, by its path, and the direction in which it runs."""

    path: str
    layer: nn.Module
    inverse: bool

    @property
    def splits(self) -> bool:
        """Whether it gives a latent besides what goes on."""
        return not self.inverse and splits_off_latent(self.layer)

    @property
    def joins(self) -> bool:
        """Whether it takes a latent besides what comes in."""
        return self.inverse and splits_off_latent(self.layer)

    @property
    def turned(self) -> Link:
        """The same layer in the other direction."""
        return Link(self.path, self.layer, not self.inverse)

    def run(self, x: Any, context: Tensor | None) -> tuple[Any, Tensor]:
        """The layer's result, a pair where it splits, and its log-determinant."""
        result, logdet = call_layer(self.path, self.layer, x, context, inverse=self.inverse)
        if isinstance(result, Tensor) == self.splits:
            raise TypeError(
                f"{self.path}: a chain takes layers from one tensor to one tensor, but {type(self.layer).__name__} "
                f"gave {type(result).__name__}; a layer that gives (x, latent) says so by splits_off_latent"
            )
        return result, logdet


RunLink: TypeAlias = Callable[[int, Any], tuple[Any, Tensor]]
"""``run(i, x)`` runs link i."""


def links_of(layers: Sequence[nn.Module] | nn.ModuleList, inverse: bool, name: str = "layers") -> list[Link]:
    """The links of a container whose layers, its attribute ``name``, run one after the other."""
    found = [Link(f"{name}.{i}", layer, inverse) for i, layer in enumerate(layers)]
    return found[::-1] if inverse else found


FOREIGN: dict[str, Callable[[Any, bool], list[Link]]] = {
    "nflows.transforms.base.CompositeTransform": lambda container, inverse: links_of(
        container._transforms, inverse, "_transforms"
    ),
    "nflows.transforms.base.InverseTransform": lambda container, inverse: [
        Link("_transform", container._transform, not inverse)
    ],
}
"""Containers of another library with the same two methods, by the full name of the class, and their links."""


def inner_links(layer: nn.Module) -> Callable[[bool], list[Link]] | None:
    """``links`` of a container that may be taken apart; None for any other layer.

    It may not when hooks wait for it as a whole, or when it runs otherwise than the class that has its ``links``.
    """
    for kind in type(layer).__mro__:
        foreign = FOREIGN.get(f"{kind.__module__}.{kind.__qualname__}")
        if foreign is not None:
            return None if is_changed(layer, kind, DIRECTIONS) else partial(foreign, layer)
    return shortcut(layer, "links")


def elementary(links: Iterable[Link]) -> list[Link]:
    """The links with the containers among them taken apart, where they may be."""
    found: list[Link] = []
    for link in links:
        inner = inner_links(link.layer)
        if inner is None:
            found.append(link)
        else:
            parts = (Link(*part) for part in inner(link.inverse))
            found += elementary(part._replace(path=f"{link.path}.{part.path}") for part in parts)
    return found


def run_links(
    links: Sequence[Link],
    inputs: Sequence[Tensor],
    context: Tensor | None,
    run: RunLink | None = None,
    logdet: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Runs the links one after the other.

    Args:
        links: in the order in which they run.
        inputs: the latents that links which join will take, the last one first to be taken, and after them x.
        context: for every layer.
        run: runs a link in place of ``links[i].run(x, context)``.
        logdet: (B,), of what ran before; zero if not given.

    Returns:
        The latents that links split off, in that order, and after them what comes out at the end; the sum of the
        log-determinants.
    """
    # A starred target would do, but the compiler of PyTorch 2.11 takes it for a tuple.
    latents, x = list(inputs[:-1]), inputs[-1]
    if logdet is None:
        logdet = x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    for i, link in enumerate(links):
        given = (x, latents.pop()) if link.joins else x
        result, change = link.run(given, context) if run is None else run(i, given)
        logdet = logdet + change
        if link.splits:
            x, latent = result
            latents.append(latent)
        else:
            x = result
    return (*latents, x), logdet
