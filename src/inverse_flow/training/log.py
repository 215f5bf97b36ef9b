"""The log of a run, one line per step; and the same for TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from inverse_flow.training.files import replacing

FILE = "log.csv"
BOARD_FOLDER = "tensorboard"
BOARD_SCALARS = ("loss", "bits_per_dim", "grad_norm", "learning_rate", "images_per_second")


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

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
        largest_gain: the largest ‖A⁻¹‖∞ of the inverse convolutions, at the steps that evaluate; None without any.
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
    largest_gain: float | None = None


COLUMNS = tuple(entry.name for entry in fields(StepReport) if entry.name != "columns")
COUNTS = ("step", "epoch")
# Empty at other steps; the second is in no log of an older version.
AT_EVALUATIONS = ("validation", "largest_gain")


def read_log(path: Path) -> list[StepReport]:
    """The reports in a log; a line cut short by an interruption ends it."""
    reports = []
    # Bytes that are no text, which a machine without power may leave behind, are no numbers either.
    with path.open(newline="", encoding="utf-8", errors="replace") as file, suppress(TypeError, ValueError, csv.Error):
        for row in csv.DictReader(file):
            reports.append(_report(row))  # noqa: PERF401  (an error keeps what was read before it)
    return reports


class CsvLog:
    """Appends reports to a file, after dropping what a resumed run is about to do again.

    What is kept is written beside the file, which it then replaces: a run that is killed meanwhile loses nothing.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        kept = [r for r in read_log(path) if r.step <= steps_done] if steps_done and path.is_file() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            self._columns = _write(file, kept)
        self._file = path.open("a", newline="", encoding="utf-8")

    def append(self, report: StepReport) -> None:
        self._columns = _write(self._file, [report], self._columns)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _write(file: TextIO, reports: Iterable[StepReport], columns: list[str] | None = None) -> list[str] | None:
    """Writes one line per report; before the first one of a file, which has no ``columns`` yet, their names."""
    for report in reports:
        row = asdict(report)
        row |= row.pop("columns")
        writer = csv.DictWriter(file, columns or list(row))
        if columns is None:
            columns = list(row)
            writer.writeheader()
        writer.writerow(row)
    return columns


def _report(row: dict[str, str | None]) -> StepReport:
    values = {name: value for name, value in row.items() if value is not None}
    if len(values) < len(row):
        raise ValueError("the line ends early")
    known: dict[str, Any] = {name: values.pop(name, "") for name in COLUMNS}
    for name, value in known.items():
        if name in COUNTS:
            known[name] = int(value)
        else:
            known[name] = None if name in AT_EVALUATIONS and not value else float(value)
    return StepReport(**known, columns={name: float(value) for name, value in values.items()})


class TensorBoardLog:
    """Writes every report, called with it, as scalars in the folder ``tensorboard`` of a run.

    Args:
        folder: of the run.
        steps_done: what a former run wrote of later steps is dropped, since a resumed run does them again.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / BOARD_FOLDER), purge_step=steps_done + 1 if steps_done else None)

    def __call__(self, report: StepReport) -> None:
        for name in BOARD_SCALARS:
            self._writer.add_scalar(f"train/{name}", getattr(report, name), report.step)
        for name, value in report.columns.items():
            self._writer.add_scalar(f"method/{name}", value, report.step)
        if report.largest_gain is not None:
            self._writer.add_scalar("train/largest_gain", report.largest_gain, report.step)
        if report.validation is not None:
            self._writer.add_scalar("validation/bits_per_dim", report.validation, report.step)
            self._writer.flush()

    def image(self, grid: Tensor, step: int) -> None:
        """A picture (H, W, 3) in uint8."""
        self._writer.add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
