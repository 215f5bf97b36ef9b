"""Bits per dimension: of a model, and of what can be had without looking at more than one pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from inverse_flow.flows import Flow
from inverse_flow.ops.spec import check_integer
from inverse_flow.training.batches import EVALUATION, generator
from inverse_flow.training.config import MAX_BIT_DEPTH
from inverse_flow.training.dequantization import dequantize, quantize

EVALUATION_BATCH = 100

Watch: TypeAlias = Callable[[int, int], None]
"""Told after every batch how many images are done, and of how many."""


def unwatched(*_: object) -> None:
    """Takes no notice."""


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int], bit_depth: int = MAX_BIT_DEPTH) -> Tensor:
    """−log₂ of the probability of an n-bit image, per dimension: n − log p(x̃) / (D ln 2).

    p is the density on the dequantized images in [0, 1)^D; a colour value is a cell of width 2⁻ⁿ there, which is
    where n comes from. By Jensen's inequality the mean is an upper bound on the bits of the discrete model.

    Args:
        log_prob: log p(x̃) in nats, of any shape.
        event_shape: shape of one image; its product is D.
        bit_depth: n.
    """
    return bit_depth - log_prob / (math.prod(event_shape) * math.log(2))


@torch.no_grad()
def log_probs(
    model: Flow,
    images: Tensor,
    bit_depth: int = MAX_BIT_DEPTH,
    *,
    context: Tensor | None = None,
    draw: int = 0,
    batch_size: int = EVALUATION_BATCH,
    watch: Watch = unwatched,
) -> Tensor:
    """log p(x̃) of uint8 images, each with one draw of noise: (N,), float64, on the CPU. Leaves the mode alone.

    Args:
        model: the flow.
        images: (N, C, H, W), uint8.
        bit_depth: n.
        context: one row per image, for a conditional model.
        draw: number of the draw; the noise of a draw is the same at every call.
        batch_size: images at a time.
        watch: told how far it has come.

    Raises:
        TypeError: a batch size that is no integer.
        ValueError: no images; a batch size below 1.
    """
    check_integer("batch_size", batch_size)
    if not len(images):
        raise ValueError("there are no images to evaluate")
    noise = generator(0, EVALUATION, draw)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    try:
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            x = dequantize(images[rows], bit_depth, noise).to(device)
            given = None if context is None else context[rows].to(device)
            found.append(model.log_prob(x, given).double().cpu())
            watch(min(rows.stop, len(images)), len(images))
    finally:
        model.train(was_training)
    return torch.cat(found)


def evaluate(
    model: Flow,
    images: Tensor,
    bit_depth: int = MAX_BIT_DEPTH,
    *,
    context: Tensor | None = None,
    batch_size: int = EVALUATION_BATCH,
    watch: Watch = unwatched,
) -> float:
    """Mean bits per dimension of uint8 images, with the same noise at every call. Leaves the model's mode alone.

    Args, Raises: as :func:`log_probs`.
    """
    found = log_probs(model, images, bit_depth, context=context, batch_size=batch_size, watch=watch)
    return float(bits_per_dim(found.mean(), model.event_shape, bit_depth))


def bound_of(draws: Iterable[Tensor]) -> Tensor:
    """log (1/k) Σ p(x̃_j) of the log p(x̃_j), each (N,), of k draws of the noise, see :func:`log_probs`.

    By Jensen's inequality its mean over the noise grows with k and tends to the log of the n-bit image's probability
    (times 2ⁿᴰ), for uniform and for variational dequantization (Burda, Grosse & Salakhutdinov, "Importance Weighted
    Autoencoders", 2016; Theis, van den Oord & Bethge, 2016, section 3.1).
    """
    logs = torch.stack(tuple(draws))
    return logs.logsumexp(0) - math.log(len(logs))


def standard_error(values: Tensor) -> float:
    """s/√N of the mean of N values, s their standard deviation; NaN for a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


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
