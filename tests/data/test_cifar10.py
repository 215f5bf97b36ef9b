import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from inverse_flow.data import load, load_cifar10
from inverse_flow.data.cifar10 import ARCHIVE_NAME, FOLDER, NAMES_FILE, TEST_FILES, TRAIN_FILES
from inverse_flow.data.files import md5_of

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)


def write_archive(path: Path) -> str:
    """A tiny archive of the official layout, two images per file; returns its md5."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        batches = [{b"data": PIXELS[2 * i : 2 * i + 2], b"labels": [i, i + 1]} for i in range(6)]
        names = {b"label_names": [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog"]}
        for name, batch in zip((*TRAIN_FILES, *TEST_FILES, NAMES_FILE), [*batches, names], strict=True):
            content = pickle.dumps(batch)
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())
    return md5_of(path.read_bytes())


def test_images_and_labels_in_the_order_of_the_batches(tmp_path: Path) -> None:
    md5 = write_archive(tmp_path / ARCHIVE_NAME)
    for source in (tmp_path, tmp_path / ARCHIVE_NAME):
        data = load_cifar10(source, md5=md5)
        assert data.train.images.shape == (10, 3, 32, 32)
        assert torch.equal(data.train.images.flatten(1), torch.from_numpy(PIXELS[:10]))
        assert data.train.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
        assert data.test.labels.tolist() == [5, 6]
        assert data.class_names[3] == "cat"


def test_another_archive_is_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("the pickle was read",))

    archive = tmp_path / ARCHIVE_NAME
    with tarfile.open(archive, mode="w:gz") as members:
        content = pickle.dumps(Bomb())
        member = tarfile.TarInfo(f"{FOLDER}/{TRAIN_FILES[0]}")
        member.size = len(content)
        members.addfile(member, io.BytesIO(content))
    with pytest.raises(
        ValueError, match=r"has md5 [0-9a-f]{32}; the CIFAR-10 python archive has c58f30108f718f92721af3b"
    ):
        load(tmp_path)


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no CIFAR-10 archive at .*{ARCHIVE_NAME}"):
        load_cifar10(tmp_path)
