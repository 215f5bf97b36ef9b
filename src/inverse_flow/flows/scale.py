"""How the raw output r of a coupling's network becomes the scale that it multiplies by.

Each function gives log(scale), and 0 for r = 0, so that a coupling whose network starts at zero starts as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest |log scale| of a bounded one: a scale lies in [e⁻², e²] ≈ [0.14, 7.4], so that one layer can stretch or
# shrink by no more than that, whatever its network puts out.
MAX_LOG_SCALE = 2.0

ScaleKind: TypeAlias = Literal["tanh", "exp_clamp", "sigmoid", "softplus", "exp"]


def tanh_scale(raw: Tensor, limit: float = MAX_LOG_SCALE) -> Tensor:
    """log scale = limit · tanh(r / limit): slope 1 at zero, never beyond ±limit."""
    return limit * torch.tanh(raw / limit)


def exp_clamp_scale(raw: Tensor, limit: float = MAX_LOG_SCALE) -> Tensor:
    """log scale = limit · (2/π) · atan(r): never beyond ±limit, which it comes near slowly."""
    return limit * 2 / math.pi * torch.atan(raw)


def sigmoid_scale(raw: Tensor, low: float = 0.5, high: float = 2.0) -> Tensor:
    """scale = low + (high − low) · σ(r + c), with c such that it is 1 at r = 0.

    Raises:
        ValueError: bounds that 1 does not lie between, or one that is not positive.
    """
    if not 0 < low < 1 < high:
        raise ValueError(f"the bounds of a scale must be positive and 1 lie between them, got {low} and {high}")
    return torch.log(low + (high - low) * torch.sigmoid(raw + math.log((1 - low) / (high - 1))))


def softplus_scale(raw: Tensor) -> Tensor:
    """scale = log(1 + exp(r + c)), c = log(e − 1): above it grows as r does, below it falls towards 0 as exp(r)."""
    shifted = raw + math.log(math.e - 1)
    # Far below zero the softplus is exp, which may have no digits left to take the logarithm of.
    low = -math.log(1 / torch.finfo(raw.dtype).eps)
    return torch.where(shifted < low, shifted, F.softplus(shifted.clamp(min=low)).log())


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": tanh_scale,
    "exp_clamp": exp_clamp_scale,
    "sigmoid": sigmoid_scale,
    "softplus": softplus_scale,
    "exp": torch.clone,
}
"""log(scale) of r by its name; ``"exp"`` is r itself, without bounds."""

Scale: TypeAlias = ScaleKind | Callable[[Tensor], Tensor]
"""A name of :data:`SCALES`, or a function of your own from r to log(scale)."""


def check_scale(scale: Scale) -> Scale:
    """The scale as it was given.

    Raises:
        ValueError: a name that does not exist.
    """
    if not callable(scale) and scale not in [*SCALES]:
        raise ValueError(f"the scale must be a function or one of {', '.join(map(repr, SCALES))}, got {scale!r}")
    return scale


def log_scale(scale: Scale, raw: Tensor) -> Tensor:
    """log(scale) of the raw output of a network."""
    return scale(raw) if callable(scale) else SCALES[scale](raw)
