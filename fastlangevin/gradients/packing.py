"""States of several tensors: the chain moves one flat state [n, D], the energy gets its parts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_OP = "LangevinSampler"


class Packing(NamedTuple):
    """The order and shapes of the parts of a list, tuple or dict in a chain's D elements."""

    kind: type
    keys: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]  # shapes of the parts of one chain

    @property
    def shape(self) -> tuple[int]:
        """The shape (D,) of one chain's flat state."""
        return (sum(math.prod(shape) for shape in self.shapes),)

    def pack(self, name: str, parts: Any, lead: tuple[int, ...]) -> Tensor:
        """Return parts [*lead, ...] as one tensor [*lead, D], differentiably.

        The tensor is float64 if all parts are, and float32 if none is. Raises TypeError for a mix
        of the two, and TypeError or ValueError for parts that do not fit.
        """
        tensors = self._checked(name, parts, lead)
        doubles = [part.dtype == torch.float64 for part in tensors]
        if any(doubles) and not all(doubles):
            kinds = ", ".join(f"{key!r} {parts[key].dtype}" for key in self.keys)
            raise TypeError(f"{_OP}: {name} must be float64 in all parts or in none, got {kinds}")
        dtype = torch.float64 if doubles[0] else torch.float32
        sizes = [math.prod(shape) for shape in self.shapes]
        rows = [
            part.reshape(*lead, size).to(dtype) for part, size in zip(tensors, sizes, strict=True)
        ]
        return torch.cat(rows, dim=-1)

    def unpack(self, flat: Tensor) -> Any:
        """Return the parts of a tensor [..., D] in the original container and under its keys."""
        sizes = [math.prod(shape) for shape in self.shapes]
        # Energies often take views of their inputs, so the parts are contiguous.
        parts = [
            part.reshape(*flat.shape[:-1], *shape).contiguous()
            for part, shape in zip(flat.split(sizes, dim=-1), self.shapes, strict=True)
        ]
        if self.kind is dict:
            return dict(zip(self.keys, parts, strict=True))
        return self.kind(*parts) if hasattr(self.kind, "_fields") else self.kind(parts)

    def may_be_images(self) -> bool:
        """Return whether the parts have one shape, as the images of a list would."""
        return self.kind is not dict and len(set(self.shapes)) == 1

    def _checked(self, name: str, parts: Any, lead: tuple[int, ...]) -> list[Tensor]:
        keys = _keys(parts)
        same = set(keys) == set(self.keys) and isinstance(parts, Mapping) == (self.kind is dict)
        if not same:
            got = f"keys {list(keys)}" if isinstance(parts, Mapping) else type(parts).__name__
            if isinstance(parts, list | tuple):
                got += f" of {len(parts)}"
            want = f"dict with keys {list(self.keys)}"
            if self.kind is not dict:
                want = f"list or tuple of {len(self.keys)} tensors"
            raise ValueError(f"{_OP}: {name} must be a {want}, got {got}")
        tensors = [parts[key] for key in self.keys]
        for key, part, shape in zip(self.keys, tensors, self.shapes, strict=True):
            called = _part(name, key)
            _check_part(called, part)
            if part.shape != (*lead, *shape):
                raise ValueError(
                    f"{_OP}: {called} must have shape {[*lead, *shape]}, got {list(part.shape)}"
                )
            if part.device != tensors[0].device:
                raise ValueError(
                    f"{_OP}: {called} is on {part.device}, {_part(name, self.keys[0])} on "
                    f"{tensors[0].device}; move one of them"
                )
        return tensors


class PackedEnergy:
    """An energy or a score network of several parts, called with flat states [n, D]."""

    def __init__(self, func: Callable[..., Any], packing: Packing, is_score: bool) -> None:
        self.func, self.packing, self.is_score = func, packing, is_score
        self.shape = packing.shape

    def __eq__(self, other: object) -> bool:
        """Return whether the other is the same energy for states of the same parts."""
        return isinstance(other, PackedEnergy) and (
            (self.func, self.packing, self.is_score) == (other.func, other.packing, other.is_score)
        )

    def __hash__(self) -> int:
        return hash((self.func, self.packing, self.is_score))

    def __call__(self, x: Tensor, **model_kwargs: Any) -> Any:
        parts = self.packing.unpack(x)
        try:
            out = self.func(parts, **model_kwargs)
        except (AttributeError, TypeError) as error:
            if not self.packing.may_be_images():
                raise
            raise TypeError(
                f"{_OP}: the energy raised {type(error).__name__} when it was given a "
                f"{type(parts).__name__} of {len(parts)} tensors, which is a state of several "
                f"tensors; a batch of {len(parts)} images is torch.stack(x0)"
            ) from error
        if not self.is_score and isinstance(out, list | tuple | dict) and _as_parts(out, parts):
            raise TypeError(
                f"{_OP}: energy must return a tensor [n], got {type(out).__name__}; parts like the "
                "state's are a score: use LangevinSampler.from_score"
            )
        if not self.is_score or isinstance(out, Tensor):
            return out
        return self.packing.pack("the score", out, (x.shape[0],))


def packing_of(x0: Any, shapes: Any) -> Packing | None:
    """Return the packing of x0, or None if it is a tensor.

    If x0 is None, the packing is that of ``shapes``, or None if this is no container of shapes.
    """
    if x0 is None:
        keys = _keys(shapes)
        if not keys or not all(isinstance(shapes[key], Sequence) for key in keys):
            return None
        return Packing(_kind(shapes), keys, tuple(tuple(shapes[key]) for key in keys))
    if isinstance(x0, Tensor) or not isinstance(x0, list | tuple | Mapping):
        return None
    keys = _keys(x0)
    if not keys:
        raise ValueError(f"{_OP}: x0 is an empty {type(x0).__name__}; give one or more tensors")
    for key in keys:
        _check_part(_part("x0", key), x0[key])
        if len(x0[key]) != len(x0[keys[0]]):
            raise ValueError(
                f"{_OP}: {_part('x0', key)} has {len(x0[key])} chains, "
                f"{_part('x0', keys[0])} has {len(x0[keys[0]])}"
            )
    return Packing(_kind(x0), keys, tuple(tuple(x0[key].shape[1:]) for key in keys))


def _kind(parts: Any) -> type:
    if hasattr(parts, "_fields"):
        return type(parts)  # a named tuple
    return dict if isinstance(parts, Mapping) else list if isinstance(parts, list) else tuple


def _keys(parts: Any) -> tuple[Any, ...]:
    if isinstance(parts, Mapping):
        return tuple(parts)
    return tuple(range(len(parts))) if isinstance(parts, list | tuple) else ()


def _as_parts(out: Any, parts: Any) -> bool:
    return _keys(out) == _keys(parts) and all(
        isinstance(out[key], Tensor) and out[key].shape == parts[key].shape for key in _keys(out)
    )


def _part(name: str, key: Any) -> str:
    return f"{name}[{key!r}]"


def _check_part(called: str, part: Any) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(
            f"{_OP}: {called} must be a tensor, got {type(part).__name__}; a list, tuple or dict "
            "is a state of several tensors. A batch of images is a tensor [n, ...], such as "
            "torch.stack([torch.as_tensor(numpy.asarray(image)) for image in x0])"
        )
    if not part.is_floating_point():
        raise TypeError(
            f"{_OP}: {called} must be of floating dtype, got {part.dtype}; a list, tuple or dict "
            "is a state of several tensors. Labels go to the energy by keyword, as in sampler(x0, "
            "y=labels)"
        )
    if part.ndim == 0:
        raise ValueError(f"{_OP}: {called} must have a leading chain dimension, got shape []")
