"""Two processes, a part in each, make the updates of one process; and nothing is sent backward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from inverse_flow.parts import ByParts, PartsConfig, fit_parts, run_frozen
from inverse_flow.training import Checkpoint, StepReport, TrainConfig, Trainer, checkpoint

from ..training.toy import torchrun
from . import two_parts
from .two_parts import BY_PARTS, CONFIG, images, trainer

SCRIPT = Path(two_parts.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts")
    done = torchrun(SCRIPT, path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes saw."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Checkpoint, list[StepReport]]:
    """One process with the same schedule: its trainer, its checkpoint before the finish, its reports."""
    path = tmp_path_factory.mktemp("one")
    uncut, reports = trainer(path), []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        if report.step == BY_PARTS:
            checkpoint.save(path / "parts.pt", uncut.state())

    uncut.fit(on_step)
    return uncut, checkpoint.load(path / "parts.pt"), reports


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Within the rounding of a few steps in float32, over nested content."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}.{key}")
    else:
        assert found == expected, where


def test_the_updates_are_those_of_one_process(folder: Path, one: tuple[Trainer, Checkpoint, list[StepReport]]) -> None:
    """Weights, averages, the optimizer's state and steps of both parts, before the finish."""
    found, expected = checkpoint.load(folder / "parts.pt"), one[1]
    assert found.progress.step == expected.progress.step == BY_PARTS
    assert_close(found.model.weights, expected.model.weights, "weights")
    assert_close(found.model.averaged, expected.model.averaged, "averaged")
    method, alone = found.progress.method, expected.progress.method
    assert_close(method["optimizer"]["state"], alone["optimizer"]["state"], "optimizer")
    assert method["steps"] == alone["steps"] == [BY_PARTS, BY_PARTS]


def test_the_last_part_reports_the_density_of_the_whole_flow(
    two: list[dict[str, Any]], one: tuple[Trainer, Checkpoint, list[StepReport]]
) -> None:
    expected = [(report.step, report.bits_per_dim) for report in one[2][:BY_PARTS]]
    assert [step for step, _ in two[1]["bits"]] == [step for step, _ in expected]
    assert [bits for _, bits in two[1]["bits"]] == pytest.approx([bits for _, bits in expected], rel=1e-5)


def test_the_first_process_finishes_as_one_would(
    two: list[dict[str, Any]], one: tuple[Trainer, Checkpoint, list[StepReport]]
) -> None:
    assert_close(two[0]["model"], one[0].model.state_dict(), "model")


def test_nothing_is_sent_but_activations_to_the_next_process(two: list[dict[str, Any]]) -> None:
    """One message a batch: D values and a log-determinant for each image."""
    message = ("isend", 1, CONFIG.batch_size * (64 + 1))
    tensors = [[sent for sent in process["messages"] if sent[0] in ("isend", "send")] for process in two]
    assert tensors == [[message] * BY_PARTS, []]
    # The meetings, three of them, gather weights; no gradient is ever reduced.
    assert {name for process in two for name, _, _ in process["messages"]} <= {"isend", "all_gather"}


def test_the_comparison_can_fail(one: tuple[Trainer, Checkpoint, list[StepReport]]) -> None:
    """Another schedule, in which the second part sees the first one's weights after their step, is told apart."""
    other = trainer(None)
    method = other.method
    assert isinstance(method, ByParts)
    for step in range(BY_PARTS):
        batch = other.batches(step)
        other.model.train()
        for k in range(2):
            carried = run_frozen(method.parts[:k], batch)
            method.train_part(k, carried, step=step, rate_factor=CONFIG.rate_factor(step, step / CONFIG.steps))
    with pytest.raises(AssertionError):
        assert_close(other.model.state_dict(), one[1].model.weights, "model")


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="need a process each: start them with torchrun"):
        fit_parts(trainer(None))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)

    def attempt(config: TrainConfig) -> None:
        fit_parts(Trainer(trainer(None).model, images(), config))

    with pytest.raises(ValueError, match="2 parts need as many processes, got 3"):
        attempt(CONFIG)
    with pytest.raises(ValueError, match='need the schedule "simultaneous", got "alternate"'):
        attempt(replace(CONFIG, parts=PartsConfig("blocks", 2, "alternate")))
    with pytest.raises(TypeError, match="need the method ByParts, got EndToEnd"):
        attempt(replace(CONFIG, parts=None))
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="limited by steps, not by time"):
        attempt(replace(CONFIG, minutes=1.0))
