"""Watches what a run of an energy does apart from its tensor operators.

The recorder sees the operators. This module sees the rest: values that leave tensors (``item``,
DLPack, storages), Python code that keeps or reads state of its own (globals, attributes, clocks,
files), and calls of C extensions, whose effects cannot be seen. Each is refused before it happens
if possible, and state that has changed is restored.
"""

import contextlib
import dis
import os
import pickle
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typing_extensions
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastlangevin.gradients.graph.snapshot import Snapshot
from fastlangevin.kernels.memory import tensors_in

Refuse = Callable[[str], Exception]  # notes the reason and returns the error to raise

# What torch's functions may return: tensors, and values that depend only on a tensor's shape.
_PLAIN = (Tensor, type(None), torch.Size, torch.dtype, torch.device, torch.layout)
_METADATA = frozenset((
    "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "stride",
    "storage_offset", "element_size", "itemsize", "nbytes", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference",
    "is_same_size", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested",
    "is_meta", "is_mps", "is_xla", "is_leaf", "requires_grad", "retains_grad", "get_device",
    "type", "names", "has_names", "__hash__", "is_tensor", "is_storage", "can_cast",
    "register_hook",
))  # fmt: skip
# Refused before they run, because the memory that they return could be written to.
_READS = frozenset((
    "as_subclass",
    "tolist", "numpy", "__array__", "item", "__float__", "__int__", "__bool__", "__index__",
    "__complex__", "__contains__", "__dlpack__", "data_ptr", "untyped_storage", "storage",
    "_typed_storage", "__reduce_ex__", "__cuda_array_interface__", "__repr__", "__format__",
    "grad_fn", "_version", "equal", "allclose", "is_nonzero",
))  # fmt: skip
# Reads of one number, by an operator.
_NUMBERS = frozenset(("item", "__float__", "__int__", "__bool__", "__index__", "is_nonzero"))
# Functions that copy the values of a tensor to another one without an operator that shows it.
_COPIES = frozenset((
    "__deepcopy__", "__setstate__", "set_", "new", "tensor", "as_tensor", "asarray",
    "scalar_tensor", "new_tensor",
))  # fmt: skip
# Builtins whose results differ from call to call, or that have effects outside the process.
_IMPURE = frozenset((
    "open", "input", "print", "id", "exec", "eval", "compile", "breakpoint", "memoryview",
))  # fmt: skip
_PURE = frozenset((
    "math", "cmath", "operator", "_operator", "_functools", "itertools", "_collections",
    "collections", "_abc", "typing", "_typing", "types", "enum", "re", "_sre", "_struct",
    "abc", "contextlib", "copy", "dataclasses", "functools", "inspect", "numbers",
    "copyreg", "collections.abc", "reprlib",
))  # fmt: skip


class Values(TorchFunctionMode):
    """Refuses functions that turn tensors into Python numbers or memory.

    ``reads_state`` tells whether a tensor is computed from the states of the run, and
    ``note_hook`` is called when a tensor gets a hook.
    """

    def __init__(
        self,
        refuse: Refuse,
        reads_state: Callable[[Tensor], bool],
        note_hook: Callable[[], None],
    ) -> None:
        super().__init__()
        self.note_hook = note_hook
        self.refuse, self.reads_state = refuse, reads_state
        self.copied = False  # whether values were copied without an operator that shows it
        self.passed: set[int] = set()  # ids of all tensors that a function was given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.passed.update(map(id, tensors_in((args, kwargs))))
        name = func.__name__
        if name in ("__get__", "__set__", "__delete__"):  # of a property, such as shape
            name, access = func.__self__.__name__, name
            if access != "__get__" and name != "requires_grad":
                raise self.refuse(f"it sets {name} of a tensor")
        if name in _COPIES:
            tensors = list(tensors_in((args, kwargs)))
            if any(map(self.reads_state, tensors)):
                raise self.refuse(f"it copies values through {name}()")
            self.copied |= bool(tensors)
        if name in _NUMBERS and not any(map(self.reads_state, tensors_in(args))):
            return func(*args, **kwargs)  # the tracer sees the number
        if name in _READS:
            raise self.refuse(f"it reads values through {name}()")
        if name == "register_hook":
            self.note_hook()
        result = func(*args, **kwargs)
        if name not in _METADATA and not _is_plain(result):
            raise self.refuse(f"it reads values through {name}()")
        return result


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


class Watch:
    """A context that follows the Python code of a run and raises refusals as they occur.

    Code of torch and of this package is trusted. All other Python functions are followed: the
    globals, closures and classes that they name go into the :class:`Snapshot`, and any C function
    that they call must be known to depend on its arguments only.
    """

    def __init__(self, snapshot: Snapshot, refuse: Refuse) -> None:
        self.snapshot, self.refuse = snapshot, refuse
        self._followed: dict[types.CodeType, bool] = {}
        # What the run can write: attributes of these names, these containers, or any item.
        self.stored_names: set[str] = set()
        self.containers: set[int] = set()
        self.stores_any_name = self.stores_items = False
        self.names: set[str] = set()  # all names that the code uses
        self.reads_unsaved = False  # whether code read variables that the snapshot does not hold
        # The frame of an import that torch delays until now.
        self._import: types.FrameType | None = None
        self._before: Any = None  # the profiler, and numpy's random state, before the run
        self._numpy: Any = None

    def __enter__(self) -> "Watch":
        self._before = sys.getprofile()
        if self._before is not None and not isinstance(self._before, types.FunctionType):
            # A profiler written in C cannot be restored on Python 3.10 and 3.11.
            raise self.refuse("a profiler is running, and recording needs the profiler's hook")
        self._numpy = np.random.get_state()  # noqa: NPY002 - its methods are invisible to the hook
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(self._before)
        if pickle.dumps(np.random.get_state()) != pickle.dumps(self._numpy):  # noqa: NPY002
            np.random.set_state(self._numpy)  # noqa: NPY002
            self.refuse("it draws random numbers outside torch")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop following code for the duration of the context."""
        before = sys.getprofile()
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if self._import is not None:
            if event == "return" and frame is self._import:
                self._import = None
        elif event == "call":
            if frame.f_code not in self._followed:
                self._enter(frame)
        elif event == "c_call" and self._followed.get(frame.f_code, False):
            self._check_call(arg)

    def _enter(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib"):
            if self._called_by_others(frame):
                raise self.refuse("it imports a module while it runs")
            self._import = frame
            return
        if code in _MAKERS:
            raise self.refuse("it makes a parameter, which no operator shows")
        if code.co_filename.startswith(_TRUSTED):
            self._followed[code] = False
            return
        if _is_library(code):
            # The standard library is trusted when torch calls it, and parts of it always.
            home = str(frame.f_globals.get("__name__"))
            if home not in _PURE and self._called_by_others(frame):
                raise self.refuse(f"it calls {home}.{code.co_name}, which torch does not see")
            return
        self._followed[code] = True
        name = getattr(code, "co_qualname", code.co_name)
        self.names.update(code.co_names, code.co_freevars)
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
                self.stored_names.add(str(instruction.argval))
            elif (
                instruction.opname in _ITEM_STORES
                or instruction.opname.startswith("INPLACE_")
                or (instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("="))
            ):
                self.stores_items = True
            stores = instruction.opname in ("STORE_DEREF", "DELETE_DEREF")
            if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
                stores and instruction.argval in code.co_freevars
            ):
                raise self.refuse(
                    f"{name} sets the variable {instruction.argval} of an outer scope"
                )
        label = str(frame.f_globals.get("__name__"))
        self.snapshot.add_names(frame.f_globals, code.co_names, label)
        if code.co_freevars:
            values = frame.f_locals
            for variable in code.co_freevars:
                if not self._is_local(frame, variable):
                    self.snapshot.add(values.get(variable), variable)
                    self.reads_unsaved |= code not in self.snapshot.codes
        if self.snapshot.unknown is not None:
            raise self.refuse(self.snapshot.unknown)
        # Before the function runs: what it does to such state could not be undone.
        for used in self.names.intersection(self.snapshot.opaque):
            raise self.refuse(self.snapshot.opaque[used])

    def changed(self) -> str | None:
        """Return why the run is not a function of its arguments, as far as state can tell."""
        changed = self.snapshot.changed()
        return None if changed is None else f"a run of it changes {changed}"

    def restore(self) -> None:
        """Restore the state that the run has written, and no other thread's."""
        # A draw is no call that a profile function sees.
        self.containers.update(
            owner for name, owner in self.snapshot.generators.items() if name in self.names
        )
        self.snapshot.restore(
            lambda name: self.stores_any_name or name in self.stored_names,
            lambda owner: self.stores_items or owner in self.containers,
        )

    def _is_local(self, frame: types.FrameType, variable: str) -> bool:
        """Return whether a closure's variable belongs to a function of this run on the stack."""
        caller = frame.f_back
        while caller is not None:
            if variable in caller.f_code.co_cellvars:
                return self._followed.get(caller.f_code, False)
            caller = caller.f_back
        return False

    def _called_by_others(self, frame: types.FrameType) -> bool:
        """Return whether code that is followed has called this standard library function."""
        caller = frame.f_back
        while caller is not None and (
            _is_library(caller.f_code) or caller.f_code.co_filename.startswith("<frozen ")
        ):
            caller = caller.f_back
        return caller is not None and self._followed.get(caller.f_code, False)

    def _check_call(self, function: Any) -> None:
        name, home, free = function.__name__, *_home(function)
        self.containers.add(id(function.__self__))
        if name in ("setattr", "delattr", "__setattr__", "__delattr__", "__setstate__"):
            self.stores_any_name = True
        if home == "builtins":
            allowed = not (free and name in _IMPURE)
            self.reads_unsaved |= free and name == "globals"
        elif home.partition(".")[0] == "torch" or isinstance(function.__self__, Tensor):
            allowed = "dlpack" not in name and "subclass" not in name
        elif home.partition(".")[0] == "numpy":
            allowed = not home.startswith("numpy.random") and "from" not in name
        else:
            allowed = home in _PURE
        if not allowed:
            raise self.refuse(f"it calls {home}.{name}, which torch does not see")


# They give the memory of a tensor to a new one.
_MAKERS = frozenset(kind.__new__.__code__ for kind in (torch.nn.Parameter, torch.nn.Buffer))
_ITEM_STORES = frozenset(("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"))
_TRUSTED = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(np.__file__) + os.sep,
    str(Path(__file__).parents[2]) + os.sep,
    # Until Python 3.12, it replaces a function of typing, which torch calls in its backward pass.
    typing_extensions.__file__,
    "<frozen ",
)
_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep


def _is_library(code: types.CodeType) -> bool:
    return code.co_filename.startswith(_LIBRARY) and "-packages" not in code.co_filename


def _home(function: Any) -> tuple[str, bool]:
    """Return the module of a C function, and whether it is a function and not a method."""
    owner = function.__self__
    if owner is None or isinstance(owner, types.ModuleType):
        name = function.__module__ or (owner.__name__ if owner is not None else "")
        return name, True
    kind = owner if isinstance(owner, type) else type(owner)
    return kind.__module__, False
