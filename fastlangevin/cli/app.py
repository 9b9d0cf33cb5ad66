"""The command itself, and what its subcommands share."""

import contextlib
import warnings
from collections.abc import Iterator

import typer
from rich.console import Console

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
def plain_warnings() -> Iterator[None]:
    """Warnings of the library become one readable line each, without its source."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        typer.echo(f"warning: {' '.join(str(warning.message).split())}", err=True)
