"""CIFAR-10 from its python archive."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inverse_flow.data.files import md5_of
from inverse_flow.data.images import ImageData, ImageSet

ARCHIVE_NAME = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)
NAMES_FILE = "batches.meta"
IMAGE_SHAPE = (3, 32, 32)


def load_cifar10(path: str | Path, *, md5: str = ARCHIVE_MD5) -> ImageData:
    """CIFAR-10 from ``cifar-10-python.tar.gz``, or from a folder that holds it.

    The archive holds pickles, which can run code when read. So it is read only if its checksum is right.

    Args:
        path: the archive or its folder.
        md5: the checksum it must have: that of the official archive.

    Raises:
        FileNotFoundError: no archive there.
        ValueError: its checksum is not ``md5``.
    """
    path = Path(path)
    archive = path / ARCHIVE_NAME if path.is_dir() else path
    if not archive.is_file():
        raise FileNotFoundError(f"there is no CIFAR-10 archive at {archive}")
    content = archive.read_bytes()
    if md5_of(content) != md5:
        raise ValueError(f"{archive} has md5 {md5_of(content)}; the CIFAR-10 python archive has {md5}")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as members:
        sets = [_load_split(members, names) for names in (TRAIN_FILES, TEST_FILES)]
        names = tuple(name.decode() for name in _read(members, NAMES_FILE)[b"label_names"])
        return ImageData("cifar10", *sets, class_names=names)


def _read(members: tarfile.TarFile, name: str) -> dict[bytes, Any]:
    file = members.extractfile(f"{FOLDER}/{name}")
    assert file is not None
    content: dict[bytes, Any] = pickle.load(file, encoding="bytes")
    return content


def _load_split(members: tarfile.TarFile, names: tuple[str, ...]) -> ImageSet:
    images, labels = [], []
    for name in names:
        batch = _read(members, name)
        images.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, *IMAGE_SHAPE))
        labels.extend(batch[b"labels"])
    stacked = torch.from_numpy(np.concatenate(images))
    return ImageSet(stacked, torch.tensor(labels), torch.arange(len(labels)))
