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
        ({"x": PIXELS[0, 0]}, r"got \(6, 3\) in uint8"),
        ({"x": PIXELS, "y": np.arange(3)}, r"has 17 images but labels of shape \(3,\)"),
        ({"x": PIXELS[:7]}, "has 7 images; at least 8 are needed"),
        ({"x": np.array([{}], dtype=object)}, "Object arrays cannot be loaded"),
    ],
)
def test_what_is_no_slice_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "few.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "few.npz")


def test_what_is_no_npz_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged or no npz file"):
        load(tmp_path / "few.npz")
    with pytest.raises(FileNotFoundError, match="there is no"):
        load(tmp_path / "none.npz")
