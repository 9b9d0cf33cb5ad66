"""Collect pictures into one array [N, C, H, W], in order, in threads, and in bounded memory."""

import os
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image

from fastlangevin.learn.data.pictures import ColourFoundError, CorruptImageError, Item
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import cut

# Arrays up to this size are kept in memory, larger ones in a temporary file.
IN_MEMORY_BYTES = 256 * 2**20

# Bytes of pixels per task. A task decodes many small pictures, because a 32x32 JPEG takes 45 us, no
# longer than scheduling a task, but few large ones, because their pixels are kept until read.
_TASK_BYTES = 2**18


def collect(
    items: Iterable[Item],
    count: int,
    to_pixels: Callable[[Any], np.ndarray],
    *,
    on_corrupt: str,
    limit: int | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert ``count`` items, in order and in threads, to pixels [N, C, H, W] and labels [N].

    The labels are None unless every item has one. Pixels above IN_MEMORY_BYTES are kept in a
    temporary file, which is deleted with the array. Warns once if pictures were skipped. Raises
    ColourFoundError if ``to_pixels`` does, and FileError for other pictures that do not fit.
    """
    limit = count if limit is None else min(count, limit)
    labels: list[int | None] = []
    skipped: list[str] = []
    writer: RowWriter | None = None
    first = ""
    for item, result in _in_order(items, to_pixels):
        if isinstance(result, CorruptImageError):
            if on_corrupt == "error":
                raise FileError(
                    f"{item.name} cannot be decoded ({cut(str(result))}); "
                    'remove it or pass on_corrupt="skip"'
                )
            skipped.append(item.name)
            continue
        if isinstance(result, ColourFoundError | FileError):
            raise result
        if isinstance(result, ValueError):
            raise FileError(f"{item.name}: {result}") from result
        if writer is None:
            writer, first = RowWriter(limit, result.shape, result.dtype), item.name
        elif result.shape != writer.shape:
            raise FileError(
                f"{item.name}: all images must have the same size unless size= is given, got "
                f"{_height_width(writer.shape)} in {first} and {_height_width(result.shape)} "
                f"in {item.name}; pass size= to crop and resize them"
            )
        writer.append(result)
        labels.append(item.label)
        if len(labels) == limit:
            break
    if writer is None:
        first = skipped[0] if skipped else "load_images"
        raise FileError(f"{first}: none of {len(skipped)} images could be decoded")
    if skipped:
        warnings.warn(
            f"load_images: skipped {len(skipped)} corrupt image(s), the first is {skipped[0]}",
            stacklevel=6,  # the caller of load_images
        )
    labelled = None not in labels
    return writer.finish(), np.array(labels, dtype=np.int64) if labelled else None


def _in_order(
    items: Iterable[Item], to_pixels: Callable[[Any], np.ndarray]
) -> Iterator[tuple[Item, np.ndarray | ValueError]]:
    """Yield each item with its pixels, or with the ValueError that it raised, in order."""

    def attempt(content: Any) -> np.ndarray | ValueError:
        if isinstance(content, FileError):
            return content
        try:
            return to_pixels(content)
        except ValueError as error:  # its thread may be ahead of the reader
            return error

    def run(chunk: list[Item]) -> list[tuple[Item, np.ndarray | ValueError]]:
        return [(item, attempt(item.content)) for item in chunk]

    # Pillow registers rare formats when a file first needs them. If two threads do so at once, one
    # of them may fail to identify its file.
    Image.init()
    workers = min(8, os.cpu_count() or 1)
    remaining, per_task = iter(items), 1
    pending: deque[Future[list[tuple[Item, np.ndarray | ValueError]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(pending) <= workers and (chunk := list(islice(remaining, per_task))):
                pending.append(pool.submit(run, chunk))
            if not pending:
                return
            for item, result in pending.popleft().result():
                if isinstance(result, np.ndarray):
                    per_task = max(1, _TASK_BYTES // result.nbytes)
                yield item, result


class RowWriter:
    """Fills an array [at most count, *shape] row by row, in memory or in a temporary file.

    The file is written rather than mapped while it grows. A full disk then raises OSError instead
    of a bus error, and the pages of the file do not count as memory of the process.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape, self.dtype, self.count = shape, np.dtype(dtype), 0
        self._array: np.ndarray | None = None
        if count * int(np.prod(shape)) * self.dtype.itemsize <= IN_MEMORY_BYTES:
            self._array = np.empty((count, *shape), self.dtype)
        else:
            self._file = tempfile.TemporaryFile(prefix="fastlangevin-")  # noqa: SIM115

    def append(self, row: np.ndarray) -> None:
        """Add one row."""
        if self._array is not None:
            self._array[self.count] = row
        else:
            self._file.write(np.ascontiguousarray(row).data)
        self.count += 1

    def finish(self) -> np.ndarray:
        """Return the rows written so far, as an array or a read-only memory map."""
        if self._array is not None:
            return self._array[: self.count]
        with self._file as file:
            return map_file(file, self.dtype, (self.count, *self.shape))


def map_file(file: IO[bytes], dtype: DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map a temporary file, read-only. The map stays valid after the file is closed."""
    file.flush()
    return np.memmap(file, dtype, "r", shape=shape)


def _height_width(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"
