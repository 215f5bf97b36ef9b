"""A picture is what a viewer shows, or it is refused by name."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from inverse_flow.data import load

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
# What each value of the EXIF field does to a picture.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: np.rot90,
}
COLOUR = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def loaded(folder: Path, name: str, picture: Image.Image, **options: object) -> np.ndarray:
    """What becomes of a picture in a folder of two: (H, W) of a grey one, (H, W, 3) of a coloured one."""
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        picture.save(folder / part / name, **options)
    return load(folder).train.images[0].permute(1, 2, 0).numpy().squeeze(-1 if picture_is_grey(folder) else ())


def picture_is_grey(folder: Path) -> bool:
    return load(folder).train.images.shape[1] == 1


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_it_is_turned_as_its_orientation_says(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if name == "a.webp" else {}
    blocks = np.array([[0, 60, 120], [150, 200, 255]], np.uint8)
    pixels = np.kron(blocks, np.ones((8, 8), np.uint8))  # even JPEG keeps blocks
    found = loaded(tmp_path, name, Image.fromarray(pixels), exif=exif, **lossless)
    found = found[..., 0] if found.ndim == 3 else found
    np.testing.assert_allclose(found.astype(int), TURNS[orientation](pixels), atol=1)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_of_grey_keep_the_top_eight(tmp_path: Path, name: str) -> None:
    ramp = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    found = loaded(tmp_path, name, Image.fromarray(ramp))
    np.testing.assert_array_equal(found, np.round(ramp / 257).astype(np.uint8))


def test_palettes_become_their_colours(tmp_path: Path) -> None:
    quantized = Image.fromarray(COLOUR).quantize(16)
    found = loaded(tmp_path / "colour", "a.png", quantized)
    np.testing.assert_array_equal(found, np.asarray(quantized.convert("RGB")))
    grey = Image.fromarray(GREY // 32 * 32).convert("P")
    np.testing.assert_array_equal(loaded(tmp_path / "grey", "a.png", grey), GREY // 32 * 32)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB"])
def test_what_is_transparent_lies_on_white(tmp_path: Path, mode: str) -> None:
    dark = Image.fromarray(np.full((6, 8), 60, np.uint8))
    alpha = Image.fromarray(np.repeat(np.array([[0, 128, 255, 255]], np.uint8), 2, 1).repeat(6, 0))
    options = {}
    if mode in ("LA", "RGBA"):
        picture = dark.convert(mode)
        picture.putalpha(alpha)
        expected = [255, 255, 157, 157, 60, 60, 60, 60]
    else:
        picture = dark.convert(mode)
        options = {"transparency": (60, 60, 60) if mode == "RGB" else 60}
        expected = [255] * 8
    found = loaded(tmp_path, "a.png", picture, **options)
    found = found[..., 0] if found.ndim == 3 else found
    np.testing.assert_allclose(found[0].astype(int), expected, atol=1)


def test_colours_of_another_space_are_those_that_are_seen(tmp_path: Path) -> None:
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    np.testing.assert_array_equal(loaded(tmp_path / "cmyk", "a.tif", cmyk), np.asarray(cmyk.convert("RGB")))
    # A profile of which red is green: that of sRGB with other names.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    renamed = "sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")
    for name, other in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ"), renamed):
        profile = profile.replace(name, other)
    seen = ImageCms.profileToProfile(
        Image.fromarray(COLOUR), io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert seen is not None
    found = loaded(tmp_path / "profile", "a.png", Image.fromarray(COLOUR), icc_profile=profile)
    assert not np.array_equal(found, COLOUR)
    np.testing.assert_array_equal(found, np.asarray(seen))
    damaged = loaded(tmp_path / "damaged", "a.png", Image.fromarray(COLOUR), icc_profile=b"nonsense")
    np.testing.assert_array_equal(damaged, COLOUR)


def test_a_preview_within_a_photograph_is_none_of_its_frames(tmp_path: Path) -> None:
    picture, preview = (Image.new("RGB", size, "red") for size in ((16, 8), (8, 4)))
    found = loaded(tmp_path, "a.jpg", picture, format="MPO", save_all=True, append_images=[preview])
    assert found.shape == (8, 16, 3)


@pytest.mark.parametrize(
    ("name", "picture", "reason"),
    [
        ("a.tif", Image.fromarray(np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)), "floating-point values"),
        ("a.tif", Image.fromarray(GREY.astype(np.int32)), "32-bit values"),
        ("a.gif", Image.fromarray(GREY), "2 frames"),
        ("a.webp", Image.fromarray(GREY), "2 frames"),
        ("a.tif", Image.fromarray(GREY), "2 frames"),
        ("a.heic", None, "heic files are not read"),
        ("a.png", None, "damaged, or no .png file"),
    ],
)
def test_what_viewers_do_not_agree_on_is_refused_by_name(
    tmp_path: Path, name: str, picture: Image.Image | None, reason: str
) -> None:
    if picture is None:
        (tmp_path / name).write_bytes(b"nonsense")
    elif reason == "2 frames":
        picture.save(tmp_path / name, save_all=True, append_images=[Image.fromarray(255 - GREY)])
    else:
        picture.save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: .*{reason}"):
        load(tmp_path)


def test_damage_of_every_kind_is_a_refusal_with_a_name(tmp_path: Path) -> None:
    """A picture of which one byte is another one, or which ends early, is read or refused; nothing else comes of it."""
    buffers = {}
    for suffix in (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp"):
        buffer = io.BytesIO()
        Image.fromarray(COLOUR).save(buffer, format={".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()))
        buffers[suffix] = buffer.getvalue()
    refused = 0
    for draw in range(150):
        suffix = list(buffers)[draw % len(buffers)]
        content = bytearray(buffers[suffix])
        if draw % 3:
            content[RNG.integers(0, min(len(content), 64))] = RNG.integers(0, 256)
        else:
            del content[RNG.integers(0, len(content)) :]
        path = tmp_path / f"{draw}{suffix}"
        path.write_bytes(content)
        try:
            load(tmp_path, size=2)
        except ValueError as error:
            refused += "cannot be read" in str(error) and path.name in str(error)
        except FileNotFoundError:
            raise AssertionError(f"{path} was not seen") from None
        path.unlink()
    assert refused > 50
