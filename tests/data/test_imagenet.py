from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inverse_flow.data import load, load_imagenet
from inverse_flow.data.imagenet import TEST_FILE, TRAIN_FILES

SIDE = 4


def write_batches(folder: Path, side: int = SIDE) -> np.ndarray:
    """A tiny set of the official layout, two images per file; returns the pixels of all."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (22, 3, side, side), dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    for i, name in enumerate((*TRAIN_FILES, TEST_FILE)):
        rows = pixels[2 * i : 2 * i + 2].reshape(2, -1)
        labels = np.array([1000 - i, i + 1])
        mean = {} if name == TEST_FILE else {"mean": pixels.reshape(22, -1).mean(0)}
        np.savez(folder / name, data=rows, labels=labels, **mean)
    return pixels


@pytest.mark.parametrize("side", [4, 8])
def test_images_and_labels_in_the_order_of_the_batches(tmp_path: Path, side: int) -> None:
    pixels = torch.from_numpy(write_batches(tmp_path, side))
    data = load(tmp_path)
    assert data.name == f"imagenet{side}"
    assert torch.equal(data.train.images, pixels[:20])
    assert torch.equal(data.test.images, pixels[20:])
    assert data.train.labels.tolist()[:4] == [999, 0, 998, 1]
    assert data.test.labels.tolist() == [989, 10]
    assert data.train.indices.tolist() == list(range(20))
    assert data.classes == 1000


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    write_batches(tmp_path)
    for number in (3, 7):
        (tmp_path / f"train_data_batch_{number}.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no train_data_batch_3\.npz, train_data_batch_7\.npz"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0, 1]}, r'"labels" \(N,\) from 1 to 1000, got 0 to 1'),
        ({"labels": [1, 1001]}, "got 1 to 1001"),
        ({"labels": [1.0, 2.0]}, r"got \(2,\) in float64"),
        ({"labels": np.empty(0, np.int64)}, r"got \(0,\) in int64"),
        ({"labels": [1]}, r"a row for each of 1 labels, got \(2, 48\) in uint8"),
        ({"data": np.zeros((2, 47), np.uint8)}, r"\(N, 3·S·S\) in uint8, .* got \(2, 47\)"),
        ({"data": np.zeros((2, 48))}, r"got \(2, 48\) in float64"),
        ({"data": np.zeros((2, 3 * 64), np.uint8)}, r"has images \(3, 8, 8\), .* has \(3, 4, 4\)"),
        ({"data": np.array([{}, {}])}, "damaged or no npz file: Object arrays"),
        ({"data": None}, 'must have a key "data", it has labels'),
    ],
)
def test_a_wrong_batch_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    write_batches(tmp_path)
    path = tmp_path / TRAIN_FILES[4]
    with np.load(path) as old:
        held = {"data": old["data"], "labels": old["labels"]} | arrays
    np.savez(path, **{name: value for name, value in held.items() if value is not None})
    with pytest.raises(ValueError, match=message) as caught:
        load_imagenet(tmp_path)
    assert str(path) in str(caught.value)


def test_a_damaged_batch_is_named(tmp_path: Path) -> None:
    write_batches(tmp_path)
    (tmp_path / TEST_FILE).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"val_data\.npz is damaged or no npz file"):
        load(tmp_path)


def test_it_is_not_resized(tmp_path: Path) -> None:
    write_batches(tmp_path)
    with pytest.raises(ValueError, match="only a folder of images is resized"):
        load(tmp_path, size=8)
