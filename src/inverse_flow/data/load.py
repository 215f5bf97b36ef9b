"""One name for every source of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from inverse_flow.data.cifar10 import ARCHIVE_NAME, load_cifar10
from inverse_flow.data.embedded import load_embedded
from inverse_flow.data.files import listing
from inverse_flow.data.folder import has_images, load_image_folder
from inverse_flow.data.idx import SPLIT_PREFIXES, load_idx_folder
from inverse_flow.data.images import ImageData
from inverse_flow.data.slice import load_slice

EMBEDDED = "embedded"
SOURCES = (
    f'"{EMBEDDED}", a folder with the idx or idx.gz files of MNIST or Fashion-MNIST, {ARCHIVE_NAME}, '
    "an npz file with uint8 images x, or a folder of images"
)


def load(source: str | Path, *, size: int | None = None, crop: bool = False) -> ImageData:
    """The data set that ``source`` names.

    Args:
        source: ``"embedded"`` for the Fashion-MNIST slice of the package; a folder with idx or idx.gz files, or one
            with such a ``raw`` folder in it; the CIFAR-10 python archive or a folder that holds it; an npz file, see
            :func:`load_slice`; a folder of images, see :func:`load_image_folder`.
        size: of a folder of images, see there.
        crop: of a folder of images, see there.

    Raises:
        FileNotFoundError: there is none of these.
        ValueError: the files are damaged or others than their names say; a size for images that have theirs.
    """
    path = Path(source)
    if source != EMBEDDED and not path.exists():
        raise FileNotFoundError(f"there is no {path}; a data source is {SOURCES}")
    loader = _loader(source, path)
    if loader is load_image_folder:
        return load_image_folder(path, size=size, crop=crop)
    if size is not None or crop:
        raise ValueError(f"only a folder of images is resized or cropped, {source} is none")
    return loader(path)


def _loader(source: str | Path, path: Path) -> Callable[[Path], ImageData]:
    if source == EMBEDDED:
        return lambda path: load_embedded()
    if path.suffix == ".npz":
        return load_slice
    if path.is_file() or (path / ARCHIVE_NAME).is_file():
        return load_cifar10
    for folder in (path, path / "raw"):
        if any(folder.glob(f"{SPLIT_PREFIXES['train']}-images-idx3-ubyte*")):
            return lambda path: load_idx_folder(folder)
    if has_images(path):
        return load_image_folder
    raise FileNotFoundError(f"{path} holds {listing(path)}; a data source is {SOURCES}")
