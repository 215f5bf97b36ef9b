"""Any folder of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from inverse_flow.data.files import listing
from inverse_flow.data.images import ImageData, ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# Without a folder of test images, every tenth image is held out.
HELD_OUT = 10
UNLABELLED = -1
# What Pillow calls the two kinds of pixels that are read; the others are turned into colour.
GREY, COLOUR = "L", "RGB"


def has_images(folder: Path) -> bool:
    """Whether there is an image file in a folder or below it."""
    return any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))


def load_image_folder(folder: str | Path, *, size: int | None = None, crop: bool = False) -> ImageData:
    """The images of a folder and of the folders in it, by Pillow.

    ``train`` and ``test`` in the folder are the two sets; without them every tenth image, in the order of the names,
    is a test image. Folders within these are the classes, numbered in the order of their names; without them the
    images have no labels. Grey images stay grey if all are.

    Args:
        folder: of the images.
        size: height and width to which the images are resized (by area, when they shrink); None to take them as they
            are.
        crop: cut a centred square out of each image before resizing; without it, images that are no squares are
            distorted.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: an image that cannot be read; images of different sizes, when ``size`` is not given.
        ModuleNotFoundError: Pillow is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if size is not None and size < 1:
        raise ValueError(f"the size of images must be at least 1, got {size}")
    if crop and size is None:
        raise ValueError("cropped images need a size, for they differ in it")
    name = folder.resolve().name
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        paths = [_images_in(folder / part) for part in ("train", "test")]
        classes = _classes(folder / "train")
    else:
        found, classes = _images_in(folder), _classes(folder)
        paths = [[p for i, p in enumerate(found) if (i % HELD_OUT == HELD_OUT - 1) == held] for held in (False, True)]
        name = f"{name} (every tenth image held out)"
    if not all(paths):
        raise FileNotFoundError(f"{folder} has {len(paths[0])} training and {len(paths[1])} test images")
    pictures = [[_read(path, size, crop) for path in part] for part in paths]
    grey = all(picture.mode == GREY for part in pictures for picture in part)
    mode = GREY if grey else COLOUR
    sets = [
        ImageSet(_stack(pictures[i], paths[i], mode), _labels(paths[i], classes), torch.arange(len(paths[i])))
        for i in range(2)
    ]
    if sets[0].image_shape != sets[1].image_shape:
        shapes = sets[0].image_shape, sets[1].image_shape
        raise ValueError(f"training and test images differ in shape, {shapes[0]} and {shapes[1]}: give a size")
    return ImageData(name, *sets)


def _images_in(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise FileNotFoundError(f"{folder} has no images ({', '.join(SUFFIXES)}); it holds {listing(folder)}")
    return found


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and has_images(path))


def _labels(paths: Sequence[Path], classes: list[str]) -> Tensor:
    return torch.tensor([classes.index(p.parent.name) if p.parent.name in classes else UNLABELLED for p in paths])


def _read(path: Path, size: int | None, crop: bool) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture = file.convert(GREY if file.mode in ("1", GREY) else COLOUR)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if size is None:
        return picture
    if crop:
        return ImageOps.fit(picture, (size, size), Image.Resampling.BOX)
    return picture.resize((size, size), Image.Resampling.BOX)


def _stack(pictures: Sequence[Image], paths: Sequence[Path], mode: str) -> Tensor:
    for picture, path in zip(pictures, paths, strict=True):
        if picture.size != pictures[0].size:
            first, other = (f"{s[0]} × {s[1]}" for s in (pictures[0].size, picture.size))
            raise ValueError(f"{paths[0]} is {first} and {path} is {other}: give a size to resize them to")
    pixels = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    pixels = pixels[..., None] if mode == GREY else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
