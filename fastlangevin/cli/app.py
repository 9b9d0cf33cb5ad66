"""The `fastlangevin` command: its subcommands, error reports and exit statuses."""

import difflib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Group, Parameter

from fastlangevin._version import __version__
from fastlangevin.cli.outputs import EXPECTED, Result, error_line

# Each command is a function in a module, both of its name. Its summary, the first line of the
# function's docstring, is repeated here so that the list of commands can be shown without importing
# torch.
COMMANDS = {
    "Learn": {
        "train": "Learn an energy from images by short-run MCMC, into a folder.",
        "configs": "List the training configs in the package, or print one as YAML.",
        "sweep": "Train over lists of settings and seeds; write tables and a plot of the results.",
    },
    "Use a model": {
        "sample": "Run chains from noise through a trained model and save the images.",
        "reconstruct": "Fit starting points whose chains end at held-out images.",
        "interpolate": "Run chains from points between two starting points.",
        "restore": "Restore held-out images from linear measurements, several answers for each.",
        "transfer": "Start the chains of one domain's model at images of another.",
        "export": "Write a run's averaged weights and settings as a small checkpoint.",
    },
    "Judge": {
        "check": "Check, with a classifier of the real images, whether samples are recognisable.",
        "evaluate": "Compare samples with held-out data, noisy data and uniform noise.",
        "diagnose": "Show how learning went, whether moments match, and what the chains do.",
        "report": "Write one HTML page: samples, curves, results, diagnosis and settings.",
    },
    "Machine": {
        "doctor": "Show what is installed, which backends run here, and why the others do not.",
        "bench": "Time a step of an energy's chain with a plain loop and with every engine.",
        "version": "Print the version.",
    },
}
NAMES = [name for commands in COMMANDS.values() for name in commands]


def make_app(chosen: str | None = None) -> App:
    """Build the application. Only the chosen command is imported, for the help in its docstring."""
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
    for title, commands in COMMANDS.items():
        group = Group.create_ordered(title)
        for name, summary in commands.items():
            app.command(
                f"fastlangevin.cli.{name}:{name}",
                name=name,
                group=group,
                sort_key=NAMES.index(name),
                help=None if name == chosen else summary,
            )
    flags = Group.create_ordered("Help")
    for flag in (*app.help_flags, *app.version_flags):
        app[flag].group = (flags,)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    Results go to standard output. Warnings, progress and errors, one line each, go to standard
    error. The exit status is 0, or the command's own; 1 after an expected failure; 2 after misuse;
    130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else "--help"
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if first not in NAMES and not first.startswith("-"):
                near = difflib.get_close_matches(first, NAMES, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
                raise CycloptsError(f"no command is called {first!r}; {hint}")
            result = make_app(first)(arguments, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            error_line(error)
            sys.exit(2)
        except EXPECTED as error:
            error_line(error)
            sys.exit(1)
    if isinstance(result, Result):
        result.print()
        sys.exit(result.status)
    sys.exit(0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
