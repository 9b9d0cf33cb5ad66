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
    """Ignore errors if the terminal or the reader of a pipe is gone: there may be files to save."""
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


def note(text: str) -> None:
    """Print a line to standard error. It is not part of the result."""
    with printing():
        print(text, file=sys.stderr)


def error_line(error: Exception) -> None:
    """Print an error as one line on standard error."""
    from rich.console import Console

    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    where = "" if rank is None else f"rank {rank}: "
    text = f"error: {where}{' '.join(str(error).split())}"
    Console(stderr=True).print(text, style="red", markup=False, soft_wrap=True, highlight=False)


def check_out(out: Path | None, *suffixes: str) -> None:
    """Raise ValueError if ``out`` is a folder or, given suffixes, has none of them."""
    if out is not None and suffixes and out.suffix not in suffixes:
        endings = " or ".join(", ".join(suffixes).rsplit(", ", 1))
        raise ValueError(f"--out must end in {endings}, got {out}")
    if out is not None and out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {out}")
