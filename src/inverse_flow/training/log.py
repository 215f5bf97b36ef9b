"""The log of a run, one line a step."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
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
        columns: further figures of the training method, with the same names at every step.
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
    columns: dict[str, float] = field(default_factory=dict)


COLUMNS = tuple(entry.name for entry in fields(StepReport) if entry.name != "columns")


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
        self._writer: csv.DictWriter[str] | None = None
        self.extend(kept)

    def append(self, report: StepReport) -> None:
        self.extend([report])

    def extend(self, reports: Iterable[StepReport]) -> None:
        for report in reports:
            if self._writer is None:  # the first report tells the columns
                self._writer = csv.DictWriter(self._file, [*COLUMNS, *report.columns])
                self._writer.writeheader()
            row = asdict(report)
            self._writer.writerow(row | row.pop("columns"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _report(row: dict[str, str | None]) -> StepReport:
    values = {name: value for name, value in row.items() if value is not None}
    if len(values) < len(row):
        raise ValueError("the line ends early")
    return StepReport(
        step=int(values["step"]),
        epoch=int(values["epoch"]),
        seconds=float(values["seconds"]),
        loss=float(values["loss"]),
        bits_per_dim=float(values["bits_per_dim"]),
        grad_norm=float(values["grad_norm"]),
        learning_rate=float(values["learning_rate"]),
        images_per_second=float(values["images_per_second"]),
        validation=float(values["validation"]) if values["validation"] else None,
        columns={name: float(value) for name, value in values.items() if name not in COLUMNS},
    )
