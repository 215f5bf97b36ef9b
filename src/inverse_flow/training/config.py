"""What defines a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from inverse_flow.flows import Flow
from inverse_flow.models.fields import Bounds, check, from_values

if TYPE_CHECKING:
    from inverse_flow.training.batches import Batches
    from inverse_flow.training.method import Method
    from inverse_flow.training.workers import Workers

MAX_BIT_DEPTH = 8
# Where the configuration does not say how many: a tenth of the images, at most this many.
MOST_VALIDATION = 100
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
        steps: the run ends after this many optimizer steps …
        minutes: … or after this much time, whichever comes first. Time before a resume counts. None for no limit.
        batch_size: images in a step, over all processes. A smaller training set is one batch.
        optimizer: rule that turns gradients into steps: ``"adam"`` or ``"adamax"`` (Kingma & Ba, 2015).
        learning_rate: size of the steps after the warm-up. Deeper models need smaller ones.
        warmup_steps: steps over which the learning rate grows, linearly.
        decay_at: where the learning rate is multiplied by ``decay_factor``: a number below 1 is a share of the run,
            by steps or by time, whichever is further; any other is a step. Without it the rate is constant: the
            averaged weights stand in for a decay.
        decay_factor: what the learning rate is multiplied by at each ``decay_at``.
        max_grad_norm: largest norm of the gradient of the bits per dimension; longer ones are scaled down to it.
        max_gain: largest gain of an inverse convolution: after every step, one above it is damped to it by
            ``inverse_flow.limit_gain_``. None for no limit.
        precision: ``"float32"``, or ``"bf16"`` for the networks of couplings and priors in bfloat16. Solves and
            log-determinants are float32 in both.
        average_decay: decay of the exponential moving average of the weights, with which the model is evaluated
            and sampled; 0 for no averaging.
        flip: mirror each image left to right with probability ½, which suits no digits or letters.
        bit_depth: bits of a colour value; fewer than 8 drop the lower bits of the images.
        dequantization: noise that makes whole colour values continuous: ``"uniform"``, or ``"variational"``: moved by
            a small flow of its own, which is trained with the model and put in front of the model's layers.
        validation: this many of the training images, drawn at random, are not trained on. The weights with the best
            bits per dimension on them are the result. 0 for none: the last weights are the result. None for a tenth
            of the images, at most 100.
        evaluate_every: steps between evaluations and checkpoints.
        patience: the run ends when this many evaluations have brought no better validation. None for never.
        max_inverse_error: at every evaluation each layer inverts its own output, and the run stops at a layer that
            misses its input by more than this share of the input's largest magnitude. None for no check.
        seed: seed of the weights, of the choice and order of the images, of the noise and of the flips.
        parts: train by parts, with these settings, an :class:`inverse_flow.parts.PartsConfig`; None for end to end.
            Read from a checkpoint it is that too once ``inverse_flow.parts`` is imported, and until then a mapping.
    """

    steps: Annotated[int, Bounds(0)] = 100_000
    minutes: Annotated[float, Bounds(0)] | None = None
    batch_size: Annotated[int, Bounds(1)] = 50
    optimizer: Literal["adam", "adamax"] = "adam"
    learning_rate: Annotated[float, Bounds(above=0)] = 1e-3
    warmup_steps: Annotated[int, Bounds(0)] = 50
    decay_at: tuple[float, ...] = ()
    decay_factor: Annotated[float, Bounds(above=0)] = 0.1
    max_grad_norm: Annotated[float, Bounds(above=0)] = 1.0
    max_gain: Annotated[float, Bounds(above=0)] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    average_decay: Annotated[float, Bounds(0, below=1)] = 0.99
    flip: bool = False
    bit_depth: Annotated[int, Bounds(1, MAX_BIT_DEPTH)] = 8
    dequantization: Literal["uniform", "variational"] = "uniform"
    validation: Annotated[int, Bounds(0)] | None = None
    evaluate_every: Annotated[int, Bounds(1)] = 50
    patience: Annotated[int, Bounds(1)] | None = None
    max_inverse_error: Annotated[float, Bounds(above=0)] | None = 1e-2
    seed: Annotated[int, Bounds(0, MAX_SEED)] = 0
    parts: MethodSettings | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.parts, Mapping) and _parts_settings is not None:
            object.__setattr__(self, "parts", from_values(_parts_settings, self.parts))
        if self.parts is not None and not isinstance(self.parts, Mapping) and not hasattr(self.parts, "make"):
            raise TypeError(f"parts must be a PartsConfig, got {self.parts!r}")
        check(self)
        for at in self.decay_at:
            _require(0 < at < 1 or (at >= 1 and at == int(at)), "decay_at", "shares below 1 or whole steps", at)
        _require(self.patience is None or self.validation != 0, "validation", "above 0 for patience", self.validation)

    def validation_images(self, count: int) -> int:
        """How many of ``count`` images are not trained on."""
        return min(MOST_VALIDATION, count // 10) if self.validation is None else self.validation

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
        return from_values(cls, values)


def _require(condition: bool, name: str, expected: str, given: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {given}")
