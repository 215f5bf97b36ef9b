"""Dequantization and bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inverse_flow.flows import Flow
from inverse_flow.training import seeding
from inverse_flow.training.config import MAX_BIT_DEPTH

EVALUATION_BATCH = 100


def quantize(images: Tensor, bit_depth: int = MAX_BIT_DEPTH) -> Tensor:
    """The upper ``bit_depth`` bits of uint8 images, as integers 0 … 2ⁿ − 1 in uint8."""
    return images >> (MAX_BIT_DEPTH - bit_depth)


def dequantize(images: Tensor, bit_depth: int = MAX_BIT_DEPTH, generator: torch.Generator | None = None) -> Tensor:
    """x̃ = (q + u) / 2ⁿ in [0, 1), with q the n upper bits of uint8 images and u uniform on [0, 1), in float32.

    Source: Uria, Murray & Larochelle, "RNADE", 2013; Theis, van den Oord & Bethge, 2016, section 3.1.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"dequantize expects uint8 images, got {images.dtype}")
    noise = torch.rand(images.shape, generator=generator).to(images.device)
    below_one = 1 - 2**-24  # the largest float32 below 1: 255 + u may round up to 256
    return ((quantize(images, bit_depth) + noise) / 2**bit_depth).clamp(max=below_one)


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
def evaluate(
    model: Flow, images: Tensor, bit_depth: int = MAX_BIT_DEPTH, *, batch_size: int = EVALUATION_BATCH
) -> float:
    """Mean bits per dimension of uint8 images, with the same noise at every call. Leaves the model's mode alone.

    Raises:
        ValueError: no images.
    """
    if not len(images):
        raise ValueError("there are no images to evaluate")
    noise = seeding.generator(0, seeding.EVALUATION)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        log_probs = [
            model.log_prob(dequantize(batch, bit_depth, noise).to(device)).double().cpu()
            for batch in images.split(batch_size)
        ]
    finally:
        model.train(was_training)
    return float(bits_per_dim(torch.cat(log_probs).mean(), model.event_shape, bit_depth))
