"""``inverse-flow train --parts``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from inverse_flow.command.commands import cli
from inverse_flow.parts.config import PartsConfig
from inverse_flow.training import checkpoint
from inverse_flow.training.log import read_log

TINY = ["--levels", "2", "--depth", "1", "--hidden", "2", "--batch-size", "20", "--evaluate-every", "2"]


def call(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_run_by_parts_and_its_resume(tmp_path: Path) -> None:
    by_parts = ["--parts", "blocks:2", "--schedule", "alternate", "--part-rate", "1e-2", "--part-rate", "2e-2"]
    result = call("train", "--out", tmp_path, "--steps", 6, *TINY, *by_parts)
    assert result.exit_code == 0, result.output
    assert [report.columns["part"] for report in read_log(tmp_path / "log.csv")] == [1, 2, 1, 2, 0, 0]
    assert checkpoint.load(tmp_path).training.parts == PartsConfig("blocks", 2, learning_rates=(1e-2, 2e-2))

    again = call("train", "--out", tmp_path, "--resume", "--steps", 7, *TINY, *by_parts)
    assert again.exit_code == 0, again.output
    assert "resumed at step 6" in again.output
    refused = call("train", "--out", tmp_path, "--resume", "--parts", "across:2")
    assert refused.exit_code == 2
    assert "--parts is blocks:2" in " ".join(refused.output.split())


def test_samples_before_the_turn_of_a_later_part(tmp_path: Path) -> None:
    """Its layers are not initialised yet, as is to be expected; warnings are errors here."""
    for arguments in (["--fresh"], ["--resume", "--steps", 4]):
        result = call(
            "train", "--out", tmp_path, "--steps", 3, *TINY, "--parts", "blocks:2", "--schedule", "sequential",
            "--finish", 0, "--sample-every", 1, *arguments,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "Warning" not in result.output


def test_parts_that_cannot_be_are_told_in_a_line(tmp_path: Path) -> None:
    for value, message in (("across", '"blocks:n" or "across:n"'), ("blocks:3", "by blocks into 1 to 2 parts, got 3")):
        result = call("train", "--out", tmp_path, "--parts", value, *TINY)
        assert result.exit_code != 0
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
    alone = call("train", "--out", tmp_path, "--parts", "blocks:2", "--schedule", "simultaneous", *TINY,
                 "--part-per-process")  # fmt: skip
    assert alone.exit_code == 1
    assert "start them with torchrun" in " ".join(alone.output.split())
    timed = call("train", "--out", tmp_path, "--parts", "blocks:2", "--part-per-process", "--minutes", 1)
    assert timed.exit_code == 2
    assert "limited by --steps, not by --minutes" in " ".join(timed.output.split())


@pytest.mark.thorough
def test_a_part_in_each_process(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "inverse_flow",
        "train", "--out", str(tmp_path), "--parts", "blocks:2", "--schedule", "simultaneous", "--part-per-process",
        "--steps", "6", *TINY,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after 6 steps") == 1
    content = checkpoint.load(tmp_path)
    assert content.progress.step == 6
    assert content.progress.method["steps"] == [4, 4]
    assert [report.step for report in read_log(tmp_path / "log.csv")] == [5, 6]  # the finish
