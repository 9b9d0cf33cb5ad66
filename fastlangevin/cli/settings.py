"""Options for the settings of a run, which several commands take."""

import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

Command = Callable[..., None]


def with_settings(panel: str, lists: bool = False) -> Callable[[Command], Command]:
    """Give a command one option per field of TrainConfig, in place of its argument ``settings``.

    That becomes a mapping of those which the user sets: values of the field's type, with None for
    "none", or with ``lists`` each the text of a list of values.
    """
    from fastlangevin.learn.config import FIELDS

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.name != "settings"]
        for name, field in FIELDS.items():
            kind, metavar = (str, "<v,...>") if lists else _kind(name)
            option = typer.Option(
                help=field.metadata["help"],
                metavar=metavar,
                show_default=False,
                rich_help_panel=panel,
            )
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, option],
                )
            )

        def wrapped(**values: Any) -> None:
            settings = {name: values.pop(name) for name in FIELDS}
            settings = {k: v for k, v in settings.items() if v is not None}
            if not lists:
                settings = {k: None if v == "none" else v for k, v in settings.items()}
            command(**values, settings=settings)

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
