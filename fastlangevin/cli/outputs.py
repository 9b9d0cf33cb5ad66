"""The result of a command, and the lines that commands print."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Errors that are reported in one line, without a traceback.
EXPECTED = (OSError, ValueError, TypeError, ImportError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Result:
    """The text of a command's result, the files that it wrote, and its exit status."""

    text: str = ""
    files: Iterable[Path] = ()
    status: int = 0

    def print(self) -> None:
        """Print the text, then the files, one per line."""
        with printing():
            for line in (self.text, *map(str, self.files)):
                if line:
                    print(line)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Ignore errors if the terminal or the reader of a pipe is gone: the command may save files."""
    with contextlib.suppress(OSError):
        yield
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            # Python flushes the stream again at exit, which must not fail.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def table(*rows: tuple[str, str]) -> str:
    """Return rows of a name and a text in two aligned columns."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


def count_images(n: int) -> str:
    """Return "1 image", or "n images"."""
    return f"{n} image" if n == 1 else f"{n} images"


def note(text: str) -> None:
    """Print a line that is not part of the result to standard error."""
    with printing():
        print(text, file=sys.stderr)


def error_line(error: Exception) -> None:
    """Print an error as one line on standard error."""
    from rich.console import Console

    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    where = "" if rank is None else f"rank {rank}: "
    text = f"error: {where}{' '.join(str(error).split())}"
    Console(stderr=True).print(text, style="red", markup=False, soft_wrap=True, highlight=False)


def choose_out(out: Path | None, default: str, overwrite: bool, *suffixes: str) -> Path:
    """Return the file that a command will write: ``out``, or ``default`` if that is None.

    Commands call this before their work, so that an error here does not lose the result. Without
    ``overwrite``, existing files are kept: if the default exists, the file is the first of NAME-2,
    NAME-3, ... that does not.

    Raises FileExistsError if ``out`` exists, ValueError for a folder or another suffix than
    ``suffixes``, and OSError if no file can be written there.
    """
    path = Path(default) if out is None else out
    if suffixes and path.suffix not in suffixes:
        endings = " or ".join(", ".join(suffixes).rsplit(", ", 1))
        raise ValueError(f"--out must end in {endings}, got {path}")
    if path.is_dir():
        raise ValueError(f"--out must be a file, got the folder {path}")
    if path.exists() and not overwrite:
        if out is not None:
            raise FileExistsError(f"{out} exists; name another --out, or replace it by --overwrite")
        others = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(2, 10**6))
        path = next(other for other in others if not other.exists())
    check_folder(path.parent)
    return path


def announce_replacing(path: Path) -> None:
    """Print a line if the file that a command is about to write exists."""
    if path.exists():
        note(f"replacing {path}")


def check_folder(folder: Path) -> None:
    """Raise OSError unless files can be written in a folder, which need not exist yet."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to: no permission in {nearest}")
