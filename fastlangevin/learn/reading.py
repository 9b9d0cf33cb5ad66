"""Read files from untrusted sources within bounds; anything wrong with one raises FileError.

A small file must not start a program, block the reader, or take much memory. Therefore only regular
files are opened, the sizes that a header claims are compared with the size of the file before
anything is allocated, and error messages show only the beginning of a value.
"""

import contextlib
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastlangevin.learn.errors import FileError

# Compressed data may always expand to FREE_BYTES, and to larger sizes only by a factor of at most
# EXPANSION. Photographs expand 10 to 50 times, MNIST's idx files 5 times, and deflated zeros 1000
# times.
FREE_BYTES = 2**24
EXPANSION = 200
# The settings of a training run take 1.5 KB, and its results 5 KB.
TEXT_BYTES = 2**20
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_SHOWN = 200  # characters of a value in an error message


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of more than 4300 digits.
        return repr(x) if x.bit_length() < 200 else f"an integer of {x.bit_length()} bits"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        # Keeps the order of the items, which the parent sorts.
        if level <= 0:
            return "{...}"
        items = list(islice(x.items(), self.maxdict + 1))
        shown = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in items]
        if len(items) > self.maxdict:
            shown[-1] = "..."
        return "{" + ", ".join(shown) + "}"


def brief(value: Any) -> str:
    """Return repr(value), shortened to a few items, levels and characters."""
    return cut(_Brief().repr(value))


def called(name: Any) -> str:
    """Return a value that should be a name as an error message shows it."""
    return cut(name) if isinstance(name, str) else brief(name)


def cut(text: str) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@contextlib.contextmanager
def reading(path: Path | str, form: str) -> Iterator[None]:
    """Turn any exception of the body into FileError "PATH cannot be read as FORM: ...".

    FileError and FileNotFoundError pass unchanged.
    """
    try:
        yield
    except (FileError, FileNotFoundError):
        raise
    # Parsers raise KeyError, struct.error, zlib.error, RecursionError and more.
    except Exception as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = cut(" ".join(message.split())) or type(error).__name__
        raise FileError(f"{path} cannot be read as {form}: {message}") from error


def check_file(path: Path) -> None:
    """Raise FileError unless a path is a regular file; FileNotFoundError if nothing is there."""
    with reading(path, "a file"):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "special file")
        raise FileError(f"{path} must be a regular file, got a {kind}")


def check_inside(path: Path, folder: Path) -> None:
    """Raise FileError if a path leaves the folder, by a link or by "..", or leads nowhere."""
    with reading(path, "a path"):
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        exists = os.path.lexists(real) and not real.is_symlink()
    if not real.is_relative_to(root):
        raise FileError(
            f"{path} leads to {cut(str(real))}, outside {folder}; copy it into the folder, or "
            "pass its own path"
        )
    if not exists:
        raise FileError(f"{path} leads to {cut(str(real))}, which does not exist")


def check_expansion(claimed: int, stored: int) -> None:
    """Raise ValueError for data that claim to be far larger than the bytes that store them."""
    if claimed > max(FREE_BYTES, EXPANSION * stored):
        raise ValueError(
            f"{stored} bytes claim to hold {claimed}; the limit is {EXPANSION} times as many"
        )


def read_bytes(path: Path, most: int = TEXT_BYTES) -> bytes:
    """Read a regular file of at most ``most`` bytes; FileError if it is anything else."""
    check_file(path)
    with reading(path, "a file"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size} bytes, more than {most}")
        return file.read(size or 1)  # files of the kernel report size 0 but may raise when read


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """Read a text file in UTF-8; bounds and errors are as for :func:`read_bytes`."""
    content = read_bytes(path, most)
    with reading(path, "text"):
        return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """Parse a JSON file of at most TEXT_BYTES; errors are as for :func:`read_bytes`."""
    content = read_text(path)
    with reading(path, "json"):
        return json.loads(content)


def as_json(value: Any) -> Any:
    """Return a value as it would be read back from JSON, with lists for tuples."""
    return json.loads(json.dumps(value))
