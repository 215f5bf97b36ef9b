"""Whether every layer gives back what it was given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from inverse_flow.flows import Flow
from inverse_flow.reversible.chain import elementary


class InverseError(FloatingPointError):
    """A layer does not invert its own output. ``path`` names it: ``flow.get_submodule(error.path)``."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path = path
        self.what = what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@torch.no_grad()
def inverse_errors(flow: Flow, x: Tensor, context: Tensor | None = None) -> Iterator[tuple[str, nn.Module, float]]:
    """For each layer f, in its own input x: max|x − f⁻¹(f(x))| / max|x|, with its path. Leaves the modes alone."""
    was_training = flow.training
    flow.eval()
    try:
        for link in elementary(flow.links(inverse=False)):
            z, _ = link.run(x, context)
            back, _ = link.turned.run(z, context)
            size = max(float(x.abs().max()), torch.finfo(x.dtype).tiny)
            yield link.path, link.layer, float((back - x).abs().max()) / size
            x = z[0] if link.splits else z
    finally:
        flow.train(was_training)


def check_inverses(flow: Flow, x: Tensor, context: Tensor | None, bound: float) -> None:
    """Refuses a flow in which the error of a layer is above ``bound``, or no number.

    Raises:
        InverseError: naming the first such layer.
    """
    for path, layer, error in inverse_errors(flow, x, context):
        if not error <= bound:
            kind = type(layer).__name__
            raise InverseError(path, f"{kind} misses its own input by {error:.1e} of its size, more than {bound:g}")
