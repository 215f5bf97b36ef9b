"""A slice of an image set in one npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inverse_flow.data.images import MOST_CLASSES, UNLABELLED, ImageData, ImageSet
from inverse_flow.data.npz import read_npz

IMAGES_KEY, LABELS_KEY, NAMES_KEY = "x", "y", "class_names"
# How many channels pictures have; images of so few pixels in height are none.
COLOURS = (1, 3)
# The last eighth of the images is held out.
HELD_OUT = 8


def load_slice(path: str | Path) -> ImageData:
    """Images from an npz file with the key ``x``: (N, H, W, C) or (N, H, W), uint8.

    It may have labels ``y``, (N,), whole numbers from 0 on, −1 for none, and then ``class_names``, texts. The last N/8
    images, rounded down, are the test set; the name of the data says so, since figures on a slice are not comparable to
    those on the complete set.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no npz file, or not what is described above; images in the order of their classes, of which the
            last eighth would show only some.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    arrays = read_npz(path, (IMAGES_KEY, LABELS_KEY, NAMES_KEY))
    if IMAGES_KEY not in arrays:
        raise ValueError(f'{path} must have a key "{IMAGES_KEY}", it has {", ".join(arrays) or "none"}')
    pixels = arrays[IMAGES_KEY]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(f"{path} must hold (N, H, W, C) in uint8, got {pixels.shape} in {pixels.dtype}")
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.shape[1] in COLOURS and pixels.shape[3] not in COLOURS:
        raise ValueError(f"{path} must hold (N, H, W, C): {pixels.shape} looks like (N, C, H, W)")
    count, test_count = len(pixels), len(pixels) // HELD_OUT
    if not test_count:
        raise ValueError(f"{path} has {count} images; at least {HELD_OUT} are needed, to hold the last eighth out")
    labels, names = _labels(path, arrays, count), _class_names(path, arrays)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    everything = ImageSet(images, torch.from_numpy(labels), torch.arange(count))
    name = f"{path.stem} (slice of {count}, the last {test_count} held out)"
    sets = everything[: count - test_count], everything[count - test_count :]
    return ImageData(name, *sets, class_names=names)


def _labels(path: Path, arrays: dict[str, NDArray[Any]], count: int) -> NDArray[np.int64]:
    labels = arrays.get(LABELS_KEY, np.full(count, UNLABELLED))
    if labels.shape != (count,):
        raise ValueError(f"{path} has {count} images but labels of shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        names = f', with the names in "{NAMES_KEY}"' if labels.dtype.kind == "U" else ""
        raise ValueError(f'{path} must hold labels "{LABELS_KEY}" that are whole numbers{names}, got {labels.dtype}')
    least, most = labels.min(), labels.max()
    if not UNLABELLED <= least <= most < MOST_CLASSES:
        raise ValueError(f"{path} must hold labels from 0 to {MOST_CLASSES - 1} (−1 for none), got {least} to {most}")
    steps = np.diff(labels.astype(np.int64))
    if least < most and bool((steps >= 0).all()) and not steps.all():
        raise ValueError(
            f"{path} holds its images in the order of their classes: shuffle them, or the last eighth, which is the "
            f"test set, would show only some"
        )
    return labels.astype(np.int64)


def _class_names(path: Path, arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    names = arrays.get(NAMES_KEY, np.empty(0, np.str_))
    if names.dtype.kind != "U" or names.ndim != 1:
        raise ValueError(f'{path} must hold "{NAMES_KEY}" as (classes,) texts, got {names.shape} in {names.dtype}')
    return tuple(map(str, names))
