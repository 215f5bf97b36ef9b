"""What cannot work is refused in a line before anything is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from inverse_flow.command.commands import cli

TINY = ["--levels", 1, "--depth", 1, "--hidden", 2, "--steps", 2, "--validation", 2, "--batch-size", 4]


def call(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def refused(*arguments: str | Path | int) -> str:
    result = call(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twenty cats and twenty dogs, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(40):
        path = folder / ("cats", "dogs")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    for name in ("bad.png", "worse.jpg"):
        (folder / "cats" / name).write_bytes(b"nonsense")
    return folder


@pytest.mark.parametrize("seed", [2**63, 2**64, -1])
@pytest.mark.parametrize("command", ["train", "sample"])
def test_seeds_that_a_generator_does_not_take(tmp_path: Path, command: str, seed: int) -> None:
    arguments = ["train", "--out", tmp_path / "run"] if command == "train" else ["sample", tmp_path]
    assert "seed" in refused(*arguments, "--seed", seed)


@pytest.mark.parametrize("device", ["meta", "tpu9", "cuda:99", "hpu", ""])
def test_devices_on_which_nothing_is_computed(tmp_path: Path, device: str) -> None:
    assert f"PyTorch cannot compute on '{device}' here" in refused("train", "--out", tmp_path, "--device", device)


def test_an_empty_source(tmp_path: Path) -> None:
    assert "the data source is empty" in refused("train", "--out", tmp_path / "run", "--data", "", *TINY)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told = refused("train", "--out", tmp_path / "file" / "run", *TINY)
    assert "file" in told
    assert "Not a directory" in told or "is a file" in told


def test_bad_images_are_named_or_left_out(images: Path, tmp_path: Path) -> None:
    told = refused("train", "--out", tmp_path / "run", "--data", images, *TINY)
    assert "2 of the images" in told
    assert "bad.png" in told
    assert "worse.jpg" in told
    assert "--skip-bad-images" in told
    result = call("train", "--out", tmp_path / "run", "--data", images, *TINY, "--skip-bad-images", "--conditional")
    assert result.exit_code == 0, result.output
    assert "worse.jpg" in result.output
    assert "conditional on 2 classes (cats, dogs)" in result.output
    again = call("train", "--out", tmp_path / "run", "--resume", "--steps", 3)
    assert again.exit_code == 0, again.output
    # Other images than a folder's are read as they are, whatever the run's folder asked for.
    np.savez(tmp_path / "other.npz", x=np.zeros((16, 8, 8), np.uint8), y=np.arange(16) % 2)
    measured = call("evaluate", tmp_path / "run", "--data", tmp_path / "other.npz")
    assert measured.exit_code == 0, measured.output
    for label in ("Dogs", "1"):
        drawn = call("sample", tmp_path / "run", "--label", label, "--count", 8, "--out", tmp_path / "some.npz")
        assert drawn.exit_code == 0, drawn.output
        with np.load(tmp_path / "some.npz") as file:
            arrays = dict(file)
        assert arrays["y"].tolist() == [1] * 8
        assert arrays["class_names"].tolist() == ["cats", "dogs"]
    told = refused("sample", tmp_path / "run", "--label", "eels", "--out", tmp_path / "some.npz")
    assert "the model knows the classes cats (0), dogs (1); got eels" in told


@pytest.mark.parametrize("name", ["nowhere/some.png", "some.xyz", "some", "file/some.npz"])
def test_files_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    """The checkpoint is never looked for: there is none."""
    (tmp_path / "file").write_text("in the way")
    told = refused("sample", tmp_path, "--out", tmp_path / name)
    assert "must be an npz file or a picture" in told or "is not a folder" in told


def test_data_that_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on with its data wherever they lie, from every directory, and with no others."""
    rng = np.random.default_rng(0)
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    np.savez(tmp_path / "here" / "d.npz", x=rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
    np.savez(tmp_path / "there" / "d.npz", x=rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
    monkeypatch.chdir(tmp_path / "here")
    assert call("train", "--data", "d.npz", "--out", "../run", *TINY).exit_code == 0
    monkeypatch.chdir(tmp_path / "there")
    again = call("train", "--out", "../run", "--resume", "--steps", 3)
    assert again.exit_code == 0, again.output
    assert "not the images that the run began with" in refused(
        "train", "--out", "../run", "--resume", "--steps", 4, "--data", "d.npz"
    )
    (tmp_path / "here" / "d.npz").rename(tmp_path / "moved.npz")
    for command in (["train", "--out", "../run", "--resume", "--steps", 4], ["evaluate", "../run"]):
        assert "are not in" in (told := refused(*command))
        assert "say with --data where they are now" in told
    moved = call("train", "--out", "../run", "--resume", "--steps", 4, "--data", "../moved.npz")
    assert moved.exit_code == 0, moved.output
    assert call("evaluate", "../run", "--importance-samples", 0).exit_code == 0


def test_options_of_parts_without_parts(tmp_path: Path) -> None:
    told = refused("train", "--out", tmp_path / "run", "--schedule", "sequential", "--part-rate", 0.1, *TINY)
    assert "only --parts have --schedule, --part-rate" in told
    told = refused("train", "--out", tmp_path / "run", "--part-per-process", *TINY)
    assert "--part-per-process trains the parts of --parts" in told


def test_more_threads_than_can_be_started(tmp_path: Path) -> None:
    assert "--threads" in refused("train", "--out", tmp_path / "run", "--threads", 1 << 40, *TINY)


def test_patience_without_validation_images(images: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", x=np.zeros((10, 8, 8, 1), np.uint8))
    some = [*TINY[:6], "--data", tmp_path / "few.npz", "--patience", 1, "--steps", 1]
    assert "patience needs images for validation" in refused("train", "--out", tmp_path / "run", *some)


def test_images_larger_than_memory(images: Path, tmp_path: Path) -> None:
    told = refused("train", "--out", tmp_path / "run", "--data", images, "--image-size", 10**7, *TINY)
    assert "42 images of 10000000 × 10000000 take at least 4200000 GB" in told
