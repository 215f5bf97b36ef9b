from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inverse_flow.data import load, load_image_folder


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def grey(value: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.full((height, width), value, np.uint8)


def test_one_image_in_ten_is_held_out(tmp_path: Path) -> None:
    for value in range(20):
        write(tmp_path / "pictures" / f"{value:02}.png", grey(value))
    data = load(tmp_path / "pictures")
    assert data.name == "pictures (2 of 20 held out at random, seed 0)"
    train, test = (part.images[:, 0, 0, 0].tolist() for part in (data.train, data.test))
    assert sorted(train + test) == list(range(20))
    assert len(test) == 2
    assert data.train.image_shape == (1, 4, 6)
    assert data.train.labels.unique().tolist() == [-1]
    assert data.classes == 0


def test_folders_are_sets_and_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    for part, kind in [("train", "cat"), ("train", "ant"), ("test", "cat")]:
        write(tmp_path / part / kind / "one.png", pixels)
    write(tmp_path / "train" / "ant" / "two.png", grey(7, 4, 5))
    data = load(tmp_path)
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.test.labels.tolist() == [1]
    assert data.classes == 2
    assert data.class_names == ("ant", "cat")
    assert torch.equal(data.test.images[0], torch.from_numpy(pixels).permute(2, 0, 1))
    # A grey image among coloured ones becomes one of them.
    assert data.train.images[1].flatten().unique().tolist() == [7]
    assert data.train.image_shape == (3, 4, 5)


def test_resizing_averages_and_cropping_keeps_the_middle(tmp_path: Path) -> None:
    halves = np.concatenate((grey(0, 4, 4), grey(100, 4, 4)), axis=1)
    for part in ("train", "test"):
        write(tmp_path / part / "one.png", halves)
    resized = load(tmp_path, size=2).train.images[0, 0]
    assert resized.tolist() == [[0, 100], [0, 100]]
    assert load(tmp_path, size=1).train.images.item() == 50
    marked = np.concatenate((grey(255, 4, 2), halves[:, 2:6], grey(255, 4, 2)), axis=1)
    write(tmp_path / "train" / "one.png", marked)
    assert load(tmp_path, size=2, crop=True).train.images[0, 0].tolist() == [[0, 100], [0, 100]]


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no images"):
        load_image_folder(tmp_path)
    for value in range(10):
        write(tmp_path / f"{value}.png", grey(value, 4, 6 + value // 9))
    with pytest.raises(
        ValueError, match=r"9 of 4 × 6 \(.*\), 1 of 4 × 7 \(.*9.png\), 2 sizes in all; size \(train --image-size\)"
    ):
        load(tmp_path)
    write(tmp_path / "3.png", grey(3, 5, 6))
    with pytest.raises(ValueError, match=r"8 of 4 × 6 \(.*0.png\), 1 of 5 × 6 \(.*3.png\), .*3 sizes in all"):
        load(tmp_path)
    assert load(tmp_path, size=4).train.image_shape == (1, 4, 4)
    (tmp_path / "3.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"1 of the images .*\n.*3.png: it is damaged, or no .png file"):
        load(tmp_path, size=4)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        load(tmp_path, size=0)
    with pytest.raises(ValueError, match=r"crop .* needs a size"):
        load(tmp_path, crop=True)
    with pytest.raises(ValueError, match="is resized, cropped or read in part, embedded is none"):
        load("embedded", size=14)
