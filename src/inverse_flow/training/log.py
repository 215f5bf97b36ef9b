"""The log of a run, one line a step."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE = "log.csv"


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Attributes:
        step: counted from 1.
        epoch: counted from 0.
        seconds: time in training since the run began, without the time between an interruption and the resume.
        loss: mean −log p(x̃) of the batch, nats per image.
        bits_per_dim: the same in bits per dimension.
        grad_norm: norm of the gradient of ``bits_per_dim`` before clipping.
        learning_rate: of this step.
        images_per_second: of this step.
        validation: bits per dimension of the averaged weights on the validation images, at the steps that evaluate.
    """

    step: int
    epoch: int
    seconds: float
    loss: float
    bits_per_dim: float
    grad_norm: float
    learning_rate: float
    images_per_second: float
    validation: float | None = None


def read_log(path: Path) -> list[StepReport]:
    """The reports in a log; a line cut short by an interruption ends it."""
    reports = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                reports.append(_report(row))
            except (TypeError, ValueError):
                break
    return reports


class CsvLog:
    """Appends reports to a file, after dropping what a resumed run is about to do again."""

    def __init__(self, path: Path, steps_done: int) -> None:
        kept = [r for r in read_log(path) if r.step <= steps_done] if steps_done and path.is_file() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, [field.name for field in fields(StepReport)])
        self._writer.writeheader()
        self.extend(kept)

    def extend(self, reports: Iterable[StepReport]) -> None:
        self._writer.writerows(asdict(report) for report in reports)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _report(row: dict[str, str]) -> StepReport:
    if row["validation"] is None:
        raise ValueError("the line ends early")
    return StepReport(
        step=int(row["step"]),
        epoch=int(row["epoch"]),
        seconds=float(row["seconds"]),
        loss=float(row["loss"]),
        bits_per_dim=float(row["bits_per_dim"]),
        grad_norm=float(row["grad_norm"]),
        learning_rate=float(row["learning_rate"]),
        images_per_second=float(row["images_per_second"]),
        validation=float(row["validation"]) if row["validation"] else None,
    )
