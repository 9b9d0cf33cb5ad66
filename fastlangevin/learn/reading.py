"""Files that others made, read within bounds: whatever is wrong with one ends in a FileError.

A small file must not start a program, be waited for, or take much memory. So only regular files
are opened, what a header claims is compared with what the file has before anything is allocated,
and error messages show the beginning of a value.
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

# Data may expand to this many bytes whatever they are packed in, and to EXPANSION bytes for each
# packed one above that. Photographs expand 10 to 50 times and MNIST's idx files 5 times; deflated
# zeros, 1000 times.
FREE_BYTES = 2**24
EXPANSION = 200
# A training run's settings have 1.5 KB, and its results 5 KB.
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
        # Python refuses to write out integers of more than 4300 digits.
        return repr(x) if x.bit_length() < 200 else f"an integer of {x.bit_length()} bits"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        # In its own order, which the parent's is not.
        if level <= 0:
            return "{...}"
        items = list(islice(x.items(), self.maxdict + 1))
        shown = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in items]
        if len(items) > self.maxdict:
            shown[-1] = "..."
        return "{" + ", ".join(shown) + "}"


def brief(value: Any) -> str:
    """repr(value), shortened to a few items, levels and characters."""
    return cut(_Brief().repr(value))


def called(name: Any) -> str:
    """What should be a name, as an error message shows it."""
    return cut(name) if isinstance(name, str) else brief(name)


def cut(text: str) -> str:
    """A text's beginning."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@contextlib.contextmanager
def reading(path: Path | str, form: str) -> Iterator[None]:
    """FileError "PATH cannot be read as FORM: ..." for whatever the body raises.

    FileErrors pass as they are, and so does FileNotFoundError.
    """
    try:
        yield
    except (FileError, FileNotFoundError):
        raise
    # Parsers raise what they meet on their way: KeyError, struct.error, zlib.error, RecursionError.
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        said = cut(" ".join(said.split())) or type(error).__name__
        raise FileError(f"{path} cannot be read as {form}: {said}") from error


def check_file(path: Path) -> None:
    """FileError unless it is a regular file; FileNotFoundError if there is none."""
    with reading(path, "a file"):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "special file")
        raise FileError(f"{path} must be a regular file, got a {kind}")


def check_inside(path: Path, folder: Path) -> None:
    """FileError for a path that leaves the folder, by a link or by "..", or leads nowhere."""
    with reading(path, "a path"):
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        there = os.path.lexists(real) and not real.is_symlink()
    if not real.is_relative_to(root):
        raise FileError(
            f"{path} leads to {cut(str(real))}, outside {folder}; copy that into the folder, or "
            "give its own path"
        )
    if not there:
        raise FileError(f"{path} leads to {cut(str(real))}, where there is nothing")


def check_expansion(claimed: int, stored: int) -> None:
    """ValueError for data that claim to be far larger than what they are stored in."""
    if claimed > max(FREE_BYTES, EXPANSION * stored):
        raise ValueError(
            f"{stored} bytes claim to hold {claimed}; at most {EXPANSION} times as many are read"
        )


def read_bytes(path: Path, most: int = TEXT_BYTES) -> bytes:
    """All of a regular file of at most ``most`` bytes; FileError otherwise."""
    check_file(path)
    with reading(path, "a file"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size} bytes, more than {most}")
        return file.read(size or 1)  # 1: the kernel's files have no size, but errors


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """All of a text file in UTF-8, as :func:`read_bytes`."""
    content = read_bytes(path, most)
    with reading(path, "text"):
        return content.decode("utf-8")


def read_json(path: Path, most: int = TEXT_BYTES) -> Any:
    """What a JSON file holds, as :func:`read_bytes`."""
    content = read_text(path, most)
    with reading(path, "json"):
        return json.loads(content)
