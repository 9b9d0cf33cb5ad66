"""Options that several commands take: those of a model, of a run's settings, of a fit."""

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Command = Callable[..., None]

Run = Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a model's name.")]
Held = Annotated[
    str | None, typer.Option(help="A source of images.", show_default="those the run held out")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Langevin steps.", show_default="the run's")]
Seed = Annotated[int, typer.Option(help="Of starting points and noise.")]
Tile = Annotated[int, typer.Option(min=1, help="Enlarge small images to about this.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Averaged = Annotated[
    bool, typer.Option(help="Use the weights' moving average, where there is one.")
]
# Options of a fit, by the name of `latent.reconstruct`'s argument: type, help, the rest.
FIT: dict[str, tuple[type, str, dict[str, Any]]] = {
    "restarts": (int, "Starts that are fitted to each image; the best counts.", {"min": 1}),
    "iterations": (int, "Descent steps on the start.", {"min": 1}),
    "optimizer": (str, "adam, or gd for plain gradient descent.", {}),
    "lr": (float, "Of the descent.", {"show_default": "0.1 for adam, 0.05 for gd"}),
    "noise": (str, "In the chain: off, or frozen (always the same).", {}),
    "grad_through": (
        str, "exact: unrolled through the chain; straight: d M / d z taken as 1.", {}
    ),
    "checkpoint": (str, "none, step, auto, states, or bytes as 2GiB.", {}),
}  # fmt: skip


def with_settings(panel: str, lists: bool = False) -> Callable[[Command], Command]:
    """Give a command one option per field of TrainConfig, in place of its argument ``settings``.

    That becomes a mapping of those which the user sets: values of the field's type, with None for
    "none", or with ``lists`` each the text of a list of values.
    """
    from fastlangevin.learn.config import FIELDS

    options = {}
    for name, field in FIELDS.items():
        kind, metavar = (str, "<v,...>") if lists else _kind(name)
        options[name] = (
            kind,
            typer.Option(
                help=field.metadata["help"],
                metavar=metavar,
                show_default=False,
                rich_help_panel=panel,
            ),
        )

    def read(given: dict[str, Any]) -> dict[str, Any]:
        return given if lists else {k: None if v == "none" else v for k, v in given.items()}

    return _with("settings", options, read)


def with_fit(
    panel: str, names: Iterable[str] = FIT, **defaults: str
) -> Callable[[Command], Command]:
    """Give a command options of a fit, in place of its argument ``fit``, and as that those set.

    ``defaults`` are shown where they are not `reconstruct`'s.
    """
    from fastlangevin.learn.tasks import reconstruct as latent

    arguments = inspect.signature(latent.reconstruct).parameters
    options = {}
    for name in names:
        kind, text, rest = FIT[name]
        shown = {"show_default": defaults.get(name, str(arguments[name].default))}
        options[name] = kind, typer.Option(help=text, rich_help_panel=panel, **shown | rest)

    def read(given: dict[str, Any]) -> dict[str, Any]:
        if given.get("checkpoint", "").isdecimal():
            given["checkpoint"] = int(given["checkpoint"])
        return given

    return _with("fit", options, read)


def belong(names: Iterable[str], owner: str) -> None:
    """ValueError if options were given, by name, that belong to another that was not."""
    if given := ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names)):
        raise ValueError(f"{given} {'belong' if ',' in given else 'belongs'} to {owner}")


def _with(
    argument: str,
    options: Mapping[str, tuple[Any, Any]],
    read: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[[Command], Command]:
    """Options by name, of (type, typer's option), in place of an argument that is a mapping.

    It holds those that the user sets, as ``read`` makes them.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.name != argument]
        for name, (kind, option) in options.items():
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, option],
                )
            )

        def wrapped(*arguments: Any, **values: Any) -> None:
            given = {name: values.pop(name, None) for name in options}
            given = {name: value for name, value in given.items() if value is not None}
            command(*arguments, **values, **{argument: read(given)})

        wrapped.__doc__ = command.__doc__
        wrapped.__name__ = command.__name__
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def _kind(name: str) -> tuple[Any, str | None]:
    """An option's type, and what it shows in place of that."""
    from fastlangevin.learn.config import TYPES

    kind = TYPES[name]
    if type(None) in typing.get_args(kind):
        kind = typing.get_args(kind)[0]
        if kind in (int, float):  # so that a preset's number can be taken back
            return str, f"<{kind.__name__}|none>"
    return kind, None
