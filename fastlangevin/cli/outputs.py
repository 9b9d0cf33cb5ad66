"""What commands leave behind: a result, and the lines that they print."""

import contextlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# What a command may fail of: reported in one line, without a traceback.
EXPECTED = (OSError, ValueError, TypeError, ImportError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Result:
    """What a command found, the files that it wrote, and its exit status."""

    text: str = ""
    files: Iterable[Path] = ()
    status: int = 0

    def print(self) -> None:
        """Print the text, then the files, one a line; in silence if nobody can read them."""
        with contextlib.suppress(OSError):
            for line in (self.text, *map(str, self.files)):
                if line:
                    print(line)
        flush()


def flush() -> None:
    """Flush the standard streams; one whose reader is gone is replaced by the null device."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            # What it still holds is flushed when the process ends, which must not fail.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def table(*rows: tuple[str, str]) -> str:
    """Names and what is said of them, one a line, in two columns."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


def note(text: str) -> None:
    """Print a line to standard error, which is not part of the result."""
    print(text, file=sys.stderr, flush=True)


def error_line(error: Exception) -> None:
    """Print what went wrong as one line on standard error."""
    from rich.console import Console

    message = " ".join(str(error).split())
    Console(stderr=True).print(
        "error:", message, style="red", markup=False, soft_wrap=True, highlight=False
    )


def check_out(out: Path, *suffixes: str) -> None:
    """ValueError for a folder, or a file that ends in none of the suffixes, if there are any."""
    if suffixes and out.suffix not in suffixes:
        endings = " or ".join(", ".join(suffixes).rsplit(", ", 1))
        raise ValueError(f"--out must end in {endings}, got {out}")
    if out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {out}")
