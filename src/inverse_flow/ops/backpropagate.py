"""The step that hands a layer's gradients on, for every layer with a ``backward_from_output``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inverse_flow.ops.causal import without_autocast


def backpropagate(tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Adds the gradients that flow back from ``tensors`` to the ``.grad`` of the leaves; for a layer's
    ``backward_from_output``. What does not require a gradient, or is None, is passed over. Autocast is off, as it is in
    the backward pass of a program: within it the products of a float32 layer would lose half of their digits.
    """
    pairs = [(t, g) for t, g in zip(tensors, grads, strict=True) if t is not None and t.requires_grad]
    if pairs:
        with without_autocast(pairs[0][0].device.type):
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
