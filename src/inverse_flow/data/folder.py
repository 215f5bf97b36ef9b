"""Any folder of image files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from inverse_flow.data.files import is_hidden, listing, shortened, walk
from inverse_flow.data.holdout import held_out
from inverse_flow.data.images import UNLABELLED, ImageData, ImageSet
from inverse_flow.data.picture import COLOUR, FOREIGN_SUFFIXES, GREY, SUFFIXES, read_picture
from inverse_flow.ops.spec import check_integer

if TYPE_CHECKING:
    from PIL.Image import Image

# Without a folder of test images one image in this many is held out.
HELD_OUT = 10
# So many of the sizes of images that differ are named.
SHOWN_SIZES = 3
# What the folders of the sets are called.
SET_NAMES = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


class Found(NamedTuple):
    """A picture that was read."""

    path: Path
    class_name: str | None
    picture: Image


def has_images(folder: Path) -> bool:
    """Whether there is an image file in a folder or below it."""
    return any(_pictures(folder))


def load_image_folder(
    folder: str | Path, *, size: int | None = None, crop: bool = False, seed: int = 0, skip_bad_images: bool = False
) -> ImageData:
    """The images of a folder and of the folders in it, by Pillow, as a viewer shows them.

    ``train``, ``val`` and ``test`` in the folder are the three sets (``val`` alone is the test set); without them one
    image in ten, drawn at random and of each class alike, is a test image. The first folders within these are the
    classes, in the order of their names, or of the numbers that their names are; deeper ones only hold more images.
    Without them the images have no labels. Grey images stay grey if all are. Hidden files are left out, and links are
    followed.

    Args:
        folder: of the images.
        size: height and width to which the images are resized (by area, when they shrink); None to take them as they
            are.
        crop: cut a centred square out of each image before resizing; without it, images that are no squares are
            distorted.
        seed: of the choice of test images.
        skip_bad_images: leave out what cannot be read, and list it in ``left_out``, instead of refusing the folder.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: images that cannot be read, all of them named; images of different sizes, when ``size`` is not
            given; a ``size`` at which memory could not hold them; folders of which it is not clear whether they are
            sets or classes.
        ModuleNotFoundError: Pillow is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if size is not None:
        check_integer("size", size)
    if crop and size is None:
        raise ValueError("cropped images differ in size: crop (--crop) needs a size (--image-size)")
    places = _sets(folder)
    if size is not None:
        _require_memory(places, size)
    bad: list[str] = []
    found = {part: _read_set(place, size, crop, bad) for part, place in places.items()}
    if bad and not skip_bad_images:
        told = f"{len(bad)} of the images in {folder} cannot be read"
        raise ValueError(
            f"{told}; skip_bad_images (train --skip-bad-images) goes on without:\n  " + shortened(bad, "\n  ")
        )
    for part, place in places.items():
        if not found[part]:
            raise FileNotFoundError(f"{place} has no images ({', '.join(SUFFIXES)}); it holds {listing(place)}")
    together = [picture for pictures in found.values() for picture in pictures]
    _require_one_size(together)
    mode = GREY if all(picture.picture.mode == GREY for picture in together) else COLOUR
    names = _class_names(folder, found)
    sets = {part: _image_set(pictures, names, mode) for part, pictures in found.items()}
    how = _hold_out(sets, seed)
    if bad:
        how.append(f"{len(bad)} that cannot be read left out")
    name = folder.resolve().name + (f" ({', '.join(how)})" if how else "")
    return ImageData(name, **sets, class_names=names, left_out=tuple(bad))


def _hold_out(sets: dict[str, ImageSet], seed: int) -> list[str]:
    """Sees to a test set where there is none; says how."""
    if "test" in sets:
        return []
    if "validation" in sets:
        sets["test"] = sets.pop("validation")
        return ["val as the test set"]
    everything = sets["train"]
    if len(everything) < 2:
        raise ValueError("there is one image; a test image must be held out of two or more")
    count = max(1, len(everything) // HELD_OUT)
    chosen = held_out(everything.labels, count, torch.Generator().manual_seed(seed))
    sets |= {"train": everything[~chosen], "test": everything[chosen]}
    return [f"{len(sets['test'])} of {len(everything)} held out at random, seed {seed}"]


def _pictures(folder: Path) -> Iterator[Path]:
    return filter(_is_picture, walk(folder, lambda path, reason: None))


def _require_memory(places: dict[str, Path], size: int) -> None:
    """Refuses now what the system would end the program for in the midst of reading."""
    count = sum(1 for place in places.values() for _ in _pictures(place))
    needed, memory = count * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"{count} images of {size} × {size} take at least {needed / 1e9:.0f} GB, and this machine has "
            f"{memory / 1e9:.0f}: give a smaller size"
        )


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES + FOREIGN_SUFFIXES


def _sets(folder: Path) -> dict[str, Path]:
    """The folder of each set: those that are called so, or the one folder from which a test set is held out.

    ``train`` may be a class too: folders beside it that are no sets make it one.
    """
    entries = [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry)]
    inner = [entry for entry in entries if entry.is_dir() and has_images(entry)]
    named = {entry: SET_NAMES[entry.name.lower()] for entry in inner if entry.name.lower() in SET_NAMES}
    beside = [entry.name for entry in entries if entry not in named and (entry in inner or _is_picture(entry))]
    if not named or (beside and [*named.values()] == ["train"]):
        return {"train": folder}
    sets = {part: entry for entry, part in named.items()}
    if beside or len(sets) < len(named) or "train" not in sets:
        names = shortened([*(entry.name for entry in named), *beside])
        raise ValueError(
            f"{folder} holds {names}: either train with val, test or both and no images beside them, or folders that "
            f"are classes, are read"
        )
    return {part: sets[part] for part in ("train", "validation", "test") if part in sets}


def _read_set(folder: Path, size: int | None, crop: bool, bad: list[str]) -> list[Found]:
    found = []
    for path in walk(folder, lambda path, reason: bad.append(f"{path} {reason}")):
        if not _is_picture(path):
            continue
        try:
            picture = _resized(read_picture(path), size, crop)
        except ValueError as error:
            bad.append(f"{path}: {error}")
            continue
        within = path.relative_to(folder).parts
        found.append(Found(path, within[0] if len(within) > 1 else None, picture))
    return found


def _resized(picture: Image, size: int | None, crop: bool) -> Image:
    from PIL import Image, ImageOps

    if size is None:
        return picture
    if crop:
        return ImageOps.fit(picture, (size, size), Image.Resampling.BOX)
    return picture.resize((size, size), Image.Resampling.BOX)


def _require_one_size(found: list[Found]) -> None:
    sizes = Counter(one.picture.size for one in found)
    if len(sizes) > 1:
        examples = {one.picture.size: one.path for one in reversed(found)}
        told = [f"{count} of {height} × {width} ({examples[width, height]})"
                for (width, height), count in sizes.most_common(SHOWN_SIZES)]  # fmt: skip
        raise ValueError(
            f"the images differ in height or width: {', '.join(told)}, {len(sizes)} sizes in all; size (train "
            f"--image-size) resizes them"
        )


def _class_names(folder: Path, found: dict[str, list[Found]]) -> tuple[str, ...]:
    """Those of the training images; the other sets may have fewer."""
    names = {part: {one.class_name for one in pictures if one.class_name} for part, pictures in found.items()}
    known = names["train"]
    for part, others in names.items():
        if others - known:
            unknown = shortened(sorted(others - known))
            raise ValueError(f"{folder}: the {part} images have classes that no training image has: {unknown}")
    numbers = all(name.isdecimal() for name in known)
    return tuple(sorted(known, key=lambda name: (int(name) if numbers else 0, name)))


def _image_set(found: list[Found], class_names: tuple[str, ...], mode: str) -> ImageSet:
    pixels = np.stack([np.asarray(one.picture.convert(mode)) for one in found])
    pixels = pixels[..., None] if mode == GREY else pixels
    numbers: dict[str | None, int] = {None: UNLABELLED, **{name: i for i, name in enumerate(class_names)}}
    labels = torch.tensor([numbers[one.class_name] for one in found])
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return ImageSet(images, labels, torch.arange(len(found)))
