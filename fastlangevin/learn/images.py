"""Save images as picture files and arrays."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastlangevin.arguments import check_count
from fastlangevin.learn.atomic import replacing

_BAND = 16  # most images in a row of save_rows


def to_grid(images: Tensor, columns: int | None = None, tile: int = 32) -> np.ndarray:
    """Arrange images [n, C, H, W] in a grid: one uint8 picture [height, width, 3].

    Args:
        images: C is 1 or 3. Values are clamped to [-1, 1] and rounded to 256 levels.
        columns: Number of columns (default: a square grid).
        tile: Small images are enlarged by an integer factor, to at most this many pixels. Images
            are separated by 2 pixels.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"to_grid: images must be a tensor, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(f"to_grid: images must be [n, 1 or 3, H, W], got {list(images.shape)}")
    levels = to_bytes(images.detach().cpu().float()).numpy()
    n, _, height, width = levels.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    check_count("to_grid", "columns", columns)
    scale = max(1, tile // max(height, width))
    tiles = levels.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)
    high, wide = height * scale + 2, width * scale + 2
    grid = np.full((math.ceil(n / columns) * high + 2, columns * wide + 2, 3), 255, np.uint8)
    for i, picture in enumerate(tiles):
        top, left = 2 + i // columns * high, 2 + i % columns * wide
        grid[top : top + height * scale, left : left + width * scale] = picture
    return grid


def to_bytes(images: Tensor) -> Tensor:
    """Return the nearest of 256 levels, as uint8, of images that are clamped to [-1, 1]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int | None = None, tile: int = 32) -> Image.Image:
    """Return the grid of :func:`to_grid` as a picture, which a notebook shows.

    It is a PIL image: ``image_grid(sampler(n=64, seed=0))`` as the last line of a cell shows the
    samples, and ``.save(path)`` and ``.resize(size)`` do what they say.

    Args:
        images: [n, C, H, W] with C = 1 or 3, or states [F, n, C, H, W] such as those of
            ``sampler.trajectory``, which make a row each.
        columns, tile: As for :func:`to_grid`.

    Raises TypeError or ValueError as :func:`to_grid` does.
    """
    if isinstance(images, Tensor) and images.ndim == 5:
        columns = images.shape[1] if columns is None else columns
        images = images.flatten(0, 1)
    return Image.fromarray(to_grid(images, columns, tile))


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, tile: int = 32) -> None:
    """Write the grid of :func:`to_grid` as PNG, atomically."""
    with replacing(Path(path)) as temporary:
        Image.fromarray(to_grid(images, columns, tile)).save(temporary, format="PNG")


def save_gif(frames: Tensor, path: str | Path, columns: int | None = None, tile: int = 32) -> None:
    """Write frames [F, n, C, H, W], each a grid of :func:`to_grid`, as a looping GIF, atomically.

    It shows twelve frames a second, and the first and the last frame for a second each.
    """
    if frames.ndim != 5 or len(frames) == 0:
        raise ValueError(f"save_gif: frames must be [F >= 1, n, C, H, W], got {list(frames.shape)}")
    first, *later = [Image.fromarray(to_grid(frame, columns, tile)) for frame in frames]
    times = [80] * len(frames)
    times[0] = times[-1] = 1000
    with replacing(Path(path)) as temporary:
        first.save(
            temporary, format="GIF", save_all=True, append_images=later, duration=times, loop=0
        )


def save_rows(path: str | Path, tile: int, *rows: Tensor) -> None:
    """Write rows of images, each [n, C, H, W], as one grid of :func:`to_grid`, atomically.

    Images with the same index are stacked vertically. Rows of more than 16 images are split into
    bands.
    """
    width = min(len(rows[0]), _BAND)
    bands = []
    for parts in zip(*(row.split(_BAND) for row in rows), strict=True):
        for part in parts:  # the rows of the last band are padded with white
            bands += [part, part.new_ones((width - len(part), *part.shape[1:]))]
    save_grid(torch.cat(bands), path, width, tile)


def save_arrays(path: str | Path, *array: Tensor, **arrays: Tensor) -> None:
    """Write one tensor as .npy, or named tensors as .npz, atomically."""
    values = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        if array:
            np.save(file, array[0].detach().cpu().numpy())
        else:
            np.savez(file, **values)  # type: ignore[arg-type]
