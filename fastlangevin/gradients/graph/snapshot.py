"""State that a run of an energy may change besides tensors: found, compared and put back.

Modules, objects and containers are walked breadth first from what a run can reach, up to a number
of them, so that a module which refers to a whole trainer is not walked to its end.
"""

import collections
import functools
import pickle
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Containers and objects that are compared, the nearest to the energy first.
_MOST = 5000
# Items of one container that are looked into; all of them are compared.
_WIDTH = 256
_SIMPLE = (int, float, complex, bool, str, bytes, type(None))
_ATOMS = (*_SIMPLE, Tensor, torch.dtype, torch.device, torch.Size, types.ModuleType)
# Tables of every module that hold hooks and names, not state.
_TABLES = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers", "_modules", "training"}
_KNOWN_CODE = frozenset(("builtins", "torch", "numpy", "fastlangevin"))


class Snapshot:
    """What :meth:`add` reaches, as it was then."""

    def __init__(self) -> None:
        self.unknown: str | None = None  # state that cannot be compared
        self._seen: dict[int, Any] = {}  # objects are told apart by their ids, so all are held
        self._names: set[tuple[int, str]] = set()
        self._kept: list[tuple[str, Callable[[], bool], Callable[[], None]]] = []

    def add(self, value: Any, label: str) -> None:
        """Keep what a value holds; nothing happens for what is kept already."""
        waiting = collections.deque([(value, label, 0)])
        while waiting and len(self._kept) < _MOST:
            value, label, depth = waiting.popleft()
            if isinstance(value, _ATOMS):
                continue
            if depth < 2 and isinstance(value, Iterator) and self.unknown is None:
                self.unknown = f"{label} is an iterator, whose position cannot be compared"
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            waiting.extend((item, name, depth + 1) for item, name in self._keep(value, label))

    def add_names(self, namespace: dict[str, Any], names: Iterable[str], label: str) -> None:
        """Keep the entries of a namespace under the names that a function may use."""
        for name in names:
            if name not in namespace or (id(namespace), name) in self._names:
                continue
            self._names.add((id(namespace), name))
            self._seen[id(namespace)] = namespace
            value = namespace[name]
            if isinstance(value, types.ModuleType):
                if not known_code(value.__name__):
                    self.add_names(vars(value), names, value.__name__)
                continue
            self._keep_name(f"{label}.{name}", namespace, name)
            self.add(value, f"{label}.{name}")

    def changed(self) -> str | None:
        """The name of something that is no longer as it was."""
        return next((label for label, same, _ in self._kept if not same()), None)

    def restore(self) -> None:
        """Put back what has changed."""
        for _, same, put_back in self._kept:
            if not same():
                put_back()

    def _keep(self, value: Any, label: str) -> list[tuple[Any, str]]:
        """Keep one object; return what it holds, with names."""
        if isinstance(value, nn.Module):
            named = type(value).__name__
            held = {k: v for k, v in value.__dict__.items() if k not in _TABLES}
            self._keep_entries(named, value.__dict__, held, lambda name: name not in _TABLES)
            return [(type(value), named), *((v, f"{named}.{k}") for k, v in held.items())]
        if isinstance(value, dict):
            self._keep_entries(label, value, dict(value), lambda _: True)
            return [(item, label) for item in list(value.values())[:_WIDTH]]
        if isinstance(value, list | collections.deque):
            self._keep_sequence(label, value)
            return [(item, label) for item in list(value)[:_WIDTH]]
        if isinstance(value, tuple | frozenset):
            return [(item, label) for item in list(value)[:_WIDTH]]
        if isinstance(value, set):
            self._keep_set(label, value)
            return []
        if isinstance(value, np.ndarray | bytearray):
            self._keep_array(label, value)
            return []
        if isinstance(value, np.random.Generator | np.random.RandomState):
            self._keep_generator(label, value)
            return []
        if isinstance(value, types.FunctionType):
            return self._keep_function(label, value)
        if isinstance(value, types.MethodType):
            return [(value.__self__, label), (value.__func__, label)]
        if isinstance(value, functools.partial):
            return [(value.func, label), (value.args, label), (value.keywords, label)]
        if isinstance(value, type):
            return self._keep_class(value)
        return self._keep_object(label, value)

    def _keep_entries(
        self,
        label: str,
        place: dict[Any, Any],
        entries: dict[Any, Any],
        counts: Callable[[Any], bool],
    ) -> None:
        """Entries of a dictionary; ``counts`` tells the keys that are compared."""

        def same() -> bool:
            for key, value in place.items():
                if counts(key) and not (key in entries and _same(entries[key], value)):
                    return False
            return all(key in place for key in entries)

        def put_back() -> None:
            for key in [key for key in place if counts(key) and key not in entries]:
                del place[key]
            place.update(entries)

        self._kept.append((label, same, put_back))

    def _keep_name(self, label: str, namespace: dict[str, Any], name: str) -> None:
        value = namespace[name]

        def same() -> bool:
            return name in namespace and _same(namespace[name], value)

        def put_back() -> None:
            namespace[name] = value

        self._kept.append((label, same, put_back))

    def _keep_sequence(self, label: str, value: Any) -> None:
        items = list(value)

        def same() -> bool:
            return len(value) == len(items) and all(map(_same, value, items))

        def put_back() -> None:
            value.clear()
            value.extend(items)

        self._kept.append((label, same, put_back))

    def _keep_set(self, label: str, value: set[Any]) -> None:
        items = set(value)

        def put_back() -> None:
            value.clear()
            value.update(items)

        self._kept.append((label, lambda: value == items, put_back))

    def _keep_array(self, label: str, value: Any) -> None:
        items = value.copy()

        def put_back() -> None:
            value[:] = items

        self._kept.append((label, lambda: bytes(value) == bytes(items), put_back))

    def _keep_generator(self, label: str, value: Any) -> None:
        old = isinstance(value, np.random.RandomState)

        def state() -> Any:
            return value.get_state() if old else value.bit_generator.state

        before = state()
        text = pickle.dumps(before)

        def put_back() -> None:
            if old:
                value.set_state(before)
            else:
                value.bit_generator.state = before

        self._kept.append((label, lambda: pickle.dumps(state()) == text, put_back))

    def _keep_function(self, label: str, value: types.FunctionType) -> list[tuple[Any, str]]:
        if known_code(value.__module__ or ""):
            return []
        label = value.__qualname__
        held = value.__dict__, value.__defaults__, value.__kwdefaults__
        found: list[tuple[Any, str]] = [(item, label) for item in held]
        names = value.__code__.co_freevars
        for name, cell in zip(names, value.__closure__ or (), strict=True):
            found.append((_content(cell), f"{label}.{name}"))
        return found

    def _keep_class(self, value: type) -> list[tuple[Any, str]]:
        if known_code(value.__module__):
            return []
        held = {k: v for k, v in vars(value).items() if not k.startswith("__")}

        def same() -> bool:
            now = {k for k in vars(value) if not k.startswith("__")}
            return now == held.keys() and all(_same(v, vars(value)[k]) for k, v in held.items())

        def put_back() -> None:
            for name in [k for k in vars(value) if not k.startswith("__") and k not in held]:
                delattr(value, name)
            for name, item in held.items():
                if not _same(item, vars(value).get(name)):
                    setattr(value, name, item)

        label = value.__name__
        self._kept.append((label, same, put_back))
        items = [(v, f"{label}.{k}") for k, v in held.items()]
        return [*items, *((base, base.__name__) for base in value.__bases__)]

    def _keep_object(self, label: str, value: Any) -> list[tuple[Any, str]]:
        kind = type(value)
        if known_code(kind.__module__):
            return []
        named = kind.__name__
        found: list[tuple[Any, str]] = [(kind, named)]
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self._keep_entries(named, attributes, dict(attributes), lambda _: True)
            found += [(v, f"{named}.{k}") for k, v in attributes.items()]
        slots = {
            name: descriptor
            for base in kind.__mro__
            for name, descriptor in vars(base).items()
            if isinstance(descriptor, types.MemberDescriptorType)
        }
        for name, slot in slots.items():
            found += self._keep_slot(f"{named}.{name}", value, slot)
        return found

    def _keep_slot(self, label: str, value: Any, slot: Any) -> list[tuple[Any, str]]:
        before = slot.__get__(value) if _filled(slot, value) else _EMPTY

        def same() -> bool:
            return _same(before, slot.__get__(value) if _filled(slot, value) else _EMPTY)

        def put_back() -> None:
            slot.__delete__(value) if before is _EMPTY else slot.__set__(value, before)

        self._kept.append((label, same, put_back))
        return [(before, label)]


_EMPTY = type(None)


def known_code(module: str) -> bool:
    """Whether a module of this name is of the language, torch, numpy or this package."""
    return module.partition(".")[0] in _KNOWN_CODE


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _SIMPLE) and a == b)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _filled(slot: Any, value: Any) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True
