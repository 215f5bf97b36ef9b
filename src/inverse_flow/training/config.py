"""What defines a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MAX_BIT_DEPTH = 8


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the losses of a run, and when it ends.

    Attributes:
        steps: the run ends after this many optimiser steps …
        minutes: … or after this much time, whichever comes first. Time before a resume counts. None for no limit.
        batch_size: images in a step; a smaller training set is one batch.
        learning_rate: of Adam, reached after ``warmup_steps`` steps of linear growth and constant from then on. The
            averaged weights stand in for a decay, which a run limited by time could not place.
        warmup_steps: see there.
        max_grad_norm: the gradient of the bits per dimension is scaled down to this norm.
        average_decay: decay of the exponential moving average of the weights, with which the model is evaluated
            and sampled; 0 for no averaging.
        flip: mirror each image left to right with probability ½.
        bit_depth: bits of a colour value, 1 to 8; fewer than 8 drop the lower bits of the images.
        validation: this many of the training images, drawn at random, are not trained on. The weights with the best
            bits per dimension on them are the result. 0 for none: the last weights are the result.
        evaluate_every: steps between evaluations and checkpoints.
        seed: of the choice and order of the images, the dequantization noise and the flips.
    """

    steps: int = 100_000
    minutes: float | None = None
    batch_size: int = 50
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    average_decay: float = 0.99
    flip: bool = False
    bit_depth: int = 8
    validation: int = 0
    evaluate_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "validation", "seed"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("batch_size", "evaluate_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), name, "a finite number above 0", value)
        _require(self.minutes is None or self.minutes >= 0, "minutes", "at least 0", self.minutes)
        _require(0 <= self.average_decay < 1, "average_decay", "at least 0 and below 1", self.average_decay)
        _require(1 <= self.bit_depth <= MAX_BIT_DEPTH, "bit_depth", f"1 to {MAX_BIT_DEPTH}", self.bit_depth)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        return cls(**values)


def _require(condition: bool, name: str, expected: str, given: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {given}")
