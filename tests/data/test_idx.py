import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from inverse_flow.data import load, load_idx_folder
from inverse_flow.data.idx import parse_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
LABELS = np.arange(5, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_folder(folder: Path, suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if suffix else bytes
    for prefix, count in (("train", 5), ("t10k", 2)):
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(IMAGES[:count])))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(LABELS[:count])))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_layout_of_torchvision(tmp_path: Path, suffix: str) -> None:
    write_folder(tmp_path / "FashionMNIST" / "raw", suffix)
    for source in (tmp_path / "FashionMNIST", tmp_path / "FashionMNIST" / "raw"):
        data = load(source)
        assert data.name == "FashionMNIST"
        assert torch.equal(data.train.images[:, 0], torch.from_numpy(IMAGES))
        assert data.train.labels.tolist() == [0, 1, 2, 3, 4]
        assert data.train.indices.tolist() == [0, 1, 2, 3, 4]
        assert len(data.test) == 2
        assert data.train.image_shape == (1, 4, 3)


def test_names_with_a_dot_are_known(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert len(load(tmp_path).train) == 5


@pytest.mark.parametrize("shape", [(2, 5, 3), (0, 4, 3)])
def test_test_images_of_another_kind_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write_folder(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros(shape, np.uint8)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(shape[0], np.uint8)))
    with pytest.raises(ValueError, match=f"{tmp_path.name}.* test images"):
        load(tmp_path)


def test_a_slice_keeps_labels_and_indices(tmp_path: Path) -> None:
    write_folder(tmp_path)
    part = load_idx_folder(tmp_path).train[3:]
    assert part.labels.tolist() == part.indices.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no idx file"),
        (b"PK\x03\x04 and so on", "no idx file"),
        (struct.pack(">HBBI", 0, 13, 1, 2) + bytes(8), "idx type 13"),
        (struct.pack(">HBBI", 0, 8, 2, 2), "ends within its header, after 8 bytes"),
        (idx(LABELS)[:-1], r"has 12 bytes; its header, of shape \(5,\), announces 13"),
        (idx(LABELS) + b"\0", "has 14 bytes"),
    ],
)
def test_what_is_not_idx_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_idx(content, "the file")


def test_errors_on_folders_say_what_is_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "half")
    (tmp_path / "half" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither t10k-labels-idx1-ubyte nor .*; it holds t10k-images"):
        load(tmp_path / "half")

    write_folder(tmp_path / "unequal")
    (tmp_path / "unequal" / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:4]))
    with pytest.raises(ValueError, match="5 train images but 4 labels"):
        load(tmp_path / "unequal")

    write_folder(tmp_path / "swapped")
    (tmp_path / "swapped" / "train-images-idx3-ubyte").write_bytes(idx(LABELS))
    with pytest.raises(ValueError, match=r"should have 3 dimensions, it has shape \(5,\)"):
        load(tmp_path / "swapped")

    write_folder(tmp_path / "damaged", ".gz")
    path = tmp_path / "damaged" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged gzip"):
        load(tmp_path / "damaged")


def test_errors_on_sources_say_what_a_source_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere; a data source is \"embedded\""):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds nothing; a data source is"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_idx_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_not_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / " ").mkdir()
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(load(".").train) == 5
    with pytest.raises(ValueError, match="the data source is empty"):
        load(source)


@pytest.mark.parametrize("name", ["photos.zip", "train.npy", "a.png", "train-images-idx3-ubyte", "noise"])
def test_a_file_of_another_kind_is_named_with_what_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=rf"{name} is a file of no kind that is read; a data source is .*npz"):
        load(tmp_path / name)
