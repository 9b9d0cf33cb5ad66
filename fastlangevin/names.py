"""Names that people type: checks against the names that exist, with the nearest one in the error.

This module does not import torch.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def nearest(name: Any, names: Collection[str], cutoff: float = 0.6) -> str | None:
    """Return the one of ``names`` that ``name`` was probably meant to be, or None.

    Upper and lower case are the same, as are "-" and "_". cutoff: the least similarity, from 0 to
    1, as difflib measures it.
    """
    if not isinstance(name, str):
        return None
    plain = {_plain(candidate): candidate for candidate in names}
    # The time is that of the product of the lengths, and a name may come from a file.
    matches = difflib.get_close_matches(_plain(name[:100]), plain, 1, cutoff)
    return plain[matches[0]] if matches else None


def did_you_mean(name: Any, names: Collection[str]) -> str:
    """Return the end of an error message, "; did you mean X?", or "" if no name is near."""
    near = nearest(name, names)
    return "" if near is None or near == name else f"; did you mean {near}?"


def check_name(argument: str, value: Any, names: Collection[str]) -> None:
    """ValueError unless ``value`` is one of ``names``; ``argument`` begins the message."""
    if value not in names:
        raise ValueError(
            f"{argument} must be one of {', '.join(names)}, got {value!r}"
            f"{did_you_mean(value, names)}"
        )


def unknown_keyword(op: str, name: str, names: Collection[str]) -> TypeError:
    """Return the error for a keyword not in ``names``. It suggests the nearest, or lists all."""
    hint = did_you_mean(name, names) or f"; the arguments are {', '.join(names)}"
    return TypeError(f"{op}: no argument is called {name}{hint}")


def unknown_attribute(module: str, name: str, names: Collection[str]) -> AttributeError:
    """Return the error for a name that a module does not have: the nearest of ``names``."""
    # Python itself asks for names with underscores, and catches the error.
    hint = "" if name.startswith("_") else did_you_mean(name, names)
    # With the name but no object, Python's own traceback does not add a second suggestion.
    return AttributeError(f"module {module!r} has no attribute {name!r}{hint}", name=name)


def keywords_checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function raise TypeError with the nearest argument for an unknown keyword."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = frozenset(names)
    op, shown = function.__qualname__.removesuffix(".__init__"), [n for n in names if n != "self"]

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in accepted:
                raise unknown_keyword(op, name, shown)
        return function(*args, **kwargs)

    return checked


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
