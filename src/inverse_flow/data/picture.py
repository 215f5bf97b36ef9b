"""One picture as a viewer shows it, in eight bits of grey or colour."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (
    ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tga",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
# Pictures too, which a user must hear of rather than miss.
FOREIGN_SUFFIXES = (
    ".arw", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jxl", ".nef", ".orf", ".psd", ".raf", ".svg",
)  # fmt: skip
# What Pillow calls the two kinds of pixels that a picture is brought to.
GREY, COLOUR = "L", "RGB"
WHITE = (255, 255, 255, 255)
# Of greys in fewer than 8 bits, by what Pillow calls them.
GREY_LEVELS = {"L;2": 4, "L;4": 16}
# Formats whose 16-bit pictures some versions of Pillow give in the mode of 32-bit ones.
SIXTEEN_BIT_AS_I = ("PNG", "PPM")


def read_picture(path: Path) -> Image:
    """The picture in a file, as a viewer shows it: in Pillow's mode ``"L"`` or ``"RGB"``.

    It is turned as its orientation says; 16 bits become 8; what is transparent lies on white; palettes, CMYK and
    colours of another profile than sRGB become the colours that are seen, and these become grey where a palette holds
    nothing else.

    Raises:
        ValueError: it cannot be read; it is an animation or has several pages; its values are floating point or 32-bit
            numbers, of which viewers do not agree what is white.
        ModuleNotFoundError: Pillow is not installed.
    """
    if path.suffix.lower() in FOREIGN_SUFFIXES:
        raise ValueError(f"{path.suffix} files are not read; save it as PNG")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        # By its stream: given a name, Pillow maps an uncompressed TIFF into memory, and one that is turned wrongly.
        with path.open("rb") as stream, Image.open(stream) as file:
            _correct_key(file)
            file.load()
            # A telephone's JPEG with a preview in it (MPO) has frames too, of which viewers show the first.
            if getattr(file, "is_animated", False) and file.format != "MPO":
                raise ValueError(f"it has {getattr(file, 'n_frames', 'several')} frames, not one")
            if file.mode == "F" or (file.mode == "I" and file.format not in SIXTEEN_BIT_AS_I):
                kind = "floating-point" if file.mode == "F" else "32-bit"
                raise ValueError(f"it holds {kind} values, of which no viewer knows the white; save it in 8 or 16 bits")
            return _in_eight_bits(ImageOps.exif_transpose(file))
    except ModuleNotFoundError:
        raise
    # Decoders raise errors of any kind on damaged files, SyntaxError and struct.error among them.
    except Exception as error:
        if isinstance(error, UnidentifiedImageError):
            raise ValueError(f"it is damaged, or no {path.suffix} file") from error
        raise ValueError(str(error) or type(error).__name__) from error


def _correct_key(file: Image) -> None:
    """Corrects the transparent colour of a PNG, which Pillow takes for one of the values that it makes of the pixels.

    Raises:
        ValueError: that colour has 16 bits per channel, of which Pillow keeps 8.
    """
    key, tiles = file.info.get("transparency"), getattr(file, "tile", None)
    if file.format != "PNG" or key is None or not tiles:
        return
    raw_mode = str(tiles[0][3])
    if raw_mode == "RGB;16B":
        raise ValueError("it holds 16-bit colours of which one is transparent; save it with an alpha channel")
    if raw_mode in GREY_LEVELS:
        file.info["transparency"] = key * 255 // (GREY_LEVELS[raw_mode] - 1)


def _in_eight_bits(picture: Image) -> Image:
    from PIL import Image

    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.uint32)
        values[values == picture.info.get("transparency", -1)] = 65535
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    grey = picture.mode in ("1", "L", "LA")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, WHITE)
        picture = Image.alpha_composite(white, picture.convert("RGBA")).convert(COLOUR)
    elif picture.mode == "P":
        picture = picture.convert(COLOUR)
        pixels = np.asarray(picture)
        grey = bool((pixels == pixels[..., :1]).all())
    return _in_srgb(picture).convert(GREY if grey else COLOUR)


def _in_srgb(picture: Image) -> Image:
    """The picture with its colour profile applied. Viewers ignore a profile that does not fit the picture."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("L", COLOUR, "CMYK"):
        return picture
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return picture
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=COLOUR)
    except (OSError, ImageCms.PyCMSError):
        return picture
    assert converted is not None
    return converted
