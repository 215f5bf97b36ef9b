"""What can be had without looking at more than one pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inverse_flow.training.config import MAX_BIT_DEPTH
from inverse_flow.training.metrics import quantize


@dataclass(frozen=True)
class IndependentPixels:
    """One histogram for each pixel and channel: P(v) = (count(v) + 1) / (N + 2ⁿ), n the bit depth.

    A model that is no better than this has learned nothing of how pixels hang together.

    Attributes:
        log_probabilities: (D, 2ⁿ), base 2.
        bit_depth: n.
    """

    log_probabilities: Tensor
    bit_depth: int

    @classmethod
    def fit(cls, images: Tensor, bit_depth: int = MAX_BIT_DEPTH) -> IndependentPixels:
        """Counts the values of uint8 images (N, …)."""
        values, levels = _values(images, bit_depth), 2**bit_depth
        dims = values.shape[1]
        cells = values + levels * torch.arange(dims)
        counts = torch.bincount(cells.flatten(), minlength=dims * levels).view(dims, levels)
        probabilities = (counts + 1).double() / (len(images) + levels)
        return cls(probabilities.log2(), bit_depth)

    def bits_per_dim(self, images: Tensor) -> float:
        """Mean −log₂ P per dimension of uint8 images (N, …)."""
        values = _values(images, self.bit_depth)
        return -float(self.log_probabilities.T.gather(0, values).mean())


def _values(images: Tensor, bit_depth: int) -> Tensor:
    return quantize(images, bit_depth).flatten(1).long().cpu()
