"""Read image sets of encoded pictures (folders, parquet files, the hub) and decode pictures.

Every 8-bit picture goes through `convert`, so it gives the same pixels from a folder, a parquet
file or an array.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import (
    brief,
    check_expansion,
    check_file,
    check_inside,
    read_bytes,
    reading,
)
from fastlangevin.optional import require

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_IMAGE_COLUMNS = ("img", "image")
_BATCH_ROWS = 64
_MOST_LINKED = 1000  # folders entered through links, because a few links can make any number
_CACHES = ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "HF_HUB_CACHE")
# Pillow reads more formats, and it passes PostScript under any name to an external program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PICTURE_BYTES = 2**28
_TIFF_TILE = (322, 323)  # tags of a tile's width and length

GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B"}
ALPHA_MODES = {"LA", "PA", "RGBA"}


class CorruptImageError(ValueError):
    """Bytes that Pillow cannot decode."""


class ColourFoundError(ValueError):
    """A picture is in colour but was read as grey."""


class Item(NamedTuple):
    """One picture in the form in which its source holds it."""

    name: str  # the path of a file, or a file and a row, for error messages
    content: Any  # a path, encoded bytes, an array [C, H, W], or the error to raise
    label: int | None


@dataclass(frozen=True)
class PictureSource:
    """Pictures that are not decoded yet."""

    name: str
    count: int
    items: Callable[[], Iterable[Item]]  # each call starts from the first picture


def open_folder(folder: Path) -> PictureSource:
    """Open all pictures below a folder, sorted by path.

    If all pictures lie in subfolders, the first-level subfolders are their labels. Links are
    followed if they stay inside the folder. Raises FileError for a link that leaves the folder,
    leads nowhere or leads in a circle, and if there is no picture.
    """
    with reading(folder, "a folder of images"):
        parts = sorted(path.relative_to(folder).parts for path in _pictures(folder))
    if not parts:
        raise FileError(
            f"{folder} holds no images; looked for {' '.join(EXTENSIONS)}, *.parquet and idx files"
        )
    labelled = all(len(path) > 1 for path in parts)
    classes = {name: label for label, name in enumerate(sorted({path[0] for path in parts}))}

    def items() -> Iterator[Item]:
        for path in parts:
            file = folder.joinpath(*path)
            yield Item(str(file), file, classes[path[0]] if labelled else None)

    return PictureSource(folder.name, len(parts), items)


def open_file(path: Path) -> PictureSource:
    """Open one picture; FileError if it is not a regular file."""
    check_file(path)
    return PictureSource(path.name, 1, lambda: [Item(str(path), path, None)])


def _pictures(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that have the extension of a picture and are not hidden."""
    pending: list[tuple[Path, tuple[Path, ...]]] = [(folder, (Path(os.path.realpath(folder)),))]
    linked = 0
    while pending:
        current, above = pending.pop()
        for entry in os.scandir(current):
            path, real = Path(entry.path), above[-1] / entry.name
            if entry.name.startswith("."):  # macOS leaves "._name.png" files
                continue
            if entry.is_symlink():
                check_inside(path, folder)
                real = Path(os.path.realpath(path))
            if entry.is_dir():
                linked += entry.is_symlink()
                if real in above:
                    raise FileError(f"{path} leads to {real}, a folder that it lies in")
                if linked > _MOST_LINKED:
                    raise FileError(f"{path} is a link beyond the first {_MOST_LINKED} to folders")
                pending.append((path, (*above, real)))
            elif path.suffix.lower() in EXTENSIONS:
                check_file(path)
                yield path


def open_parquet(files: list[Path], name: str) -> PictureSource:
    """Open parquet files with a column `img` or `image` and optionally an integer `label`.

    If a row holds a path instead of a picture, the path is relative to the folder of its file and
    must stay inside it. Raises ImportError without pyarrow, and FileError for a file without such
    a column.
    """
    parquet = require("pyarrow.parquet", "train", "load_images: reading parquet files")
    count = 0
    columns: dict[Path, str] = {}
    for path in files:
        check_file(path)
        with reading(path, "a parquet file"), parquet.ParquetFile(path) as file:
            columns[path] = _image_column(file.schema_arrow.names, str(path))
            _check_sizes(file.metadata, columns[path], path.stat().st_size)
            count += file.metadata.num_rows
    if count <= 0:
        raise FileError(f"{files[0]}: {name} holds no images")

    def items() -> Iterator[Item]:
        for path in files:
            row = 0
            # Buffering without reading ahead takes 0.5 GB instead of 1.5 GB for a 1 GB row group.
            with (
                reading(path, "a parquet file"),
                parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file,
            ):
                wanted = [c for c in (columns[path], "label") if c in file.schema_arrow.names]
                for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                    for record in batch.to_pylist():
                        yield _item_of_row(
                            f"{path}, row {row}", record, columns[path], [path.parent]
                        )
                        row += 1

    return PictureSource(name, count, items)


def open_hub(name: str, split: str) -> PictureSource:
    """Open a split of a data set of the Hugging Face hub, with the package `datasets`."""
    datasets = require("datasets", "train", f'load_images: the source "hub:{name}"')
    rows = datasets.load_dataset(name, split=split)
    column = _image_column(rows.column_names, f"hub:{name}")
    rows = rows.cast_column(column, datasets.Image(decode=False))
    if len(rows) == 0:
        raise FileError(f"hub:{name} holds no images in its split {split!r}")
    # The folders in which the package keeps downloaded data.
    caches = [Path(path) for c in _CACHES if (path := getattr(datasets.config, c, None))]

    def items() -> Iterator[Item]:
        for row, record in enumerate(rows):
            yield _item_of_row(f"hub:{name}, row {row}", record, column, caches)

    return PictureSource(f"{name} {split}", len(rows), items)


def _image_column(names: list[str], where: str) -> str:
    for name in _IMAGE_COLUMNS:
        if name in names:
            return name
    raise FileError(f"{where} must have a column img or image, got {brief(names)}")


def _check_sizes(metadata: Any, column: str, stored: int) -> None:
    """Raise ValueError if a parquet file claims more rows or bytes than it can hold."""
    if metadata.num_rows > stored:  # a picture has more than one byte
        raise ValueError(f"{stored} bytes claim to hold {metadata.num_rows} pictures")
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for part in (group.column(j) for j in range(group.num_columns)):
            if part.path_in_schema.split(".")[0] in (column, "label"):
                packed = min(part.total_compressed_size, stored)
                check_expansion(part.total_uncompressed_size, packed)


def _item_of_row(name: str, record: dict[str, Any], column: str, folders: list[Path]) -> Item:
    """Return a row as an item. Its picture is bytes, or a struct with bytes or else a path."""
    picture, label = record[column], record.get("label")
    if isinstance(picture, dict):
        encoded, path = picture.get("bytes"), picture.get("path")
        picture = _inside_folders(name, path, folders) if encoded is None and path else encoded
    if not isinstance(label, int) or not -(2**63) <= label < 2**63:
        label = None
    # A row without a picture counts as corrupt, because Pillow cannot identify empty bytes.
    return Item(name, picture or b"", label)


def _inside_folders(name: str, path: Any, folders: list[Path]) -> Path | FileError:
    """Return a path, relative to the first folder, or the error if it lies in none of them."""
    with contextlib.suppress(OSError, TypeError, ValueError):  # raised if it cannot be a path
        target = Path(*folders[:1], path)
        real = Path(os.path.realpath(target))
        if any(real.is_relative_to(os.path.realpath(folder)) for folder in folders):
            return target
    where = " or ".join(map(str, folders)) or "any folder of the data set"
    return FileError(f"{name} has a picture at {brief(path)}, which is outside {where}")


def decode(content: Path | bytes, *, size: int | None, channels: int | None) -> np.ndarray:
    """Decode a picture to uint8 [C, H, W].

    The EXIF orientation is applied, transparency is composited on white, and 16-bit grey keeps its
    high byte. ``size`` and ``channels`` are as for `convert`. Raises CorruptImageError as
    `open_picture` does, and FileError for a path that cannot be read.
    """
    encoded = read_picture(content) if isinstance(content, Path) else content
    return convert(open_picture(encoded, upright=True), size=size, channels=channels)


def read_picture(path: Path) -> bytes:
    """Read an encoded picture; FileError if it is not a regular file or too large for a picture."""
    return read_bytes(path, _PICTURE_BYTES)


def open_picture(encoded: bytes, upright: bool = False) -> Image.Image:
    """Decode a picture in one of FORMATS and, if ``upright``, apply its EXIF orientation.

    Raises CorruptImageError for bytes that cannot be decoded, including truncated files, and for a
    picture that claims to be far larger than its bytes allow.
    """
    try:
        image = Image.open(BytesIO(encoded), formats=FORMATS)
        depth = 1 if image.mode in ("1", "L") else 4  # bytes in memory, RGB's included
        check_expansion(image.width * image.height * depth, len(encoded))
        if isinstance(image, TiffImageFile):  # its tiles may be larger than the picture
            width, length = (image.tag_v2.get(tag, 0) for tag in _TIFF_TILE)
            check_expansion(width * length * depth, len(encoded))
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more on bad bytes.
    except Exception as error:
        # The text "cannot identify image file <_io.BytesIO object at 0x...>" does not help users.
        identified = not isinstance(error, UnidentifiedImageError)
        expected = f"it is none of {', '.join(FORMATS)}"
        raise CorruptImageError(str(error) if identified else expected) from error
    return image


def convert(image: Image.Image, *, size: int | None, channels: int | None) -> np.ndarray:
    """Convert a picture to uint8 [C, H, W].

    channels: 1 (ITU-R 601 luma) or 3. None accepts only grey pictures.
    size: crop the central square and resize it to [size, size]. None keeps the picture's size.

    Raises ColourFoundError for a colour picture if ``channels`` is None.
    """
    if channels is None and image.mode not in GREY_MODES:
        raise ColourFoundError
    if image.mode == "F":
        raise ValueError("floating-point pictures are not supported; store them as .npy")
    if image.mode.startswith("I"):  # Pillow's conversion to 8 bits would clip at 255
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
    """Convert an array [C, H, W] as `convert` does a picture.

    A uint8 array has C = 1, 3 or 4 (RGBA), a float array C = 1 or 3. A float array gives float32
    pixels; bicubic overshoot is clipped to its range.
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

    The filter is bicubic, as in tools for the Frechet distance (Parmar et al. 2022, On Aliased
    Resizing). Pillow widens it when it shrinks a picture, which avoids aliasing. Cropping first
    gives the same result as resizing the shorter side and then cropping, with less work.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.BICUBIC)
