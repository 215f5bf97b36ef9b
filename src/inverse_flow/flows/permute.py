"""A fixed permutation of the channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inverse_flow.flows.base import FlowLayer, check_images, zero_logdet
from inverse_flow.ops.spec import is_integer


class Permute(FlowLayer):
    """z[:, i] = x[:, permutation[i]]; log-determinant 0.

    Args:
        permutation: the channels' new order, such as ``range(C - 1, -1, -1)`` or ``torch.randperm(C)``.
    """

    uses_context = False
    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        super().__init__()
        order = permutation.tolist() if hasattr(permutation, "tolist") else permutation
        integers = isinstance(order, Sequence) and all(map(is_integer, order))
        if not integers or sorted(order) != list(range(len(order))):
            raise ValueError(f"a permutation names each of the channels 0 … C-1 once, got {permutation!r}")
        # From plain numbers, which exist where the model is built without values, on the meta device.
        device = permutation.device if isinstance(permutation, Tensor) else None
        self.register_buffer("permutation", torch.tensor(order, device=device))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        self.register_buffer("inverse_permutation", torch.tensor(inverse, device=device))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, len(self.permutation))
        return x[:, self.permutation], zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, len(self.permutation))
        return z[:, self.inverse_permutation], zero_logdet(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both go back to where they came from."""
        return self.inverse(z)[0], self.inverse(grad_z)[0]
