"""Every kind of picture that a file can hold is what a viewer shows, or is refused by its name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from inverse_flow.data import load

Pixels = NDArray[Any]
RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 4, 8


def written(folder: Path, suffix: str, content: bytes) -> Path:
    path = folder / f"picture{suffix}"
    path.write_bytes(content)
    (folder / "other.png").write_bytes(png(0, 8, np.zeros((HEIGHT, WIDTH, 1), int)))  # two are needed for two sets
    return path


def read(folder: Path, suffix: str, content: bytes) -> Pixels:
    """(H, W, 3), as it is loaded."""
    written(folder, suffix, content)
    data = load(folder)
    (found,) = [i for part in (data.train, data.test) for i in part.images if int(i.max()) > 0]
    return found.expand(3, -1, -1).permute(1, 2, 0).numpy()


# ---- PNG, of which Pillow writes few kinds: colour type, bits, and a colour that is transparent ----


def png(colour_type: int, depth: int, samples: Pixels, *chunks: tuple[bytes, bytes]) -> bytes:
    """The file of (H, W, samples a pixel)."""
    height, width, _ = samples.shape
    bits = (samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PNGS = [(kind, depth) for kind, depths in DEPTHS.items() for depth in depths]


def seen(kind: int, depth: int, samples: Pixels, palette: Pixels) -> Pixels:
    """What a viewer shows of a PNG on white, (H, W, 3), by the format's own definition."""
    if kind == 3:
        return palette[samples[..., 0]]
    values = samples / (2**depth - 1)
    alpha = values[..., -1:] if kind in (4, 6) else 1.0
    colour = values[..., : 1 if kind in (0, 4) else 3]
    return np.broadcast_to(255 * (colour * alpha + 1 - alpha), (*samples.shape[:2], 3))


@pytest.mark.parametrize("keyed", [False, True], ids=["", "one colour transparent"])
@pytest.mark.parametrize(("kind", "depth"), PNGS)
def test_png_of_every_colour_type_and_depth(tmp_path: Path, kind: int, depth: int, keyed: bool) -> None:
    palette = RNG.integers(0, 256, (2**depth if kind == 3 else 1, 3))
    samples = RNG.integers(0, 2**depth, (HEIGHT, WIDTH, SAMPLES[kind]))
    samples[0, 0] = 0
    samples[0, 1] = samples[1, 2] = 2**depth - 1
    samples[1, 3] = 1
    expected = np.array(seen(kind, depth, samples, palette))
    chunks = [(b"PLTE", palette.astype(np.uint8).tobytes())] if kind == 3 else []
    if keyed and kind in (0, 2, 3):
        key = samples[1, 3]
        expected[(samples == key).all(-1)] = 255
        opaque = b"\xff" * int(key[0]) if kind == 3 else b""
        chunks.append((b"tRNS", opaque + b"\0" if kind == 3 else key.astype(">u2").tobytes()))
    content = png(kind, depth, samples, *chunks)
    if keyed and (kind, depth) == (2, 16):  # Pillow keeps 8 of the bits, and cannot tell the colour from its neighbours
        written(tmp_path, ".png", content)
        with pytest.raises(ValueError, match=r"picture\.png: it holds 16-bit colours of which one is transparent"):
            load(tmp_path)
        return
    np.testing.assert_allclose(read(tmp_path, ".png", content).astype(float), expected, atol=2.5)


# ---- What Pillow writes: modes in formats ----

COLOUR = np.kron(RNG.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
ALPHA = np.repeat(np.array([[0, 255]], np.uint8), WIDTH // 2, 1).repeat(HEIGHT, 0)
MODES = {
    "1": (".bmp", ".gif", ".pbm", ".png", ".tif"),
    "L": (".bmp", ".gif", ".jp2", ".jpg", ".pgm", ".png", ".tga", ".tif", ".webp"),
    "LA": (".jp2", ".png", ".tga", ".tif", ".webp"),
    "P": (".bmp", ".gif", ".png", ".tga", ".tif"),
    "RGB": (".avif", ".bmp", ".gif", ".jp2", ".jpg", ".png", ".ppm", ".tga", ".tif", ".webp"),
    "RGBA": (".avif", ".gif", ".jp2", ".png", ".tga", ".tif", ".webp"),
    "CMYK": (".jpg", ".tif"),
    "YCbCr": (".jpg", ".tif"),
    "LAB": (".tif",),
}
FORMATS = {".jpg": "JPEG", ".tif": "TIFF", ".jp2": "JPEG2000", ".pgm": "PPM", ".pbm": "PPM"}


def picture(mode: str) -> Image.Image:
    made = Image.fromarray(COLOUR)
    if mode in ("LA", "RGBA"):
        made = made.convert(mode)
        made.putalpha(Image.fromarray(ALPHA))
        return made
    if mode == "LAB":
        spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(made, *spaces, outputMode="LAB")
        assert converted is not None
        return converted
    return made.convert(mode, dither=Image.Dither.NONE)


def shown(mode: str) -> Pixels:
    """The same picture on white, (H, W, 3)."""
    made = picture(mode)
    if mode in ("LA", "RGBA"):
        white = Image.new("RGBA", made.size, "white")
        return np.asarray(Image.alpha_composite(white, made.convert("RGBA")).convert("RGB"))
    return np.asarray(made.convert("RGB"))


def encoded(pictures: list[Image.Image], suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if len(pictures) > 1:
        options |= {"save_all": True, "append_images": pictures[1:]}
    pictures[0].save(buffer, FORMATS.get(suffix, suffix[1:].upper()), **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "suffix"), [(mode, suffix) for mode, suffixes in MODES.items() for suffix in suffixes]
)
def test_every_mode_in_every_format(tmp_path: Path, mode: str, suffix: str) -> None:
    lossless = {"lossless": True} if suffix == ".webp" else {"quality": 100} if suffix in (".jpg", ".avif") else {}
    try:
        content = encoded([picture(mode)], suffix, **lossless)
    except (OSError, KeyError):  # this build of Pillow does not write the format
        pytest.skip(f"Pillow here writes no {mode} in {suffix}")
    near = 24 if suffix in (".jpg", ".avif", ".gif") or mode in ("YCbCr", "P", "LAB") else 1.5
    np.testing.assert_allclose(read(tmp_path, suffix, content).astype(float), shown(mode), atol=near)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif", ".avif"])
def test_animations_and_pages_are_refused(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR), Image.fromarray(COLOUR // 2)]
    try:
        written(tmp_path, suffix, encoded(pictures, suffix))
    except (OSError, KeyError):
        pytest.skip(f"Pillow here writes no {suffix}")
    with pytest.raises(ValueError, match=rf"picture{suffix}: it has 3 frames, not one"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["<f4", "<i4", ">i4", "<u4"])
def test_values_without_a_white_are_refused(tmp_path: Path, kind: str) -> None:
    values = np.linspace(0, 1000, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(kind)
    written(tmp_path, ".tif", tiff(values))
    with pytest.raises(ValueError, match=r"picture\.tif: it holds (floating-point|32-bit) values"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["<u2", ">u2", "u1"])
@pytest.mark.parametrize("samples", [1, 3])
def test_tiff_of_8_and_16_bits(tmp_path: Path, kind: str, samples: int) -> None:
    most = 2 ** (8 * np.dtype(kind).itemsize) - 1
    values = RNG.integers(0, most + 1, (HEIGHT, WIDTH, samples)).astype(kind)
    found = read(tmp_path, ".tif", tiff(values.squeeze(-1) if samples == 1 else values))
    np.testing.assert_allclose(found, np.broadcast_to(values / most * 255, found.shape), atol=1.5)


def tiff(values: Pixels) -> bytes:
    """The file of (H, W) or (H, W, 3), in one strip."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width, samples = *values.shape[:2], values.shape[2] if values.ndim == 3 else 1
    bits, kind = 8 * values.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    # (tag, values): sizes, bits, no compression, white is most, the strip, samples, its rows and bytes, kind of number
    photometric = 2 if samples == 3 else 1
    fields = [(256, [width]), (257, [height]), (258, [bits] * samples), (259, [1]), (262, [photometric]), (273, [0])]
    fields += [(277, [samples]), (278, [height]), (279, [values.nbytes]), (339, [kind] * samples)]
    behind = 8 + 2 + 12 * len(fields) + 4
    strip = behind + sum(4 * len(given) for _, given in fields if len(given) > 1)
    fields[5] = (273, [strip])
    entries, tail = b"", b""
    for tag, given in fields:
        packed = struct.pack(f"{order}{len(given)}I", *given)
        place = packed if len(given) == 1 else struct.pack(f"{order}I", behind + len(tail))
        tail += b"" if len(given) == 1 else packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(given)) + place
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HIH", 42, 8, len(fields))
    return head + entries + b"\0\0\0\0" + tail + values.tobytes()


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".jp2", ".jpg", ".png", ".ppm", ".tga", ".tif", ".webp"])
def test_files_that_end_early_are_refused(tmp_path: Path, suffix: str) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    whole = encoded([noise], suffix)
    for share in (0.1, 0.5, 0.9):
        written(tmp_path, suffix, whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"picture{suffix}: "):
            load(tmp_path, size=4)
