"""Finds the state, other than tensors, that a run of an energy may read or change.

Other threads may change the same objects during the run. So only what the run itself was seen to
write is restored: attributes by their names, and containers that it changed.

Modules, objects and containers are walked breadth first from what the run can reach. Their number
is limited, so that a module which refers to a whole trainer does not make the walk long.
"""

import builtins
import collections
import functools
import io
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlangevin.gradients.graph import saved
from fastlangevin.gradients.packing import PackedEnergy

# The most containers and objects that are saved, those nearest to the energy first.
_MOST = 5000
# The most items of one container that the walk enters; all of its items are compared.
_WIDTH = 256
_LARGE = 2**20  # bytes of an array that is compared; copies of larger ones would be slow
# Modules whose objects hold state that is not compared.
_OPAQUE = frozenset(("array", "ctypes", "_ctypes", "mmap"))
_ATOMS = (*saved.SIMPLE, Tensor, torch.dtype, torch.device, torch.Size, types.ModuleType)
# The tables of every module that hold hooks and names, and no state.
_TABLES = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers", "_modules", "training"}
_TRUSTED_CODE = frozenset(("builtins", "torch", "numpy", "fastlangevin"))


class Snapshot:
    """Everything that :meth:`add` reached, with its state at that time."""

    def __init__(self) -> None:
        self.unknown: str | None = None  # why state cannot be compared, if so
        self._seen: dict[int, Any] = {}  # by id; keeps the objects, and so their ids, alive
        self.tensors: dict[int, Tensor] = {}  # by id, all tensors that were reached
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []  # of modules
        self._overwritten: set[tuple[int, Any]] = set()  # by the attributes' id, and name
        self.hides = False  # whether something reached holds state that is not compared
        self.codes: set[types.CodeType] = set()  # of the functions whose closures are saved
        self._names: set[tuple[int, str]] = set()
        self._saved: list[saved.Saved] = []
        # By name, attributes and variables whose state cannot be compared, and why not.
        self.opaque: dict[str, str] = {}
        self.generators: dict[str, int] = {}  # ids of NumPy's generators, by name

    def add(self, value: Any, label: str) -> None:
        """Save the state of a value and of all that it refers to, unless it is already saved."""
        waiting = collections.deque([(value, label, 0)])
        while waiting and len(self._saved) < _MOST:
            value, label, depth = waiting.popleft()
            if isinstance(value, _ATOMS):
                if isinstance(value, Tensor):
                    self.tensors[id(value)] = value
                elif isinstance(value, types.ModuleType) and not _is_known(value.__name__):
                    self.hides = True
                continue
            if isinstance(value, io.IOBase):
                continue  # reading and writing it are calls that a run may not make
            if isinstance(value, Iterator):
                reason = f"{label} is an iterator, whose position cannot be compared"
                self.opaque[label.rpartition(".")[2]] = reason
                if depth < 2 and self.unknown is None:
                    self.unknown = reason
            if type(value).__module__ in _OPAQUE:
                kind = type(value).__name__
                self.opaque[label.rpartition(".")[2]] = (
                    f"{label} is a {kind}, whose state cannot be compared"
                )
                continue
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            self.hides |= _hides(value)
            waiting.extend((item, name, depth + 1) for item, name in self._save(value, label))

    def add_names(self, namespace: dict[str, Any], names: Iterable[str], label: str) -> None:
        """Save those entries of a namespace that have one of the names."""
        for name in names:
            if (id(namespace), name) in self._names:
                continue
            if name not in namespace:
                if hasattr(builtins, name):
                    self._names.add((id(namespace), name))
                    self._saved.append(saved.absence(f"{label}.{name}", namespace, name))
                continue
            self._names.add((id(namespace), name))
            self._seen[id(namespace)] = namespace
            value = namespace[name]
            if isinstance(value, types.ModuleType):
                if not is_trusted(value.__name__):
                    self.add_names(vars(value), names, value.__name__)
                continue
            self._saved.append(saved.variable(f"{label}.{name}", namespace, name))
            self.add(value, f"{label}.{name}")

    @property
    def is_complete(self) -> bool:
        """Return whether everything that was reached is saved, and can be compared."""
        known = self.unknown is None and not self.opaque and not self.hides
        return known and len(self._saved) < _MOST

    @property
    def modules(self) -> list[nn.Module]:
        """Return the modules that were reached."""
        return [value for value in self._seen.values() if isinstance(value, nn.Module)]

    def changed(self) -> str | None:
        """Return the name of something that has changed, or None."""
        return next((state.label for state in self._saved if not state.same()), None)

    def put_back_tensors(self, may_change: Callable[[Tensor, Tensor], bool]) -> None:
        """Restore tensors that attributes of modules held, where ``may_change(before, now)``.

        From then on only the layout of these attributes is compared: a run writes them before it
        reads them.
        """
        for attributes, entries in self._attributes:
            for name, before in entries.items():
                now = attributes.get(name)
                if now is before or not (isinstance(before, Tensor) and isinstance(now, Tensor)):
                    continue
                if may_change(before, now):
                    attributes[name] = before
                    self._overwritten.add((id(attributes), name))

    def restore(self, names: Callable[[Any], bool], containers: Callable[[int], bool]) -> None:
        """Restore what has changed, of attributes with such names and containers with such ids."""
        for state in self._saved:
            if (state.container is None or containers(state.container)) and not state.same():
                state.put_back(names)

    def _save(self, value: Any, label: str) -> list[tuple[Any, str]]:
        """Save one object, and return the objects that it refers to, with their names."""
        if isinstance(value, nn.Module):
            named = type(value).__name__
            reached = {k: v for k, v in value.__dict__.items() if k not in _TABLES}
            self._attributes.append((value.__dict__, dict(reached)))
            self._saved += [
                saved.kind(named, value),
                saved.attributes(
                    named, value.__dict__, lambda name: name not in _TABLES, self._overwritten
                ),
            ]
            # Setting an attribute may write to these tables, whose entries are attributes too.
            for table in ("_parameters", "_buffers", "_modules"):
                entries = reached.pop(table, {})
                self._saved.append(saved.attributes(named, entries))
                reached |= entries
            return [(type(value), named), *((v, f"{named}.{k}") for k, v in reached.items())]
        if isinstance(value, dict):
            self._saved.append(saved.mapping(label, value))
            items = [*list(value.values())[:_WIDTH], *list(value)[:_WIDTH]]
            return [*((item, label) for item in items), *self._attributes_of(label, value)]
        if isinstance(value, list | collections.deque | set):
            save = saved.items_of_set if isinstance(value, set) else saved.sequence
            self._saved.append(save(label, value))
            items = list(value)[:_WIDTH]
            return [*((item, label) for item in items), *self._attributes_of(label, value)]
        if isinstance(value, tuple | frozenset):
            kind = type(value)
            return [(kind, kind.__name__), *((item, label) for item in list(value)[:_WIDTH])]
        if isinstance(value, np.ndarray | bytearray):
            if (value.nbytes if isinstance(value, np.ndarray) else len(value)) > _LARGE:
                self.opaque[label.rpartition(".")[2]] = f"{label} is an array too large to compare"
            else:
                self._saved.append(saved.array(label, value))
            return []
        if isinstance(value, np.random.Generator | np.random.RandomState):
            self.generators[label.rpartition(".")[2]] = id(value)
            self._saved.append(saved.generator(label, value))
            return []
        if isinstance(value, types.FunctionType):
            return self._save_function(value)
        if isinstance(value, types.MethodType):
            return [(value.__self__, label), (value.__func__, label)]
        if isinstance(value, functools.partial):
            return [(value.func, label), (value.args, label), (value.keywords, label)]
        if isinstance(value, type):
            return self._save_class(value)
        if isinstance(value, PackedEnergy):
            return [(value.func, label)]
        return self._save_object(value)

    def _attributes_of(self, label: str, value: Any) -> list[tuple[Any, str]]:
        """Save the kind and the attributes of an object."""
        kind = type(value)
        self._saved.append(saved.kind(label, value))
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is not dict:
            return [(kind, kind.__name__)]
        self._saved.append(saved.attributes(label, attributes))
        return [(kind, kind.__name__), *((v, f"{label}.{k}") for k, v in attributes.items())]

    def _save_function(self, value: types.FunctionType) -> list[tuple[Any, str]]:
        if is_trusted(value.__module__ or ""):
            return []
        label = value.__qualname__
        self.codes.add(value.__code__)
        referred = self._attributes_of(label, value)
        referred += [(value.__defaults__, label), (value.__kwdefaults__, label)]
        names = value.__code__.co_freevars
        for name, cell in zip(names, value.__closure__ or (), strict=True):
            referred.append((saved.cell_content(cell), f"{label}.{name}"))
        self._saved.append(saved.function(label, value))
        return referred

    def _save_class(self, value: type) -> list[tuple[Any, str]]:
        if is_trusted(value.__module__):
            return []
        self._saved.append(saved.class_(value))
        label, attributes = value.__name__, saved.compared_attributes(value)
        items = [(part, f"{label}.{k}") for k, v in attributes.items() for part in _functions_of(v)]
        kinds = (type(value), *value.__bases__)
        return [*items, *((kind, kind.__name__) for kind in kinds)]

    def _save_object(self, value: Any) -> list[tuple[Any, str]]:
        kind = type(value)
        if is_trusted(kind.__module__):
            return []
        named = kind.__name__
        referred = self._attributes_of(named, value)
        slots = {
            name: descriptor
            for base in kind.__mro__
            for name, descriptor in vars(base).items()
            if isinstance(descriptor, types.MemberDescriptorType)
        }
        for name, slot in slots.items():
            self._saved.append(saved.slot(f"{named}.{name}", value, slot))
            referred.append((saved.slot_content(value, slot), f"{named}.{name}"))
        return referred


def is_trusted(module: str) -> bool:
    """Return whether a module belongs to the builtins, torch, numpy or this package."""
    return module.partition(".")[0] in _TRUSTED_CODE


def _is_known(module: str) -> bool:
    """Return whether a module is trusted, or of the standard library, which energies do not set."""
    return is_trusted(module) or module.partition(".")[0] in sys.stdlib_module_names


def _hides(value: Any) -> bool:
    """Return whether an object holds state that is not compared."""
    if isinstance(value, (functools._lru_cache_wrapper, threading.local, weakref.ref)):
        return True
    if isinstance(value, types.MappingProxyType):
        return True
    if isinstance(value, (dict, list, set, tuple, frozenset, collections.deque)):
        return len(value) > _WIDTH
    if isinstance(value, np.ndarray):
        return bool(value.dtype.hasobject)
    if isinstance(value, (nn.Module, type, PackedEnergy, np.generic, np.dtype, *_CALLABLES)):
        return False
    # Of torch, NumPy and this package; they are not walked.
    return is_trusted(type(value).__module__) and type(value).__module__ != "builtins"


# A ScriptFunction is compiled, and refers to no variable that could change. A traced one may hold
# tensors; the run reads them, and their versions are compared.
_CALLABLES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    np.ufunc,
    torch.jit.ScriptFunction,
)


def _functions_of(value: Any) -> list[Any]:
    """Return the functions behind a method or a property, or the value itself."""
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [part for part in (value.fget, value.fset, value.fdel) if part is not None]
    return [value]
