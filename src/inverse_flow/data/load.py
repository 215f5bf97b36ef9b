"""One name for every source of images."""

from __future__ import annotations

from pathlib import Path

from inverse_flow.data.cifar10 import ARCHIVE_NAME, load_cifar10
from inverse_flow.data.embedded import load_embedded
from inverse_flow.data.files import listing
from inverse_flow.data.folder import has_images, load_image_folder
from inverse_flow.data.idx import has_idx_files, load_idx_folder
from inverse_flow.data.imagenet import TRAIN_FILES, has_imagenet_files, load_imagenet
from inverse_flow.data.images import ImageData
from inverse_flow.data.slice import load_slice

EMBEDDED = "embedded"
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz")
SOURCES = (
    f'"{EMBEDDED}", a folder with the idx or idx.gz files of MNIST or Fashion-MNIST, {ARCHIVE_NAME}, '
    f"a folder with the npz batches of ImageNet32 or 64 ({TRAIN_FILES[0]}, …), "
    "an npz file with uint8 images x, or a folder of images"
)


def load(
    source: str | Path, *, size: int | None = None, crop: bool = False, seed: int = 0, skip_bad_images: bool = False
) -> ImageData:
    """The data set that ``source`` names.

    Args:
        source: ``"embedded"`` for the Fashion-MNIST slice of the package; a folder with idx or idx.gz files, or one
            with such a ``raw`` folder in it; the CIFAR-10 python archive or a folder that holds it; a folder with the
            npz batches of ImageNet32 or 64, see :func:`load_imagenet`; an npz file, see :func:`load_slice`; a folder
            of images, see :func:`load_image_folder`.
        size: for a folder of images: the height and width to which they are resized.
        crop: for a folder of images: cut a centred square out of each before resizing.
        seed: for a folder of images: of the choice of test images.
        skip_bad_images: for a folder of images: leave out what cannot be read, instead of refusing the folder.

    Raises:
        FileNotFoundError: there is none of these.
        ValueError: the files are damaged or others than their names say; a size for images that have theirs.
    """
    path = Path(source)
    if source != EMBEDDED and not path.exists():
        raise FileNotFoundError(f"there is no {path}; a data source is {SOURCES}")
    if not str(source).strip():
        raise ValueError(f"the data source is empty; a data source is {SOURCES}")
    if is_image_folder(source):
        return load_image_folder(path, size=size, crop=crop, seed=seed, skip_bad_images=skip_bad_images)
    if size is not None or crop or skip_bad_images:
        raise ValueError(f"only a folder of images is resized, cropped or read in part, {source} is none")
    return load_embedded() if source == EMBEDDED else _load_files(path)


def is_image_folder(source: str | Path) -> bool:
    """Whether :func:`load` takes a source for a folder of images, which alone is resized, cropped or read in part."""
    path = Path(source)
    return source != EMBEDDED and path.is_dir() and not _is_set_of_files(path) and has_images(path)


def _is_set_of_files(folder: Path) -> bool:
    archive = (folder / ARCHIVE_NAME).is_file()
    return archive or has_imagenet_files(folder) or has_idx_files(folder) or has_idx_files(folder / "raw")


def _load_files(path: Path) -> ImageData:
    if path.is_file() and path.suffix.lower() == ".npz":
        return load_slice(path)
    if path.name.endswith(ARCHIVE_SUFFIXES) or (path / ARCHIVE_NAME).is_file():
        return load_cifar10(path)
    if has_imagenet_files(path):
        return load_imagenet(path)
    for folder in (path, path / "raw"):
        if has_idx_files(folder):
            return load_idx_folder(folder)
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds {listing(path)}; a data source is {SOURCES}")
    raise ValueError(f"{path} is a file of no kind that is read; a data source is {SOURCES}")
