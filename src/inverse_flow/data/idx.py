"""The idx format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse_flow.data.files import listing
from inverse_flow.data.images import ImageData, ImageSet

# An idx file begins with two zero bytes, the code of its element type, and its number of dimensions.
UINT8_CODE = 8
GZIP_MAGIC = b"\x1f\x8b"

SPLIT_PREFIXES = {"train": "train", "test": "t10k"}


def parse_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """The array in an idx file of unsigned bytes.

    Raises:
        ValueError: not idx, another element type, or more or fewer bytes than the header announces.
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{name} is no idx file: it begins with {content[:4]!r} instead of two zero bytes")
    _, code, dimensions = struct.unpack(">HBB", content[:4])
    if code != UINT8_CODE:
        raise ValueError(f"{name} holds elements of idx type {code}; only unsigned bytes (type 8) are read")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{name} ends within its header, after {len(content)} bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(f"{name} has {len(content)} bytes; its header, of shape {shape}, announces {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an idx file, gzipped or not.

    Raises:
        ValueError: a damaged gzip file; as :func:`parse_idx`.
    """
    content = path.read_bytes()
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    return parse_idx(content, str(path))


def load_idx_folder(folder: str | Path) -> ImageData:
    """MNIST, Fashion-MNIST or the like from a folder with the four files of their web sites.

    The files are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, each as it is or gzipped with ``.gz``: the ``raw`` folder that torchvision makes.

    Raises:
        FileNotFoundError: no such folder, or a file missing from it.
        ValueError: a file that is not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    name = folder.resolve().parent.name if folder.resolve().name == "raw" else folder.resolve().name
    return ImageData(name, _load_split(folder, "train"), _load_split(folder, "test"))


def _load_split(folder: Path, split: str) -> ImageSet:
    prefix = SPLIT_PREFIXES[split]
    images = _read(folder, f"{prefix}-images", dimensions=3)
    labels = _read(folder, f"{prefix}-labels", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {split} images but {len(labels)} labels")
    return ImageSet(images[:, None], labels.long(), torch.arange(len(images)))


def has_idx_files(folder: Path) -> bool:
    """Whether one of the four files is in a folder, under any of its names."""
    names = {f"{prefix}-{kind}" for prefix in SPLIT_PREFIXES.values() for kind in ("images", "labels")}
    return any(path.is_file() for name in names for path in folder.glob(f"{name}?idx*-ubyte*"))


def _read(folder: Path, prefix: str, dimensions: int) -> Tensor:
    name = f"{prefix}-idx{dimensions}-ubyte"
    # Some copies on the web have a dot before the format.
    dotted = f"{prefix}.idx{dimensions}-ubyte"
    for path in (folder / name, folder / f"{name}.gz", folder / dotted, folder / f"{dotted}.gz"):
        if path.is_file():
            array = read_idx(path)
            if array.ndim != dimensions:
                raise ValueError(f"{path} should have {dimensions} dimensions, it has shape {array.shape}")
            return torch.from_numpy(array.copy())
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz; it holds {listing(folder)}")
