"""What defines a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from inverse_flow.flows import Flow

if TYPE_CHECKING:
    from inverse_flow.training.batches import Batches
    from inverse_flow.training.method import Method
    from inverse_flow.training.workers import Workers

MAX_BIT_DEPTH = 8
# PyTorch's generators take no more.
MAX_SEED = 2**63 - 1


class MethodSettings(Protocol):
    """Settings of a training method, which know how to make it: a frozen dataclass of plain values."""

    def make(self, model: Flow, config: TrainConfig, workers: Workers, batches: Batches) -> Method:
        """The method, for a model and the batches of its run."""
        ...


SettingsT = TypeVar("SettingsT", bound=type)

# Of training by parts. Its package makes itself known, so that nothing here needs to know of it.
_parts_settings: type | None = None


def parts_settings(kind: SettingsT) -> SettingsT:
    """Makes the class known that :attr:`TrainConfig.parts` has; a class decorator."""
    global _parts_settings
    _parts_settings = kind
    return kind


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the losses of a run, and when it ends.

    Attributes:
        steps: the run ends after this many optimiser steps …
        minutes: … or after this much time, whichever comes first. Time before a resume counts. None for no limit.
        batch_size: images in a step, over all processes; a smaller training set is one batch.
        optimizer: ``"adam"`` or ``"adamax"`` (Kingma & Ba, 2015).
        learning_rate: reached after ``warmup_steps`` steps of linear growth.
        warmup_steps: see there.
        decay_at: where the learning rate is multiplied by ``decay_factor``: a number below 1 is a share of the run,
            by steps or by time, whichever is further; any other a step. Empty for a constant rate: the averaged
            weights stand in for a decay.
        decay_factor: see there.
        max_grad_norm: the gradient of the bits per dimension is scaled down to this norm.
        precision: ``"float32"``, or ``"bf16"`` for the networks of couplings and priors in bfloat16. Solves and
            log-determinants are float32 in both.
        average_decay: decay of the exponential moving average of the weights, with which the model is evaluated
            and sampled; 0 for no averaging.
        flip: mirror each image left to right with probability ½.
        bit_depth: bits of a colour value, 1 to 8; fewer than 8 drop the lower bits of the images.
        dequantization: of the noise that makes whole colour values continuous: ``"uniform"``, or ``"variational"``: a
            small flow of its own moves it, trained with the model and put in front of the model's layers.
        validation: this many of the training images, drawn at random, are not trained on. The weights with the best
            bits per dimension on them are the result. 0 for none: the last weights are the result.
        evaluate_every: steps between evaluations and checkpoints.
        patience: the run ends when this many evaluations have brought no better validation; None for never.
        max_inverse_error: at every evaluation each layer inverts its own output, and the run stops at a layer that
            misses its input by more than this share of the input's largest magnitude; None for no check.
        seed: of the choice and order of the images, the dequantization noise and the flips.
        parts: train by parts, with these settings, an :class:`inverse_flow.parts.PartsConfig`; None for end to end.
            Read from a checkpoint it is that too once ``inverse_flow.parts`` is imported, and until then a mapping.
    """

    steps: int = 100_000
    minutes: float | None = None
    batch_size: int = 50
    optimizer: Literal["adam", "adamax"] = "adam"
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_at: tuple[float, ...] = ()
    decay_factor: float = 0.1
    max_grad_norm: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    average_decay: float = 0.99
    flip: bool = False
    bit_depth: int = 8
    dequantization: Literal["uniform", "variational"] = "uniform"
    validation: int = 0
    evaluate_every: int = 50
    patience: int | None = None
    max_inverse_error: float | None = 1e-2
    seed: int = 0
    parts: MethodSettings | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # A config read back from JSON has lists; equal runs must have equal configs.
        object.__setattr__(self, "decay_at", tuple(self.decay_at))
        if isinstance(self.parts, Mapping) and _parts_settings is not None:
            object.__setattr__(self, "parts", _parts_settings(**self.parts))
        for name in ("steps", "warmup_steps", "validation", "seed"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _require(self.seed <= MAX_SEED, "seed", f"at most {MAX_SEED}", self.seed)
        for name in ("batch_size", "evaluate_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm", "decay_factor"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), name, "a finite number above 0", value)
        for at in self.decay_at:
            _require(0 < at < 1 or (at >= 1 and at == int(at)), "decay_at", "shares below 1 or whole steps", at)
        _require(self.minutes is None or self.minutes >= 0, "minutes", "at least 0", self.minutes)
        _require(self.patience is None or self.patience >= 1, "patience", "at least 1", self.patience)
        _require(self.patience is None or self.validation > 0, "validation", "above 0 for patience", self.validation)
        bound = self.max_inverse_error
        _require(bound is None or bound > 0, "max_inverse_error", "above 0", bound)
        _require(0 <= self.average_decay < 1, "average_decay", "at least 0 and below 1", self.average_decay)
        _require(1 <= self.bit_depth <= MAX_BIT_DEPTH, "bit_depth", f"1 to {MAX_BIT_DEPTH}", self.bit_depth)
        _require(self.optimizer in ("adam", "adamax"), "optimizer", "adam or adamax", self.optimizer)
        kind = self.dequantization
        _require(kind in ("uniform", "variational"), "dequantization", "uniform or variational", kind)
        _require(self.precision in ("float32", "bf16"), "precision", "float32 or bf16", self.precision)

    def progress(self, steps: int, seconds: float) -> float:
        """How much of the run is done: the larger of the shares of its steps and of its time, at most 1."""
        by_steps = steps / self.steps if self.steps else 1.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def rate_factor(self, step: int, progress: float) -> float:
        """What the learning rate is multiplied by at a step, counted from 0: linear warm-up, then a decay in steps.

        min(1, (step + 1) / warmup_steps) · decay_factorᵏ, with k the number of the ``decay_at`` that lie behind: those
        below 1 are compared with ``progress``, the others with the step.
        """
        warmth = min(1.0, (step + 1) / max(1, self.warmup_steps))
        passed = sum((progress if at < 1 else step) >= at for at in self.decay_at)
        return warmth * self.decay_factor**passed

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and checkpoints."""
        return {**asdict(self), "decay_at": list(self.decay_at)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration with these values, as :meth:`to_dict` gave them.

        Raises:
            ValueError: a name that is no setting, or a value that cannot be.
        """
        unknown = values.keys() - {entry.name for entry in fields(cls)}
        _require(not unknown, "a training configuration", "of known settings", ", ".join(sorted(unknown)))
        return cls(**values)


def _require(condition: bool, name: str, expected: str, given: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {given}")
