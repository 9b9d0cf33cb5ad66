"""How the state of one object is saved, compared and restored."""

import functools
import math
import operator
import pickle
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

SIMPLE = (int, float, complex, bool, str, bytes, type(None))


class Saved(NamedTuple):
    """The state of one object. ``container``: its id if it is a container, else None.

    ``put_back`` takes a test of names: only attributes that pass it are restored.
    """

    label: str
    same: Callable[[], bool]
    put_back: Callable[[Callable[[Any], bool]], None]
    container: int | None = None


def attributes(
    label: str,
    mapping: dict[Any, Any],
    compares: Callable[[Any], bool] = lambda _: True,
    overwritten: set[tuple[int, Any]] | None = None,
) -> Saved:
    """Save the attributes in an object's __dict__ whose names ``compares`` accepts.

    Of the attributes in ``overwritten``, by the mapping's id and their name, only the layout is
    compared. The set may grow later.
    """
    whole = dict(mapping)
    entries = {key: value for key, value in whole.items() if compares(key)}
    layouts = set() if overwritten is None else overwritten

    def same() -> bool:
        if mapping.keys() == whole.keys() and all(
            map(operator.is_, mapping.values(), whole.values())
        ):
            return True  # the usual case, at a fraction of the cost
        for key, value in list(mapping.items()):
            if (id(mapping), key) in layouts and _alike(entries[key], value):
                continue
            if compares(key) and not (key in entries and _same(entries[key], value)):
                return False
        return all(key in mapping for key in entries)

    def put_back(names: Callable[[Any], bool]) -> None:
        for key in list(mapping):
            if compares(key) and key not in entries and names(key):
                mapping.pop(key, None)
        mapping.update({key: value for key, value in entries.items() if names(key)})

    return Saved(label, same, put_back)


def mapping(label: str, value: dict[Any, Any]) -> Saved:
    """Save the entries of a dictionary, in order."""
    entries = dict(value)

    def same() -> bool:
        now = list(value.items())  # in order: a cache may move entries
        return len(now) == len(entries) and all(
            k is key and _same(item, v)
            for (k, v), (key, item) in zip(now, entries.items(), strict=True)
        )

    def put_back(_: Callable[[Any], bool]) -> None:
        value.clear()
        value.update(entries)

    return Saved(label, same, put_back, id(value))


def variable(label: str, namespace: dict[str, Any], name: str) -> Saved:
    """Save the value of a global variable."""
    value = namespace[name]

    def same() -> bool:
        return name in namespace and _same(namespace[name], value)

    def put_back(names: Callable[[Any], bool]) -> None:
        if names(name):
            namespace[name] = value

    return Saved(label, same, put_back)


def absence(label: str, namespace: dict[str, Any], name: str) -> Saved:
    """Save that a global variable does not hide the builtin of its name."""
    return Saved(label, lambda: name not in namespace, lambda _: None)


def kind(label: str, value: Any) -> Saved:
    """Save the type of an object."""
    before = type(value)
    return Saved(label, lambda: type(value) is before, lambda _: None)


def sequence(label: str, value: Any) -> Saved:
    """Save the items of a list or deque."""
    items = list(value)

    def same() -> bool:
        return len(value) == len(items) and all(map(_same, list(value), items))

    def put_back(_: Callable[[Any], bool]) -> None:
        value.clear()
        value.extend(items)

    return Saved(label, same, put_back, id(value))


def items_of_set(label: str, value: Any) -> Saved:
    """Save the items of a set."""
    items = set(value)

    def put_back(_: Callable[[Any], bool]) -> None:
        value.clear()
        value.update(items)

    return Saved(label, lambda: value == items, put_back, id(value))


def array(label: str, value: Any) -> Saved:
    """Save the elements of an array or a bytearray."""
    items = value.copy()

    def put_back(_: Callable[[Any], bool]) -> None:
        if isinstance(value, np.ndarray):
            value[...] = items
        else:
            value[:] = items

    same = functools.partial(_same_bytes, value, items)
    return Saved(label, same, put_back, id(value))


def generator(label: str, value: Any) -> Saved:
    """Save the state of one of NumPy's generators."""
    old = isinstance(value, np.random.RandomState)

    def state() -> Any:
        return value.get_state() if old else value.bit_generator.state

    before = state()
    text = pickle.dumps(before)

    def put_back(_: Callable[[Any], bool]) -> None:
        if old:
            value.set_state(before)
        else:
            value.bit_generator.state = before

    return Saved(label, lambda: pickle.dumps(state()) == text, put_back, id(value))


def function(label: str, value: types.FunctionType) -> Saved:
    """Save the code, the defaults and the closure of a function, which no run may assign."""
    parts = _parts(value)
    return Saved(label, lambda: all(map(_same, _parts(value), parts)), lambda _: None)


def class_(value: type) -> Saved:
    """Save the attributes of a class."""
    before = compared_attributes(value)

    def same() -> bool:
        now = compared_attributes(value).keys()
        return now == before.keys() and all(_same(v, vars(value)[k]) for k, v in before.items())

    def put_back(names: Callable[[Any], bool]) -> None:
        for name in [k for k in compared_attributes(value) if k not in before]:
            if names(name):
                delattr(value, name)
        for name, item in before.items():
            if names(name) and not _same(item, vars(value).get(name)):
                setattr(value, name, item)

    return Saved(value.__name__, same, put_back)


def slot(label: str, value: Any, descriptor: Any) -> Saved:
    """Save what an object's slot holds."""
    before = slot_content(value, descriptor)

    def same() -> bool:
        return _same(before, slot_content(value, descriptor))

    def put_back(names: Callable[[Any], bool]) -> None:
        if names(label.rpartition(".")[2]):
            descriptor.__delete__(value) if before is _EMPTY else descriptor.__set__(value, before)

    return Saved(label, same, put_back)


def compared_attributes(kind: type) -> dict[str, Any]:
    """Return the attributes of a class, with the special methods that it defines itself."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("__")
        or isinstance(value, (types.FunctionType, staticmethod, classmethod, property))
    }


def _alike(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or not isinstance(a, SIMPLE) or a != b:
        return False
    return bool(a) or not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b)


def _same_bytes(a: Any, b: Any) -> bool:
    return bytes(a) == bytes(b)


def cell_content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _parts(function: types.FunctionType) -> list[Any]:
    """Return the code, the defaults and the closure's contents of a function."""
    contents = [cell_content(cell) for cell in function.__closure__ or ()]
    return [function.__code__, function.__defaults__, function.__kwdefaults__, *contents]


def slot_content(value: Any, descriptor: Any) -> Any:
    """Return what an object's slot holds, or a mark if it is empty."""
    try:
        return descriptor.__get__(value)
    except AttributeError:
        return _EMPTY


_EMPTY = type(None)
