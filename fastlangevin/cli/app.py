"""The `fastlangevin` command: its subcommands, error reports and exit statuses."""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from cyclopts import App, CycloptsError, Group, Parameter

from fastlangevin._version import __version__
from fastlangevin.cli.outputs import EXPECTED, Result, error_line, note

# Each command is a function in a module, both of its name. The function's docstring is its help.
COMMANDS = {
    "Learn": ("train", "configs", "sweep"),
    "Sample": ("sample",),
    "Use a model": ("reconstruct", "interpolate", "restore", "transfer", "export"),
    "Judge": ("check", "evaluate", "diagnose", "report"),
    "Machine": ("doctor", "bench"),
}
NAMES = [name for names in COMMANDS.values() for name in names]


def make_app(chosen: str | None = None) -> App:
    """Build the application. It imports only the commands that it shows, so that help is fast.

    chosen: the first argument. Summaries of all commands are read only for the list of commands.
    """
    app = App(
        name="fastlangevin",
        help="Langevin sampling and short-run MCMC learning of energy-based models.",
        version=__version__,
        help_format="markdown",
        group_arguments=Group("Arguments", sort_key=0),
        group_parameters=Group("Options", sort_key=1),
        default_parameter=Parameter(negative_iterable=(), allow_repeating=True),
        result_action="return_value",
    )
    for title, names in COMMANDS.items():
        group = Group.create_ordered(title)
        for name in names:
            module = f"fastlangevin.cli.{name}"
            summary = None if name == chosen else ""
            if chosen in (None, *app.help_flags):
                summary = str(getattr(import_module(module), name).__doc__).split("\n")[0]
            place = NAMES.index(name)
            app.command(f"{module}:{name}", name=name, group=group, sort_key=place, help=summary)
    flags = Group.create_ordered("Help")
    app.register_install_completion_command(
        help="Install completion by the Tab key for this shell: bash, zsh, fish or PowerShell."
    )
    for flag in (*app.help_flags, *app.version_flags, "--install-completion"):
        app[flag].group = (flags,)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    Results go to standard output; warnings, progress and errors to standard error. The exit status
    is 0, or the command's own; 1 after an expected failure; 2 after misuse; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # OpenMP reads this when torch is imported. By default its threads spin while they wait, and so
    # take time from other processes: 40 iterations on the digits took 27 s of processor time
    # instead of 8 s, on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *_, **__: note(
            f"warning: {' '.join(str(text).split())}"
        )
        try:
            app = make_app(arguments[0] if arguments else None)
            result = app(arguments, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            error_line(error)
            sys.exit(2)
        except EXPECTED as error:
            error_line(error)
            sys.exit(1)
    if isinstance(result, Result):
        result.print()
    sys.exit(getattr(result, "status", 0))
