"""Optional dependencies: import one, or say how to install it."""

import importlib
from typing import Any


def require(module: str, extra: str, what: str, hint: str = "") -> Any:
    """Import a module that ``what`` needs; ImportError if that fails.

    extra: the extra of this package that installs it. hint: the end of the error message.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the module {module}, which cannot be imported ({error}); "
            f'pip install "fastlangevin[{extra}]"{hint}'
        ) from error
