"""Two processes are one: what torchrun starts sees the same losses and gradients as a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inverse_flow.training import TrainConfig, Trainer, Workers
from inverse_flow.training.log import read_log
from inverse_flow.training.workers import connect

from . import two_processes
from .toy import torchrun
from .two_processes import CONFIG, images, model

SCRIPT = Path(two_processes.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    done = torchrun(SCRIPT, path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes saw."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a single process sees."""
    return two_processes.observe(Workers(), tmp_path_factory.mktemp("one"))


def test_gradients_are_those_of_one_process_with_the_whole_batch(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    assert one["batch"] == 6
    for process in two:
        assert process["batch"] == 3
        first = zip(process["gradients"][0], one["gradients"][0], strict=True)
        for gradient, expected in first:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 1e-2 for gradient in one["gradients"][0])


def test_losses_are_those_of_one_process(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    expected = one["losses"]["uncut"]
    assert len(expected) == CONFIG.steps
    for process in two:
        for (loss, validation), (whole, checked) in zip(process["losses"]["uncut"], expected, strict=True):
            assert loss == pytest.approx(whole, rel=1e-4)
            assert validation == (None if checked is None else pytest.approx(checked, rel=1e-4))


def test_all_processes_keep_the_same_weights(two: list[dict[str, Any]]) -> None:
    first, second = (process["weights"] for process in two)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_actnorm_is_initialized_by_the_whole_batch(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """The statistics of half of the batch would be others, and five small steps do not bring them together."""
    names = [name for name in one["weights"] if name.endswith(("bias", "log_scale"))]
    assert names
    for process in two:
        for name in names:
            torch.testing.assert_close(process["weights"][name], one["weights"][name], rtol=1e-3, atol=1e-3)


def test_a_resumed_run_of_two_processes_is_the_uncut_one(two: list[dict[str, Any]]) -> None:
    """The last step of the first part is validated there, so that only the losses are compared."""
    for process in two:
        cut, uncut = ([loss for loss, _ in process["losses"][name]] for name in ("cut", "uncut"))
        assert cut == uncut


def test_only_the_first_process_writes(folder: Path) -> None:
    assert len(read_log(folder / "uncut" / "log.csv")) == CONFIG.steps
    assert (folder / "own0" / "checkpoint.pt").is_file()
    assert not (folder / "own1").exists()


def test_the_processes_talk(two: list[dict[str, Any]]) -> None:
    assert [process["largest"] for process in two] == [[1, 0], [1, 0]]
    assert [process["average"] for process in two] == [0.5, 0.5]


def test_one_process_keeps_what_it_has() -> None:
    alone, module = Workers(), nn.Linear(1, 1)
    assert alone.parallel(module) is module
    assert torch.equal(alone.share(images()), images())
    with connect("cpu") as (workers, device):
        assert (workers, device) == (alone, "cpu")


def test_shares_are_equal_and_make_up_the_batch() -> None:
    batch = torch.arange(6)
    assert torch.equal(torch.cat([Workers(rank, 3).share(batch) for rank in range(3)]), batch)
    with pytest.raises(ValueError, match="a batch of 6 cannot be shared evenly by 4 processes"):
        Workers(0, 4).share(batch)
    with pytest.raises(ValueError, match="a batch of 6 cannot be shared evenly by 4 processes"):
        Trainer(model(), images(), TrainConfig(batch_size=6), workers=Workers(0, 4))
