"""Names are printed as they are, whatever they look like; and figures whatever the width."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from inverse_flow.command.commands import cli
from inverse_flow.command.console import console
from inverse_flow.training.run import Run

TINY = ["--levels", 1, "--depth", 1, "--hidden", 2, "--steps", 2]
NAME = "[bold]a b[red] :smile:"


def call(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images, of which one is held out."""
    path = tmp_path / f"{NAME}.npz"
    values = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(10) % 2
    np.savez(path, x=values, y=labels, class_names=np.array([NAME, "[/]"]))
    return path


def test_brackets_are_no_markup(images: Path, tmp_path: Path) -> None:
    """And the standard error of a single test image, which there is not, is no number in a table or in JSON."""
    folder = tmp_path / "runs" / NAME
    trained = call("train", "--data", images, "--conditional", "--out", folder, *TINY)
    assert trained.exit_code == 0, trained.output
    assert f"{NAME} (slice of 10, the last 1 held out)" in trained.output
    assert f"({NAME}, [/])" in trained.output
    assert f"in {folder}: samples.png" in trained.output
    assert "nan" not in trained.output
    measured = call("evaluate", folder, "--importance-samples", 0)
    assert measured.exit_code == 0, measured.output
    assert NAME in " ".join(measured.output.split())
    printed = call("evaluate", folder, "--importance-samples", 0, "--json")
    for text in (printed.stdout, (folder / "summary.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail)["test_standard_error"] is None


def test_the_command_that_goes_on_can_be_pasted(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / NAME
    monkeypatch.setattr("inverse_flow.command.commands.describe", interrupt)
    result = call("train", "--data", images, "--out", folder, *TINY)
    assert result.exit_code == 130, result.output
    command = shlex.split(result.output.splitlines()[-1])
    assert command == ["inverse-flow", "train", "--out", str(folder), "--resume"]


def interrupt(run: Run) -> None:
    """Ctrl-C as soon as the first step begins."""
    batch = run.trainer._batch

    def interrupted(**options: bool) -> object:
        signal.raise_signal(signal.SIGINT)
        return batch(**options)

    run.trainer._batch = interrupted  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("width", [40, 80])
def test_figures_fit_a_narrow_terminal(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(console, "width", width)
    result = call("train", "--data", images, "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 0, result.output
    table = result.output[result.output.index("┌") : result.output.index("└")]
    words = table.replace("│", " ").split()
    assert words.count("train") == words.count("test") == 2
    for unit in ("ms", "MiB"):
        assert unit in words
    assert all(len(line) <= width for line in table.splitlines())
