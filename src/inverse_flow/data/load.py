"""One name for every source of images."""

from __future__ import annotations

from pathlib import Path

from inverse_flow.data.cifar10 import ARCHIVE_NAME, load_cifar10
from inverse_flow.data.embedded import load_embedded
from inverse_flow.data.files import listing
from inverse_flow.data.idx import SPLIT_PREFIXES, load_idx_folder
from inverse_flow.data.images import ImageData

EMBEDDED = "embedded"
SOURCES = f'"{EMBEDDED}", a folder with the idx or idx.gz files of MNIST or Fashion-MNIST, or {ARCHIVE_NAME}'


def load(source: str | Path) -> ImageData:
    """The data set that ``source`` names.

    Args:
        source: ``"embedded"`` for the Fashion-MNIST slice of the package; a folder with idx or idx.gz files, or one
            with such a ``raw`` folder in it; the CIFAR-10 python archive or a folder that holds it.

    Raises:
        FileNotFoundError: there is none of these.
        ValueError: the files are damaged or others than their names say.
    """
    if source == EMBEDDED:
        return load_embedded()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; a data source is {SOURCES}")
    if path.is_file() or (path / ARCHIVE_NAME).is_file():
        return load_cifar10(path)
    for folder in (path, path / "raw"):
        if any(folder.glob(f"{SPLIT_PREFIXES['train']}-images-idx3-ubyte*")):
            return load_idx_folder(folder)
    raise FileNotFoundError(f"{path} holds {listing(path)}; a data source is {SOURCES}")
