"""Code of the user's own, named as module:attribute."""

import importlib
import sys
from pathlib import Path
from typing import Any

from fastlangevin.names import did_you_mean


def find_attribute(option: str, target: str) -> Any:
    """Return what ``target``, as module:attribute, names; the module is imported.

    Modules in the working directory are found, too. Raises ValueError, beginning with ``option``,
    for another form, a module that cannot be imported, and an attribute that is not there.
    """
    module, colon, attribute = target.partition(":")
    if not (colon and module and attribute):
        raise ValueError(f"{option} must be module:attribute, such as mymodel:Net, got {target!r}")
    value = _import(option, target, module)
    for name in attribute.split("."):
        if not hasattr(value, name):
            names = [n for n in dir(value) if callable(getattr(value, n, None))]
            raise ValueError(
                f"{option} {target!r}: {module} has no attribute {attribute!r}"
                f"{did_you_mean(name, names)}"
            )
        value = getattr(value, name)
    return value


def _import(option: str, target: str, module: str) -> Any:
    """Import a module by name; the working directory comes first, as for ``python -m``."""
    # "my/model.py" is what a shell completes.
    path = Path(module)
    dotted = ".".join(path.with_suffix("").parts) if path.suffix == ".py" else module
    if dotted != module:
        is_inside = not path.is_absolute() and ".." not in path.parts
        hint = (
            f"did you mean {target.replace(module, dotted)}?"
            if is_inside
            else f"put {path.parent} into PYTHONPATH and give {target.replace(module, path.stem)}"
        )
        raise ValueError(f"{option} {target!r} must name a module, not a file; {hint}")
    sys.path.insert(0, "")
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(f"{missing}."):
            raise ValueError(f"{option} {target!r}: importing {module} failed: {error}") from error
        hint = did_you_mean(module, [file.stem for file in Path().glob("*.py")])
        raise ValueError(
            f"{option} {target!r}: no module {module!r} in the working directory, {Path.cwd()}, in "
            f"PYTHONPATH, or among the installed packages{hint}"
        ) from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        advice = ""
        if isinstance(error, SystemExit):
            advice = '; a script must do its work under if __name__ == "__main__"'
        kind = type(error).__name__
        raise ValueError(
            f"{option} {target!r}: importing {module} raised {kind}: {error}{advice}"
        ) from error
    finally:
        sys.path.remove("")
