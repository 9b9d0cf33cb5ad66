"""From a picture, encoded or an array, to [C, H, W] pixels of the size and channels asked for.

Every 8-bit picture goes through `convert`, so it gives the same pixels from a folder, a parquet
file or an array.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fastlangevin.learn.reading import check_expansion, read_bytes

# Pillow reads more, and hands PostScript under any name to an external program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PICTURE_BYTES = 2**28
_TIFF_TILE = (322, 323)  # tags of a tile's width and length

GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B"}
ALPHA_MODES = {"LA", "PA", "RGBA"}


class CorruptImageError(ValueError):
    """Bytes that Pillow cannot decode."""


class ColourFoundError(ValueError):
    """A colour picture among pictures taken to be grey."""


def decode(content: Path | bytes, *, size: int | None, channels: int | None) -> np.ndarray:
    """Decode a picture to uint8 [C, H, W].

    The EXIF orientation is applied, transparency is composited on white, and 16-bit grey keeps its
    high byte. `size` and `channels` are those of `convert`.

    Raises CorruptImageError as `open_picture`, and FileError for a path that cannot be read.
    """
    encoded = read_picture(content) if isinstance(content, Path) else content
    image = open_picture(encoded, upright=True)
    return convert(image, size=size, channels=channels)


def read_picture(path: Path) -> bytes:
    """An encoded picture; FileError for what is no regular file, or too large for a picture."""
    return read_bytes(path, _PICTURE_BYTES)


def open_picture(encoded: bytes, upright: bool = False) -> Image.Image:
    """A decoded picture of one of FORMATS, turned as its EXIF orientation says if ``upright``.

    Raises CorruptImageError for bytes that cannot be decoded, a truncated file included, and for
    a picture that claims to be far larger than its bytes can be.
    """
    try:
        image = Image.open(BytesIO(encoded), formats=FORMATS)
        depth = 1 if image.mode in ("1", "L") else 4  # bytes in memory, RGB's included
        check_expansion(image.width * image.height * depth, len(encoded))
        if isinstance(image, TiffImageFile):  # whose tiles may be larger than the picture
            width, length = (image.tag_v2.get(tag, 0) for tag in _TIFF_TILE)
            check_expansion(width * length * depth, len(encoded))
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more on bad bytes.
    except Exception as error:
        # Its "cannot identify image file <_io.BytesIO object at 0x...>" names no file.
        known = not isinstance(error, UnidentifiedImageError)
        expected = f"it is none of {', '.join(FORMATS)}"
        raise CorruptImageError(str(error) if known else expected) from error
    return image


def convert(image: Image.Image, *, size: int | None, channels: int | None) -> np.ndarray:
    """Bring a picture to uint8 [C, H, W].

    channels: 1 (ITU-R 601 luma) or 3; None accepts grey only.
    size: crop the central square and resize it to [size, size]; None keeps the picture's size.

    Raises ColourFoundError for a colour picture when `channels` is None.
    """
    if channels is None and image.mode not in GREY_MODES:
        raise ColourFoundError
    if image.mode == "F":
        raise ValueError("floating-point pictures are not supported; store them as .npy")
    if image.mode.startswith("I"):  # Pillow's own conversion to 8 bits clips at 255
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise ValueError("grey pictures must have at most 16 bits; store them as .npy")
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    if size is not None:
        image = _square(image, size)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def convert_array(pixels: np.ndarray, *, size: int | None, channels: int) -> np.ndarray:
    """`convert` for a picture [C, H, W]: uint8 with C = 1, 3 or 4 (RGBA), or float with C = 1 or 3.

    A float picture stays float32; bicubic overshoot is clipped to the picture's own range.
    """
    if pixels.dtype == np.uint8:
        rows = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(rows))
        return convert(image, size=size, channels=channels)
    pixels = pixels.astype(np.float32)
    if len(pixels) == 3 and channels == 1:
        luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)
        pixels = np.tensordot(luma, pixels, axes=1)[None]
    elif len(pixels) == 1 and channels == 3:
        pixels = pixels.repeat(3, axis=0)
    if size is None:
        return pixels
    planes = [np.asarray(_square(Image.fromarray(plane), size)) for plane in pixels]
    return np.stack(planes).clip(pixels.min(), pixels.max())


def _square(image: Image.Image, size: int) -> Image.Image:
    """Crop the central square and resize it to [size, size].

    Bicubic, because Pillow widens the filter when it shrinks (no aliasing) and Frechet-distance
    tools resize so (Parmar et al. 2022, On Aliased Resizing). Cropping first equals resizing the
    shorter side and then cropping, without computing the pixels that are cropped away.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.BICUBIC)
