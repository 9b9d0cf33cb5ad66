"""Many pictures to one array [N, C, H, W]: in order, in threads, in a bounded amount of memory."""

import os
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image

from fastlangevin.learn.data.pixels import ColourFoundError, CorruptImageError
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import cut

# An array up to this size is kept in memory, a larger one in a temporary file.
IN_MEMORY_BYTES = 256 * 2**20

# Bytes of pixels per task: many small pictures (a 32x32 JPEG decodes in 45 us, no longer than it
# takes to schedule a task) but few large ones, since every task's pixels are held until read.
_TASK_BYTES = 2**18


class Item(NamedTuple):
    """One picture as its source holds it."""

    name: str  # a file's path, or a file and a row: what an error message shows
    # A path, encoded bytes, a [C, H, W] array, or the error that reading it would be.
    content: Any
    label: int | None


def collect(
    items: Iterable[Item],
    count: int,
    to_pixels: Callable[[Any], np.ndarray],
    *,
    on_corrupt: str,
    limit: int | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert `count` items, in order and in threads, to pixels [N, C, H, W] and labels [N].

    The labels are None unless every item has one. Above IN_MEMORY_BYTES the pixels lie in a
    temporary file that disappears with the array. Warns once when pictures were skipped.

    Raises ColourFoundError where `to_pixels` does, and FileError for a picture that cannot be
    decoded (unless `on_corrupt` is "skip") or read, that differs in size, or when none is left.
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
            stacklevel=5,  # the caller of load_images
        )
    known = None not in labels
    return writer.finish(), np.array(labels, dtype=np.int64) if known else None


def _in_order(
    items: Iterable[Item], to_pixels: Callable[[Any], np.ndarray]
) -> Iterator[tuple[Item, np.ndarray | ValueError]]:
    """Yield each item with its pixels, or with the ValueError they raised, in the items' order.

    The error is a value, so that what a thread meets ahead of the reader cannot change the outcome.
    """

    def run(chunk: list[Item]) -> list[tuple[Item, np.ndarray | ValueError]]:
        return [(item, attempt(item.content)) for item in chunk]

    def attempt(content: Any) -> np.ndarray | ValueError:
        if isinstance(content, FileError):
            return content
        try:
            return to_pixels(content)
        except ValueError as error:
            return error

    # Pillow registers rare formats at the first file that needs one; in two threads at once, one
    # of them may find its file not identified.
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
    """An array [at most count, *shape] filled row by row, in memory or in a temporary file.

    The file is written, not mapped, while it grows: a full disk is then an OSError and not a
    bus error, and its pages do not count as the process's memory.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape, self.dtype, self.count = shape, np.dtype(dtype), 0
        self._array: np.ndarray | None = None
        if count * int(np.prod(shape)) * self.dtype.itemsize <= IN_MEMORY_BYTES:
            self._array = np.empty((count, *shape), self.dtype)
        else:
            self._file = tempfile.TemporaryFile(prefix="fastlangevin-")  # noqa: SIM115

    def append(self, row: np.ndarray) -> None:
        """Add one row of the given shape."""
        if self._array is not None:
            self._array[self.count] = row
        else:
            self._file.write(np.ascontiguousarray(row).data)
        self.count += 1

    def finish(self) -> np.ndarray:
        """The rows written so far, as an array or a read-only memory map."""
        if self._array is not None:
            return self._array[: self.count]
        with self._file as file:
            return map_file(file, self.dtype, (self.count, *self.shape))


def map_file(
    file: IO[bytes],
    dtype: DTypeLike,
    shape: tuple[int, ...],
    offset: int = 0,
    order: Literal["C", "F"] = "C",
) -> np.ndarray:
    """Memory-map a temporary file read-only; its bytes live as long as the map, open or closed."""
    file.flush()
    return np.memmap(file, dtype, "r", offset, shape, order)


def _height_width(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"
