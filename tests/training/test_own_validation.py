"""Which images are validated on: those that the data bring along, or else of each class alike; in a resumed run too."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inverse_flow.training import TrainConfig
from inverse_flow.training import run as runs
from inverse_flow.training.checkpoint import save

MODEL = {"levels": 1, "steps": 1, "hidden": 2}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Twenty training, four validation and four test images; those for validation are the bright ones."""
    for name, count, value in (("train", 20, 0), ("val", 4, 200), ("test", 4, 100)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((4, 4), value + number, np.uint8)).save(tmp_path / "data" / name / f"{number}.png")
    return str(tmp_path / "data")


def test_they_are_used_unless_a_number_is_asked_for(source: str, tmp_path: Path) -> None:
    trainer = runs.start(source, tmp_path / "own", TrainConfig(), MODEL).trainer
    assert trainer.validation_images[:, 0, 0, 0].tolist() == [200, 201, 202, 203]
    assert len(trainer.batches.images) == 20
    drawn = runs.start(source, tmp_path / "drawn", TrainConfig(validation=3), MODEL).trainer
    assert len(drawn.validation_images) == 3
    assert int(drawn.validation_images.max()) < 20
    assert len(drawn.batches.images) == 17


def test_a_run_goes_on_with_them_and_with_no_others(source: str, tmp_path: Path) -> None:
    content = runs.start(source, tmp_path / "run", TrainConfig(), MODEL).trainer.state()
    save(tmp_path / "run" / "checkpoint.pt", content)
    assert len(runs.resume(content, tmp_path / "run").trainer.validation_images) == 4
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(Path(source) / "val" / "0.png")
    with pytest.raises(ValueError, match="not the images that the run began with"):
        runs.resume(content, tmp_path / "run")


def test_the_rest_are_drawn_of_each_class_alike(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), (40, 20, 12, 8))[np.random.default_rng(0).permutation(80)]
    np.savez(tmp_path / "data.npz", x=np.repeat(labels.astype(np.uint8), 16).reshape(80, 4, 4), y=labels)
    config = TrainConfig(validation=14)  # of the 70 that are not held out to test on
    found = []
    for seed in (0, 1):
        trainer = runs.start(
            str(tmp_path / "data.npz"), tmp_path / f"{seed}", replace(config, seed=seed), MODEL
        ).trainer
        of_class = np.bincount(labels[:70], minlength=4) / 5
        drawn = np.bincount(trainer.validation_images[:, 0, 0, 0], minlength=4)
        assert drawn.sum() == 14
        assert (np.abs(drawn - of_class) < 1).all()
        found.append(trainer.validation)
    assert not torch.equal(*found)
    # A resumed run keeps them, whatever a later version would draw.
    resumed = runs.resume(replace(trainer.state(), validation=found[0]), tmp_path / "1").trainer
    assert torch.equal(resumed.validation, found[0])
