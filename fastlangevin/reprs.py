"""Short reprs: what a value is and how large, instead of its elements."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

_MOST_SHOWN = 4  # numbers of a list


def short(value: Any) -> str:
    """Return the repr of a value, but only the shape of an array and the class of a module."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"<{kind} {list(value.shape)}, {str(value.dtype).removeprefix('torch.')}>"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, list) and len(value) > _MOST_SHOWN:
        return f"<{len(value)} values, {short(value[0])} to {short(value[-1])}>"
    return repr(value)


def short_repr(name: str, fields: Mapping[str, Any]) -> str:
    """Return "name(field=value, ...)" with short values."""
    return f"{name}({', '.join(f'{field}={short(value)}' for field, value in fields.items())})"
