"""Training in memory that does not grow with depth: activations are rebuilt from the output instead of stored.

The forward pass of a chain of bijections keeps what comes out at its end. The backward pass goes from the last layer to
the first, rebuilds the input of each from its output through ``inverse``, and back-propagates through that one layer.
Gomez et al., "The Reversible Residual Network", NeurIPS 2017; Orozco et al., "InvertibleNetworks.jl", 2023 (arXiv
2312.13480). docs/memory.md explains it.
"""

from __future__ import annotations

import math
from itertools import repeat

import torch
from torch import Tensor, nn

from inverse_flow.ops.backpropagate import backpropagate
from inverse_flow.reversible.chain import (
    Chain,
    ReconstructionError,
    call_directly,
    elementary_steps,
    relative_error,
    run,
)
from inverse_flow.reversible.replay import leaves

__all__ = ["ReconstructionError", "ReversibleSequential", "backpropagate", "reconstruction_errors"]


class ReversibleSequential(nn.Module):
    """Layers in a row, f = f_n ∘ … ∘ f_1, trained in memory that does not grow with their number.

    ``forward(x, context=None) -> (z, log|det dz/dx|)`` and ``inverse(z, context=None) -> (x, log|det dx/dz|)``; the
    gradients of both are those of the layers run one after the other, up to rounding. The first derivative costs
    the memory of one layer; a derivative of it (``create_graph=True``) that of the whole chain.

    Each layer is a module with ``forward(x, context)`` and ``inverse(z, context)``, from one tensor to one tensor.
    Rebuilding takes its ``inverse``, and then its ``forward`` once more with a graph. A layer whose class has a method
    ``backward_from_output``, see :class:`inverse_flow.flows.FlowLayer`, needs neither.

    Args:
        layers: the layers.
        anchors: keep the true activation before every ``anchors``-th elementary layer too, so that the error of
            rebuilding cannot pile up beyond it; None for none.
        tolerance: the relative error of rebuilding up to which gradients are trusted; None for √ε of the dtype, half
            of the digits. Rebuilt values are compared with the true ones at every anchor and at the chain's input,
            which is one reduction each, and on a GPU one synchronisation a backward pass. ``math.inf`` compares
            nothing.

    Raises:
        TypeError: a layer has no ``inverse``, or gives something other than one tensor; a context that is neither a
            tensor nor None.
        ValueError: ``anchors`` or ``tolerance`` out of range.
        ReconstructionError: in the backward pass, when the tolerance is exceeded. Within the capture of a CUDA graph,
            where nothing can be raised, the gradients become NaN instead.
    """

    def __init__(self, *layers: nn.Module, anchors: int | None = None, tolerance: float | None = None) -> None:
        super().__init__()
        for layer in layers:
            if not isinstance(layer, nn.Module) or not callable(getattr(layer, "inverse", None)):
                raise TypeError(f"a reversible chain is made of modules with an inverse, got {type(layer).__name__}")
            if hasattr(layer, "latent_shape"):
                raise TypeError("a Split gives a latent of its own: put it into a Flow, which collects the latents")
        check_options(anchors, tolerance)
        self.layers = nn.ModuleList(layers)
        self.anchors = anchors
        self.tolerance = tolerance

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, inverse=True)

    def elementary_layers(self, inverse: bool) -> list[tuple[str, nn.Module, bool]]:
        """(path, layer, direction) of each layer, in the order in which they run."""
        found = [(f"layers.{i}", layer, inverse) for i, layer in enumerate(self.layers)]
        return found[::-1] if inverse else found

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of z for one x of ``shape``."""
        for layer in self.layers:
            shape = layer.output_shape(shape) if hasattr(layer, "output_shape") else shape  # type: ignore[operator]
        return shape

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of x for one z of ``shape``."""
        for layer in reversed(self.layers):
            shape = layer.input_shape(shape) if hasattr(layer, "input_shape") else shape  # type: ignore[operator]
        return shape

    def extra_repr(self) -> str:
        return f"anchors={self.anchors}, tolerance={self.tolerance}"

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        steps = elementary_steps(self, inverse=inverse)
        (z,), logdet = run(steps, (x,), context, anchors=self.anchors, tolerance=self.tolerance)
        return z, logdet


def check_options(anchors: int | None, tolerance: float | None) -> None:
    """Refuses what is no distance between anchors and no tolerance.

    Raises:
        ValueError: naming the one that is out of range.
    """
    if anchors is not None and (not isinstance(anchors, int) or anchors < 1):
        raise ValueError(f"anchors must be the number of layers between two of them, at least 1, got {anchors!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"the tolerance of rebuilding must be above 0, got {tolerance!r}")


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
        An entry for each elementary layer, in the order in which they run.
    """
    chain = Chain(elementary_steps(flow), x.device, call_directly, None, None)
    inputs: dict[int, Tensor] = {}
    outputs, _ = chain.first_run((x,), context, inputs.__setitem__ if accumulated else None)
    errors = [math.nan] * len(chain.steps)

    def compare(i: int, rebuilt: Tensor) -> Tensor:
        errors[i] = float(relative_error(rebuilt, inputs[i]))
        return rebuilt

    with chain.replay.again(leaves(chain.replay.parameters, repeat(False))):
        if accumulated:
            zeros = [torch.zeros_like(output) for output in outputs]
            chain.unwind(outputs, zeros, x.new_zeros(len(x)), context, compare)
        else:
            errors = [float(error) for _, error in chain.errors_one_by_one((x,), context)]
    return {step.path: error for step, error in zip(chain.steps, errors, strict=True)}
