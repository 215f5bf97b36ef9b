"""The step that hands a layer's gradients on, for every layer with a ``backward_from_output``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def backpropagate(tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Adds the gradients that flow back from ``tensors`` to the ``.grad`` of the leaves; for a layer's
    ``backward_from_output``. What does not require a gradient, or is None, is passed over.
    """
    pairs = [(t, g) for t, g in zip(tensors, grads, strict=True) if t is not None and t.requires_grad]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
