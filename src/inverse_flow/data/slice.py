"""A slice of an image set in one npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from inverse_flow.data.images import ImageData, ImageSet

IMAGES_KEY, LABELS_KEY = "x", "y"
# The last eighth of the images is held out.
HELD_OUT = 8


def load_slice(path: str | Path) -> ImageData:
    """Images from an npz file with the key ``x``: (N, H, W, C) or (N, H, W), uint8, and perhaps labels ``y``: (N,).

    The last N/8 images, rounded down, are the test set; the name of the data says so, since figures on a slice are not
    comparable to those on the complete set.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no npz file, or not what is described above.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged or no npz file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays.files)
            if IMAGES_KEY not in names:
                raise ValueError(f'{path} must have a key "{IMAGES_KEY}", it has {", ".join(names) or "none"}')
            pixels = arrays[IMAGES_KEY]
            labels = arrays[LABELS_KEY] if LABELS_KEY in names else None
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no npz file") from error
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(f"{path} must hold (N, H, W, C) in uint8, got {pixels.shape} in {pixels.dtype}")
    if labels is not None and labels.shape != (len(pixels),):
        raise ValueError(f"{path} has {len(pixels)} images but labels of shape {labels.shape}")
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    count, held_out = len(pixels), len(pixels) // HELD_OUT
    if not held_out:
        raise ValueError(f"{path} has {count} images; at least {HELD_OUT} are needed, to hold the last eighth out")
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    rows = torch.full((count,), -1) if labels is None else torch.from_numpy(labels.astype(np.int64))
    everything = ImageSet(images, rows, torch.arange(count))
    name = f"{path.stem} (slice of {count}, the last {held_out} held out)"
    return ImageData(name, everything[: count - held_out], everything[count - held_out :])
