from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inverse_flow.training.log import BOARD_FOLDER, StepReport, TensorBoardLog


def report(step: int, loss: float, validation: float | None = None) -> StepReport:
    return StepReport(step, 0, 1.0, loss, 4.0, 0.5, 1e-3, 100.0, validation, {"part": float(step % 2)})


def write(folder: Path, steps_done: int, *reports: StepReport) -> None:
    log = TensorBoardLog(folder, steps_done)
    for each in reports:
        log(each)
    log.image(torch.zeros(4, 6, 3, dtype=torch.uint8), reports[-1].step)
    log.close()


def read(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / BOARD_FOLDER)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_report_is_a_point_of_each_curve(tmp_path: Path) -> None:
    write(tmp_path, 0, report(1, 9.0), replace(report(2, 8.0, validation=4.5), largest_gain=3.5))
    assert read(tmp_path, "train/loss") == [(1, 9.0), (2, 8.0)]
    assert read(tmp_path, "train/learning_rate") == [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))]
    assert read(tmp_path, "method/part") == [(1, 1.0), (2, 0.0)]
    assert read(tmp_path, "train/largest_gain") == [(2, 3.5)]
    assert read(tmp_path, "validation/bits_per_dim") == [(2, 4.5)]
    (image,) = EventAccumulator(str(tmp_path / BOARD_FOLDER)).Reload().Images("samples")
    assert (image.step, image.height, image.width) == (2, 4, 6)


def test_a_resumed_run_replaces_what_it_does_again(tmp_path: Path) -> None:
    write(tmp_path, 0, *(report(step, float(step)) for step in (1, 2, 3, 4)))
    write(tmp_path, 2, report(3, 30.0))
    assert read(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
