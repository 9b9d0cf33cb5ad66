"""The command itself, and what its subcommands share."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fastlangevin.learn.config import TrainConfig

app = typer.Typer(
    help="Langevin sampling and short-run MCMC learning of energy-based models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Expected failures become one readable line and exit status 1."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError, ArithmeticError, RuntimeError) as error:
        message = " ".join(str(error).split())
        console.print("error:", message, style="red", markup=False, soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def unless_given(option: str, value: str | None) -> Iterator[None]:
    """Where a run's own data cannot be read, the error says which option names others."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        if value is not None:
            raise
        raise ValueError(f"{error}; {option} names others") from error


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of the library become one readable line each, at once and without their source."""

    def show(message: Warning | str, *_where: Any, **_more: Any) -> None:
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def run_config(run: Path, data: str | None = None) -> tuple["TrainConfig", dict[str, Any]]:
    """The settings of a run, with ``data`` in place of its own, and what else its checkpoint says.

    ValueError for one that names no data, FileError for one that is damaged or another version's.
    """
    from fastlangevin.learn.checkpoint import iteration_of, read_checkpoint
    from fastlangevin.learn.config import resolve_saved

    info = read_checkpoint(run)[1]
    if info.get("config") is None:
        raise ValueError(f"{run} was not made by `fastlangevin train`: it names no data")
    config = resolve_saved(info, run, {} if data is None else {"data": data})
    iteration_of(info, run)
    return config, info


def check_out(out: Path, *suffixes: str) -> None:
    """ValueError for a folder, or a file that ends in none of the suffixes, if there are any."""
    if suffixes and out.suffix not in suffixes:
        known = " or ".join(", ".join(suffixes).rsplit(", ", 1))
        raise ValueError(f"--out must end in {known}, got {out}")
    if out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {out}")
