import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inverse_flow.data import ImageSet
from inverse_flow.flows.logit import DEFAULT_MARGIN
from inverse_flow.training import Stop, TrainConfig, checkpoint
from inverse_flow.training import run as runs

MODEL = {"levels": 2, "steps": 2, "hidden": 8, "logit_margin": DEFAULT_MARGIN}
CONFIG = TrainConfig(steps=40, learning_rate=1e-2, warmup_steps=10, flip=True, validation=100, evaluate_every=20)


def test_a_short_run_on_real_images_beats_independent_pixels(tmp_path: Path) -> None:
    run = runs.start("embedded", tmp_path, CONFIG, MODEL)
    assert run.trainer.fit() is Stop.STEPS
    said: list[tuple[object, ...]] = []
    summary = runs.finish(run, lambda *given: said.append(given))
    assert said
    assert summary.test_bits_per_dim < summary.baseline_test_bits_per_dim - 0.1
    written = json.loads((tmp_path / runs.SUMMARY_FILE).read_text())
    assert written["test_bits_per_dim"] == summary.test_bits_per_dim
    assert written["stopped_because"] == Stop.STEPS.value
    assert written["training"] == CONFIG.to_dict()
    assert (tmp_path / runs.SAMPLES_FILE).is_file()
    assert (tmp_path / runs.CURVE_FILE).is_file()


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    def first_weight(seed: int) -> torch.Tensor:
        config = TrainConfig(seed=seed)
        return next(runs.start("embedded", tmp_path, config, MODEL).trainer.model.parameters())

    torch.manual_seed(5)
    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_resume_finds_the_data_again(tmp_path: Path) -> None:
    runs.start("embedded", tmp_path, CONFIG, MODEL).trainer.save()
    run = runs.resume(checkpoint.load(tmp_path), tmp_path, steps=1)
    assert run.data.name == "fashion-mnist-slice"
    assert run.trainer.config.steps == 1
    assert run.trainer.fit() is Stop.STEPS


def npz(folder: Path, value: int = 0) -> Path:
    pixels = np.random.default_rng(value).integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    np.savez(folder / "small.npz", x=pixels)
    return folder / "small.npz"


SMALL = TrainConfig(steps=2, batch_size=5, validation=4)
TINY = {"levels": 1, "steps": 1, "hidden": 2}


def test_the_data_are_found_again_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path)
    monkeypatch.chdir(tmp_path)
    runs.start("small.npz", Path("run"), SMALL, TINY).trainer.fit()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    npz(tmp_path / "elsewhere", value=9)  # a namesake
    content = checkpoint.load("../run")
    assert content.data.source == str(tmp_path / "small.npz")
    assert runs.resume(content, Path("../run"), steps=3).trainer.fit() is Stop.STEPS
    assert torch.equal(runs.data_of(content).train.images, runs.data_of(content, "../small.npz").train.images)
    with pytest.raises(ValueError, match="not the images that the run began with"):
        runs.resume(content, Path("../run"), source="small.npz")


def test_data_that_moved_are_taken_from_where_they_are_now(tmp_path: Path) -> None:
    runs.start(str(npz(tmp_path)), tmp_path / "run", SMALL, TINY).trainer.fit()
    moved = tmp_path / "moved.npz"
    (tmp_path / "small.npz").rename(moved)
    with pytest.raises(FileNotFoundError):
        runs.resume(checkpoint.load(tmp_path / "run"), tmp_path / "run")
    runs.resume(checkpoint.load(tmp_path / "run"), tmp_path / "run", source=str(moved), steps=3).trainer.fit()
    assert checkpoint.load(tmp_path / "run").data.source == str(moved)


def test_data_that_changed_are_not_measured_as_those_of_the_run(tmp_path: Path) -> None:
    runs.start(str(npz(tmp_path)), tmp_path / "run", SMALL, TINY).trainer.fit()
    npz(tmp_path, value=9)
    content = checkpoint.load(tmp_path / "run")
    with pytest.raises(ValueError, match="not the images that the run began with"):
        runs.data_of(content)
    runs.data_of(content, str(tmp_path / "small.npz"))  # whoever names them may measure any images


@pytest.mark.parametrize("broken", ["shape", "labels", "none"])
def test_test_images_that_cannot_be_measured_are_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def images(count: int, size: int, labels: int) -> ImageSet:
        pixels = torch.zeros(count, 1, size, size, dtype=torch.uint8)
        return ImageSet(pixels, torch.arange(count) % labels, torch.arange(count))

    size, labels, count = (8, 2, 4) if broken == "shape" else (4, 3, 4) if broken == "labels" else (4, 2, 0)
    data = SimpleNamespace(
        name="some", train=images(20, 4, 2), test=images(count, size, labels), classes=2, validation=None
    )
    monkeypatch.setattr(checkpoint, "load_data", lambda source, **options: data)
    messages = {"shape": "test images of some have", "labels": "labels 0 … 1", "none": "some has no test images"}
    with pytest.raises(ValueError, match=messages[broken]):
        runs.start("some", tmp_path / "run", SMALL, TINY, conditional=True)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_disk_that_is_too_full_is_noticed_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, used, _ = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=total, used=used, free=1000))
    with pytest.raises(OSError, match="MB are needed for two checkpoints") as caught:
        runs.start(str(npz(tmp_path)), tmp_path / "run", SMALL, TINY)
    assert caught.value.errno == errno.ENOSPC


def test_a_checkpoint_of_images_without_a_source_says_so(tmp_path: Path) -> None:
    run = runs.start(str(npz(tmp_path)), tmp_path / "run", SMALL, TINY)
    content = replace(run.trainer.state(), data=None)
    with pytest.raises(ValueError, match="does not say where its images come from"):
        runs.resume(content, tmp_path / "run")
