"""ImageNet at 32×32 or 64×64, from its npz batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inverse_flow.data.files import shortened
from inverse_flow.data.images import ImageData, ImageSet
from inverse_flow.data.npz import read_npz

TRAIN_FILES = tuple(f"train_data_batch_{number}.npz" for number in range(1, 11))
TEST_FILE = "val_data.npz"
DATA_KEY, LABELS_KEY = "data", "labels"
CHANNELS = 3
CLASSES = 1000


def has_imagenet_files(folder: Path) -> bool:
    """Whether a folder has one of the batches."""
    return any((folder / name).is_file() for name in (*TRAIN_FILES, TEST_FILE))


def load_imagenet(folder: str | Path) -> ImageData:
    """Downsampled ImageNet from the folder of its npz batches, ``train_data_batch_1.npz`` to 10 and ``val_data.npz``.

    Each has ``data``, (N, 3·S·S) in uint8, the red values of an image before the green and the blue ones, and
    ``labels`` from 1 to 1000, which become 0 to 999. The validation images of the challenge, which stand in for its
    unpublished test, are the test set. S is 32 or 64, or any other size. The images are held in memory: 3.9 GB at 32,
    15.7 GB at 64. Chrabaszcz, Loshchilov & Hutter, "A downsampled variant of ImageNet as an alternative to the CIFAR
    datasets", 2017.

    Raises:
        FileNotFoundError: a batch is missing.
        ValueError: a file is damaged, or is not what is described above.
    """
    folder = Path(folder)
    missing = [name for name in (*TRAIN_FILES, TEST_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} needs {TRAIN_FILES[0]} to {len(TRAIN_FILES)} and {TEST_FILE}, and has no "
                                f"{shortened(missing)}")  # fmt: skip
    test = _load([folder / TEST_FILE])
    train = _load([folder / name for name in TRAIN_FILES])
    return ImageData(f"imagenet{test.image_shape[-1]}", train, test)


def _load(paths: list[Path]) -> ImageSet:
    # The labels first, which are small: they say how much room the images take, so that none is held twice.
    labels = [_labels(path) for path in paths]
    counts = [len(of_file) for of_file in labels]
    images, start = torch.empty(0), 0
    for path, count in zip(paths, counts, strict=True):
        pixels = _pixels(path, count)
        if not start:
            images = torch.empty(sum(counts), *pixels.shape[1:], dtype=torch.uint8)
        if pixels.shape[1:] != images.shape[1:]:
            raise ValueError(f"{path} has images {pixels.shape[1:]}, {paths[0]} has {tuple(images.shape[1:])}")
        images[start : start + count] = torch.from_numpy(pixels)
        start += count
    return ImageSet(images, torch.from_numpy(np.concatenate(labels)), torch.arange(len(images)))


def _labels(path: Path) -> NDArray[np.int64]:
    labels = _array(path, LABELS_KEY)
    whole = np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1 and len(labels) > 0
    if not whole or labels.min() < 1 or labels.max() > CLASSES:
        held = f"{labels.min()} to {labels.max()}" if whole else f"{labels.shape} in {labels.dtype}"
        raise ValueError(f'{path} must hold "{LABELS_KEY}" (N,) from 1 to {CLASSES}, got {held}')
    return labels.astype(np.int64) - 1


def _pixels(path: Path, count: int) -> NDArray[np.uint8]:
    rows = _array(path, DATA_KEY)
    side = math.isqrt(rows.shape[1] // CHANNELS) if rows.ndim == 2 else 0
    if rows.dtype != np.uint8 or rows.shape != (count, CHANNELS * side * side):
        raise ValueError(
            f'{path} must hold "{DATA_KEY}" (N, 3·S·S) in uint8, a row for each of {count} labels, got {rows.shape} in '
            f"{rows.dtype}"
        )
    return rows.reshape(count, CHANNELS, side, side)


def _array(path: Path, key: str) -> NDArray[Any]:
    arrays = read_npz(path, (key,))
    if key not in arrays:
        raise ValueError(f'{path} must have a key "{key}", it has {", ".join(arrays) or "none"}')
    return arrays[key]
