"""The settings of training by parts, and whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from inverse_flow.flows import Flow
from inverse_flow.models.fields import Bounds, check
from inverse_flow.parts.method import ByParts
from inverse_flow.training import Batches, TrainConfig, Workers
from inverse_flow.training.config import parts_settings

Cut: TypeAlias = Literal["blocks", "across"]
CUTS: tuple[Cut, ...] = ("blocks", "across")

Schedule: TypeAlias = Literal["sequential", "alternate", "simultaneous"]
SCHEDULES: tuple[Schedule, ...] = ("sequential", "alternate", "simultaneous")

Turn: TypeAlias = Literal["batch", "epoch"]
TURNS: tuple[Turn, ...] = ("batch", "epoch")

# 12 of 18 steps are two thirds of a run, though 12 / 18 is less than 1 − 1 / 3 in floating point.
ROUNDING = 1e-9


@parts_settings
@dataclass(frozen=True)
class PartsConfig:
    """How a flow is cut into parts and how these are trained. See docs/parts.md.

    Attributes:
        cut: ``"blocks"``: at the ends of blocks; ``"across"``: after any step.
        count: parts n.
        schedule: whose turn it is before the finish. ``"sequential"``: the parts one after the other, each for an equal
            share of the budget; ``"alternate"``: in turn; ``"simultaneous"``: all parts on every batch, each with its
            own gradient.
        turn: what a part is trained on in its turn when they ``"alternate"``: a ``"batch"`` or an ``"epoch"``.
        finish: share of the run, at its end, in which all layers are trained end to end. A third in the original: 30
            of 90 epochs.
        learning_rates: learning rates of the parts, as many as there are; the finish has them too. Without them it is
            that of the whole run everywhere.
        cache_epochs: epochs for which the outputs of finished parts are kept in a ``"sequential"`` run. They are
            computed for all images at once; after this many epochs they are computed again, with other noise and flips.
            0 computes them anew for every batch.
    """

    cut: Cut = "across"
    count: Annotated[int, Bounds(1)] = 2
    schedule: Schedule = "alternate"
    turn: Turn = "batch"
    finish: Annotated[float, Bounds(0, 1)] = 1 / 3
    learning_rates: tuple[Annotated[float, Bounds(above=0)], ...] = ()
    cache_epochs: Annotated[int, Bounds(0)] = 0

    def __post_init__(self) -> None:
        check(self)
        if self.learning_rates and len(self.learning_rates) != self.count:
            raise ValueError(f"{self.count} parts need as many learning rates, got {len(self.learning_rates)}")
        if self.cache_epochs and self.schedule != "sequential":
            raise ValueError(f"cache_epochs keeps the outputs of parts that are done: sequential, not {self.schedule}")

    def make(self, model: Flow, config: TrainConfig, workers: Workers, batches: Batches) -> ByParts:
        """The training method with these settings."""
        return ByParts(model, config, workers, batches)

    def turn_of(self, step: int, epoch: int, progress: float) -> range | None:
        """The parts, counted from 0, that a step trains; None when it trains all layers end to end.

        Args:
            step: of the run, counted from 0.
            epoch: that it belongs to, counted from 0.
            progress: how much of the run is done, 0 to 1.
        """
        share = 1 - self.finish
        done = progress + ROUNDING
        if done >= share:
            return None
        if self.schedule == "simultaneous":
            return range(self.count)
        if self.schedule == "sequential":
            part = min(self.count - 1, int(done / share * self.count))
        else:
            part = (step if self.turn == "batch" else epoch) % self.count
        return range(part, part + 1)


def parse_parts(text: str) -> tuple[Cut, int]:
    """The cut and the number of parts in a text such as "across:2".

    Raises:
        ValueError: the text is no such thing.
    """
    cut, _, count = text.partition(":")
    for known in CUTS:
        if cut == known and count.isdecimal() and int(count) >= 1:
            return known, int(count)
    raise ValueError(f'parts must be given as "blocks:n" or "across:n" with n at least 1, got {text!r}')
