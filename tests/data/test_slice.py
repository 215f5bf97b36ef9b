from pathlib import Path

import numpy as np
import pytest
import torch

from inverse_flow.data import load

PIXELS = np.random.default_rng(0).integers(0, 256, (17, 4, 6, 3), dtype=np.uint8)


def test_the_last_eighth_is_held_out_and_the_name_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", x=PIXELS)
    data = load(tmp_path / "few.npz")
    assert data.name == "few (slice of 17, the last 2 held out)"
    assert data.classes == 0
    pixels = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    assert torch.equal(data.train.images, pixels[:15])
    assert torch.equal(data.test.images, pixels[15:])
    assert data.test.indices.tolist() == [15, 16]


def test_labels_and_grey_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", x=PIXELS[..., 0], y=np.arange(17) % 3)
    data = load(tmp_path / "few.npz")
    assert data.train.image_shape == (1, 4, 6)
    assert data.test.labels.tolist() == [0, 1]
    assert data.classes == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS}, 'must have a key "x", it has images'),
        ({"x": PIXELS.astype(np.float32)}, r"must hold \(N, H, W, C\) in uint8, got \(17, 4, 6, 3\) in float32"),
        ({"x": PIXELS.transpose(0, 3, 1, 2)}, r"\(17, 3, 4, 6\) looks like \(N, C, H, W\)"),
        ({"x": PIXELS[..., :1].transpose(0, 3, 1, 2)}, r"\(17, 1, 4, 6\) looks like \(N, C, H, W\)"),
        ({"x": PIXELS[0, 0]}, r"got \(6, 3\) in uint8"),
        ({"x": PIXELS, "y": np.arange(3)}, r"has 17 images but labels of shape \(3,\)"),
        ({"x": PIXELS[:7]}, "has 7 images; at least 8 are needed"),
        ({"x": PIXELS, "y": np.full(17, 1.0)}, 'labels "y" that are whole numbers, got float64'),
        ({"x": PIXELS, "y": np.full(17, np.nan)}, "whole numbers, got float64"),
        ({"x": PIXELS, "y": np.ones(17, complex)}, "whole numbers, got complex128"),
        ({"x": PIXELS, "y": np.ones(17, bool)}, "whole numbers, got bool"),
        ({"x": PIXELS, "y": np.array(["cat"] * 17)}, 'whole numbers, with the names in "class_names", got <U3'),
        ({"x": PIXELS, "y": np.full(17, 10**12)}, r"labels from 0 to 65535 \(−1 for none\), got 1000000000000"),
        ({"x": PIXELS, "y": np.full(17, 2**64 - 1, np.uint64)}, "got 18446744073709551615"),
        ({"x": PIXELS, "y": np.full(17, -2)}, "got -2"),
        ({"x": PIXELS, "y": np.arange(17) // 9}, "in the order of their classes: shuffle them"),
        ({"x": PIXELS, "y": np.arange(17) % 3, "class_names": np.array(["a", "b"])}, "from 0 to 1 .*, got 2"),
        ({"x": PIXELS, "class_names": np.arange(2)}, r"\"class_names\" as \(classes,\) texts, got \(2,\) in int64"),
        ({"x": np.array([{}], dtype=object)}, "Object arrays cannot be loaded"),
    ],
)
def test_what_is_no_slice_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "few.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "few.npz")


def test_class_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.NPZ", x=PIXELS, y=np.arange(17) % 3, class_names=np.array(["cat", "dog", "eel", "fly"]))
    (tmp_path / "few.NPZ.npz").rename(tmp_path / "few.NPZ")
    data = load(tmp_path / "few.NPZ")
    assert data.class_names == ("cat", "dog", "eel", "fly")
    assert data.classes == 4


def test_damage_of_every_kind_is_a_refusal_with_the_name(tmp_path: Path) -> None:
    """A file of which a byte is another one, or which ends early, is read or refused; nothing else comes of it."""
    rng, path = np.random.default_rng(0), tmp_path / "few.npz"
    np.savez_compressed(path, x=PIXELS, y=np.arange(17) % 3)
    whole, refusals = path.read_bytes(), []
    for draw in range(200):
        content = bytearray(whole)
        if draw % 4:
            # The directory at the end says how the arrays are to be read.
            content[-1 - rng.integers(0, min(len(content), 250))] = rng.integers(0, 256)
        else:
            del content[rng.integers(0, len(content)) :]
        path.write_bytes(content)
        try:
            load(path)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert all(str(path) in refusal for refusal in refusals)


def test_what_is_no_npz_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged or no npz file"):
        load(tmp_path / "few.npz")
    with pytest.raises(FileNotFoundError, match="there is no"):
        load(tmp_path / "none.npz")
