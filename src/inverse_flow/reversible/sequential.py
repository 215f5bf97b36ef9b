"""Training in memory that does not grow with depth: activations are rebuilt from the output instead of stored.

The forward pass of a chain of bijections keeps what comes out at its end. The backward pass goes from the last layer to
the first, rebuilds the input of each from its output through ``inverse``, and back-propagates through that one layer.
Gomez et al., "The Reversible Residual Network", NeurIPS 2017; Orozco et al., "InvertibleNetworks.jl", 2023 (arXiv
2312.13480). docs/memory.md explains it.
"""

from __future__ import annotations

import math
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.ops.bijection import Bijection
from inverse_flow.reversible.chain import Link, elementary, inner_links, links_of
from inverse_flow.reversible.layer import (
    Shape,
    check_layers,
    input_shape,
    output_shape,
    splits_off_latent,
    uses_context,
)
from inverse_flow.reversible.rebuild import Rebuilding, RebuiltChain, relative_error, run
from inverse_flow.reversible.replay import leaves


class Row(Bijection):
    """Layers in a row, f = f_n ∘ … ∘ f_1; the log-determinants add up. For layers that map a tensor to a tensor.

    Raises:
        TypeError: a layer without an inverse, or one that splits off a latent.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(check_layers(layers))
        if any(map(splits_off_latent, layers)):
            raise TypeError("a Split gives a latent of its own: put it into a Flow, which collects the latents")

    @property
    def rebuilding(self) -> Rebuilding | None:
        """How activations are rebuilt, if they are."""
        return None

    @property
    def uses_context(self) -> bool:
        """Whether one of the layers may use the context."""
        return any(map(uses_context, self.layers))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (z,), logdet = run(self.links(inverse=False), (x,), context, self.rebuilding)
        return z, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (x,), logdet = run(self.links(inverse=True), (z,), context, self.rebuilding)
        return x, logdet

    def links(self, inverse: bool) -> list[Link]:
        """(path, layer, direction) of each layer, in the order in which they run."""
        return links_of(self.layers, inverse)

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of z for one x of ``shape``."""
        for layer in self.layers:
            shape = output_shape(layer, shape)
        return shape

    def input_shape(self, shape: Shape) -> Shape:
        """Shape of x for one z of ``shape``."""
        for layer in reversed(self.layers):
            shape = input_shape(layer, shape)
        return shape


class ReversibleSequential(Row):
    """Layers in a row, f = f_n ∘ … ∘ f_1, trained in memory that does not grow with their number.

    ``forward(x, context=None) -> (z, log|det dz/dx|)`` and ``inverse(z, context=None) -> (x, log|det dx/dz|)``; the
    gradients of both are those of the layers run one after the other, up to rounding. The first derivative costs
    the memory of one layer; a derivative of it (``create_graph=True``) that of the whole chain.

    Each layer is a module with ``forward(x, context)`` and ``inverse(z, context)``, from one tensor to one tensor.
    Rebuilding takes its ``inverse``, and then its ``forward`` once more with a graph. A layer whose class has a method
    ``backward_from_output``, see :class:`inverse_flow.flows.FlowLayer`, needs neither. A layer that changes what it
    holds as it runs, such as a moving average, is not rebuilt: what came into it is kept.

    Args:
        layers: the layers.
        anchors: keep the true activation before every ``anchors``-th elementary layer too, so that the error of
            rebuilding cannot pile up beyond it; None for none.
        tolerance: the relative error of rebuilding up to which gradients are trusted; None for √ε of the dtype, half
            of the digits. Rebuilt values are compared with the true ones at every anchor and at the chain's input,
            which is one reduction each, and on a GPU one synchronisation per backward pass. ``math.inf`` compares
            nothing.

    Raises:
        TypeError: a layer has no ``inverse``, or gives something other than one tensor; a context that is neither a
            tensor nor None.
        ValueError: ``anchors`` or ``tolerance`` out of range.
        RuntimeError: in the forward pass, a layer that changes, in place, a tensor that is neither its parameter nor
            its buffer: it could not run again as it did.
        ReconstructionError: in the backward pass, when the tolerance is exceeded. Within the capture of a CUDA graph,
            where nothing can be raised, the gradients become NaN instead.
    """

    def __init__(self, *layers: nn.Module, anchors: int | None = None, tolerance: float | None = None) -> None:
        super().__init__(*layers)
        Rebuilding(anchors, tolerance).checked()
        self.anchors = anchors
        self.tolerance = tolerance

    @property
    def rebuilding(self) -> Rebuilding:
        """How activations are rebuilt."""
        return Rebuilding(self.anchors, self.tolerance)

    def extra_repr(self) -> str:
        return f"anchors={self.anchors}, tolerance={self.tolerance}"


@torch.no_grad()
def reconstruction_errors(
    flow: nn.Module, x: Tensor, context: Tensor | None = None, *, accumulated: bool = True
) -> dict[str, float]:
    """The relative error ‖x̂ − x‖ / ‖x‖ with which the input x of each layer is rebuilt, by the layer's path.

    Args:
        flow: a ``Flow``, a :class:`ReversibleSequential` or another layer, in its present mode.
        x: a batch of data.
        context: its context.
        accumulated: rebuild as the backward pass does without anchors, from the end of the chain, so that each figure
            holds the errors of all the layers that follow. All activations are in memory at once. False: rebuild
            each input from the true output of its layer, which shows the layer by itself, in constant memory.

    Returns:
        An entry for each elementary layer, in the order in which they run. 0 for one whose input is kept, as it changes
        what it holds.
    """
    inner = inner_links(flow)
    links = [Link("", flow, False)] if inner is None else elementary(inner(False))
    chain = RebuiltChain(links, x.device, Rebuilding())
    inputs: dict[int, Any] = {}
    outputs, _ = chain.first_run((x,), context, inputs.__setitem__ if accumulated else None)
    errors = dict.fromkeys(range(len(links)), math.nan)

    def compare(i: int, rebuilt: Any) -> None:
        errors[i] = float(relative_error(rebuilt, inputs[i]))

    with chain.replay.again(leaves(chain.replay.parameters, repeat(False))):
        if accumulated:
            zeros = [torch.zeros_like(output) for output in outputs]
            chain.unwind(outputs, zeros, x.new_zeros(len(x)), context, compare)
        else:
            errors = chain.errors_one_by_one((x,), context)
    return {link.path: errors[i] for i, link in enumerate(links)}
