"""Checks of arguments: tensors, numbers, schedules, clamps and clips.

Every check takes the name of the operation and of the argument, for its error message.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlangevin.kernels.memory import in_memory
from fastlangevin.names import did_you_mean

Shape = Sequence[int]
Coefficient = float | Tensor
Schedule = float | Sequence[float] | Tensor
GradClip = float | tuple[str, float]
CLIP_NORMS = ("chain_norm", "batch_norm")


def check_tensor(op: str, name: str, value: Any, hint: str = "") -> None:
    """TypeError unless a value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}{hint}")


def check_strided(op: str, name: str, value: Tensor) -> None:
    """TypeError for a sparse, nested or oneDNN tensor, whose elements have no addresses.

    Call this before reading any other property: a nested tensor has no shape.
    """
    if value.is_nested:
        raise TypeError(
            f"{op}: {name} must be a strided tensor, got a nested tensor; if its parts have one "
            f"shape, give torch.stack({name}.unbind())"
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{op}: {name} must be a strided tensor, got layout {value.layout}; "
            f"give {name}.to_dense()"
        )


def check_floating(op: str, name: str, value: Tensor, hint: str = "") -> None:
    """TypeError unless a tensor has a real floating dtype."""
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be of floating dtype, got {value.dtype}{hint}")


def check_shape(op: str, name: str, value: Tensor, shape: Shape, what: str = "shape") -> None:
    """ValueError unless a tensor has this shape; ``what`` says in the message where it is from."""
    if value.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must have {what} {list(shape)}, got {list(value.shape)}")


def check_device(op: str, name: str, value: Tensor, device: torch.device, owner: str) -> None:
    """ValueError unless a tensor is on ``owner``'s device."""
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {owner}'s device {device}, got {value.device}")


def check_chain_dimension(op: str, name: str, value: Tensor) -> None:
    """ValueError for a 0-d tensor, which has no dimension of chains."""
    if value.ndim == 0:
        raise ValueError(f"{op}: {name} must have a leading chain dimension, got shape []")


def check_count(op: str, name: str, value: int) -> int:
    """The value as an integer >= 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {number}")
    return number


def check_sizes(op: str, name: str, value: Any) -> tuple[int, ...]:
    """The value as a tuple of integers >= 1, the shape of one chain; it may be empty."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(
            f"{op}: {name} must be a sequence of integers, such as (3, 32, 32), got {value!r}"
        )
    return tuple(check_count(op, f"{name}[{i}]", size) for i, size in enumerate(value))


def check_coefficient(op: str, name: str, value: Coefficient, chains: int) -> Coefficient:
    """The value as a float >= 0, or a floating tensor, 0-d or [chains].

    The values of a tensor are not checked here; see :func:`check_values`.
    """
    if not isinstance(value, Tensor):
        return check_number(op, name, value)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != chains):
        raise ValueError(
            f"{op}: {name} must be a number or have one value per chain [{chains}], "
            f"got shape {list(value.shape)}"
        )
    check_floating(op, name, value)
    return value


def check_not_text(op: str, name: str, value: Any, expected: str) -> None:
    """TypeError for text, which is a sequence of characters, even if it spells numbers."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{op}: {name} must be {expected}, got {value!r}")


def check_schedule(op: str, name: str, value: Schedule, steps: int) -> Coefficient | list[float]:
    """The value as a float, a list of ``steps`` floats, or a tensor.

    A tensor has shape [], [n], [steps, n] or [steps, 1].
    """
    if isinstance(value, Tensor):
        if value.ndim > 2 or (value.ndim == 2 and value.shape[0] != steps):
            raise ValueError(
                f"{op}: {name} must be a number, a sequence of steps={steps} numbers, or a tensor "
                f"[n] or [{steps}, n], got shape {list(value.shape)}"
            )
        check_floating(op, name, value)
        return check_values(op, name, value)
    check_not_text(op, name, value, f"a number, a sequence of steps={steps} numbers, or a tensor")
    if isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0):
        numbers = [check_number(op, name, number) for number in value]
        if len(numbers) != steps:
            raise ValueError(
                f"{op}: {name} as a sequence must have steps={steps} numbers, got {len(numbers)} "
                "(to give one value per chain, use a tensor [n])"
            )
        return numbers
    return check_number(op, name, value)


def check_values(op: str, name: str, value: Tensor) -> Tensor:
    """The tensor; ValueError unless every value is finite and >= 0.

    The values of a CUDA tensor are not read, since the host would have to wait for the device.
    Neither are those of a tensor that is not in memory, which may have no values.
    """
    if value.device.type == "cpu" and in_memory(value):
        wrong = ~(torch.isfinite(value) & (value >= 0))
        if bool(wrong.any()):
            first = value.detach()[wrong][0].item()
            raise ValueError(f"{op}: {name} must be finite and >= 0, got {first}{_hint(name)}")
    return value


def at_step(schedule: Coefficient | list[float], k: int) -> Coefficient:
    """The coefficient at step k."""
    if isinstance(schedule, list):
        return schedule[k]
    if isinstance(schedule, Tensor) and schedule.ndim == 2:
        return schedule[k] if schedule.shape[1] != 1 else schedule[k, 0]
    return schedule


def check_chains(op: str, name: str, schedule: Coefficient | list[float], chains: int) -> None:
    """ValueError unless a schedule with one value per chain has ``chains`` of them."""
    if isinstance(schedule, Tensor) and schedule.ndim > 0:
        width = schedule.shape[-1]
        if width != chains and not (schedule.ndim == 2 and width == 1):
            raise ValueError(f"{op}: {name} has values for {width} chains, x0 has {chains}")


def check_step_kwargs(
    op: str, step_kwargs: Mapping[str, Any] | None, steps: int, keywords: Iterable[str]
) -> dict[str, Any]:
    """A dict from names to tensors [steps, ...] or sequences of ``steps`` entries.

    Raises TypeError or ValueError for anything else, and for a name that is also in ``keywords``.
    """
    if step_kwargs is None:
        return {}
    if not isinstance(step_kwargs, Mapping):
        raise TypeError(f"{op}: step_kwargs must be a dict, got {type(step_kwargs).__name__}")
    for name, entries in step_kwargs.items():
        label = f"step_kwargs[{name!r}]"
        if not isinstance(entries, Tensor | np.ndarray | list | tuple | range):
            raise TypeError(
                f"{op}: {label} must be a tensor [{steps}, ...] or a sequence of length {steps}, "
                f"got {type(entries).__name__}"
            )
        length = len(entries) if not isinstance(entries, Tensor) or entries.ndim else 0
        if length != steps:
            raise ValueError(
                f"{op}: {label} must have an entry for each of steps={steps}, got {length}"
            )
        if name in keywords:
            raise ValueError(f"{op}: {name} is given twice, in step_kwargs and as a keyword")
    return dict(step_kwargs)


def check_clamp(op: str, clamp: Sequence[float] | None) -> tuple[float, float] | None:
    """The clamp as a pair (lo, hi) with lo < hi, or None."""
    if clamp is None:
        return None
    try:
        if isinstance(clamp, bytes):  # its items are numbers
            raise TypeError
        lo, hi = (_as_float(op, "clamp", bound, "a number") for bound in clamp)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: clamp must be a pair (lo, hi) or None, got {clamp!r}") from None
    if not lo < hi:
        raise ValueError(f"{op}: clamp must have lo < hi, got ({lo}, {hi})")
    return lo, hi


def check_grad_clip(op: str, grad_clip: GradClip | None) -> GradClip | None:
    """The clip as a bound > 0, a pair ("chain_norm" or "batch_norm", bound), or None."""
    if grad_clip is None:
        return None
    if not isinstance(grad_clip, tuple | list):
        return _check_bound(op, grad_clip)
    if len(grad_clip) != 2 or grad_clip[0] not in CLIP_NORMS:
        raise ValueError(
            f'{op}: grad_clip must be a number, ("chain_norm", c) or ("batch_norm", c), '
            f"got {grad_clip!r}{did_you_mean(grad_clip[0] if grad_clip else None, CLIP_NORMS)}"
        )
    return grad_clip[0], _check_bound(op, grad_clip[1])


def _check_bound(op: str, bound: Any) -> float:
    if isinstance(bound, bool) or not isinstance(bound, Real) or not float(bound) > 0:
        raise ValueError(f"{op}: grad_clip must have a bound > 0, got {bound!r}")
    return float(bound)


def check_rng_state(op: str, x: Tensor, rng_state: Tensor, unread: str | None) -> None:
    """TypeError or ValueError unless ``rng_state`` holds {seed, step} where the kernels read it.

    ``unread`` is the reason why the kernels for x would not read it, or None. A step that ignored
    it would repeat the same noise at every replay of a captured graph.
    """
    if unread is not None:
        raise ValueError(f"{op}: rng_state cannot be used: {unread}")
    if not isinstance(rng_state, Tensor) or rng_state.dtype != torch.int64:
        raise TypeError(
            f"{op}: rng_state must be an int64 tensor, got "
            f"{getattr(rng_state, 'dtype', type(rng_state))}"
        )
    if rng_state.shape != (2,) or not rng_state.is_contiguous():
        raise ValueError(
            f"{op}: rng_state must be contiguous and of shape [2], got {list(rng_state.shape)}"
        )
    check_device(op, "rng_state", rng_state, x.device, "x")


def check_number(op: str, name: str, value: Any) -> float:
    """The value as a finite float >= 0."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{op}: {name} holds a tensor that requires grad, and a list of numbers would lose its "
            "gradient; give one tensor [K, 1] or [K, n]"
        )
    number = _as_float(op, name, value, "a number or a tensor")
    if not 0 <= number < math.inf:
        raise ValueError(f"{op}: {name} must be finite and >= 0, got {number}{_hint(name)}")
    return number


def check_positive(op: str, name: str, value: Any) -> float:
    """The value as a finite float > 0."""
    number = _as_float(op, name, value, "a number")
    if not 0 < number < math.inf:
        raise ValueError(f"{op}: {name} must be finite and > 0, got {number}")
    return number


def _as_float(op: str, name: str, value: Any, expected: str) -> float:
    """The value as a float; TypeError for anything else, and for text."""
    check_not_text(op, name, value, expected)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be {expected}, got {value!r}") from None


def _hint(name: str) -> str:
    return " (to ascend, use maximize=True)" if name == "step_size" else ""
