"""The dispatch mode that records every operator of a run, also those of its backward pass."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.gradients.dispatch_mode import DispatchMode
from fastlangevin.gradients.graph.watch import Watch
from fastlangevin.gradients.trace.instructions import Instruction, Slot, Trace, Value, mapped
from fastlangevin.kernels.memory import tensors_in

# They change running statistics that they do not declare as changed.
_BATCH_NORMS = (
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_impl_index",
)
_DATA_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


_CHANGED = object()


class Tracer(DispatchMode):
    """Records operators and refuses those that a replay could not repeat.

    ``leaf``: the states [n, ...] of the run. ``refuse`` notes a reason and returns the error to
    raise. ``observe`` is called with (operator, args, kwargs, output) after each operator. Nothing
    is kept alive that the run itself frees.
    """

    def __init__(self, leaf: Tensor, refuse: Callable[[str], Exception]) -> None:
        super().__init__()
        self.refuse = refuse
        self.watch: Watch | None = None
        self.observe: Callable[..., None] | None = None
        self.instructions: list[Instruction] = []
        self.values: dict[int, Value] = {}
        self.leaves: dict[int, Tensor] = {}
        # Python numbers that the run read from tensors that do not depend on the states, by slot.
        self.numbers: dict[int, Any] = {}
        self.meets_state = False  # whether the run reads the memory of the states by another tensor
        self.keeps_values = False  # whether it keeps tensors that are computed from the states
        self._slots: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id
        self._storages: dict[int, int] = {}  # by address, of the tensors that existed before
        self._count = 0
        # Memory whose content depends on the states.
        self._moving = {self.values[self._place(leaf, self._storage_of(leaf))].storage}

    def reads_state(self, tensor: Tensor) -> bool:
        """Return whether a tensor is computed from the states."""
        return self._is_moving(self._entry(tensor))

    def _is_moving(self, slot: int | None) -> bool:
        return slot is not None and self.values[slot].storage in self._moving

    def trace(self, energies: Tensor, grad: Tensor) -> Trace:
        """Return the finished trace, which ends in these two tensors."""
        numbers = [self.slot_of(tensor) for tensor in (energies, grad)]
        return Trace(tuple(self.instructions), self.values, self.leaves, numbers[0], numbers[1])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # The modes that watch the energy's code must not see the code of this class.
        paused = contextlib.nullcontext() if self.watch is None else self.watch.paused()
        with paused, torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if _draws(func, args, kwargs):
            raise self.refuse(f"{name} draws random numbers")
        if name == "_local_scalar_dense" and not self.reads_state(args[0]):
            number, slot = func(*args, **kwargs), self.slot_of(args[0])
            # A tensor that changed between two reads has no number that could be compared later.
            same = self.numbers.setdefault(slot, number) == number
            self.numbers[slot] = number if same else _CHANGED
            return number
        if name in ("_local_scalar_dense", "equal") or self._chooses_by_value(func, args):
            raise self.refuse(f"{name} reads a tensor's value into Python")
        writes = self._writes(func, name, args, kwargs)
        recorded_args = mapped(args, self._recorded)
        recorded_kwargs = mapped(kwargs, self._recorded)
        inputs = list(tensors_in((args, kwargs)))
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        numbers = tuple(
            self._output(tensor, inputs) if isinstance(tensor, Tensor) else None for tensor in outs
        )
        instruction = Instruction(
            func, recorded_args, recorded_kwargs, numbers, outs is not out, writes
        )
        self.instructions.append(instruction)
        if any(map(self._is_moving, instruction.reads)):
            changed = (*instruction.written, *writes)
            self._moving.update(self.values[slot].storage for slot in changed)
        if self.observe is not None:
            self.observe(func, args, kwargs, out)
        return out

    def _writes(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, ...]:
        """Return the slots that an operator changes; refuse to change what was there before."""
        if name in _BATCH_NORMS and len(args) > 5 and args[3] is not None and args[5]:
            raise self.refuse(f"{name} changes running statistics")
        if not func._schema.is_mutable:
            return ()
        numbers = []
        for k, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            passed = args[k] if k < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in(passed):
                number = self.slot_of(tensor)
                storage = self.values[number].storage
                if storage == 0 or any(self.values[n].storage == storage for n in self.leaves):
                    raise self.refuse(f"{name} changes a tensor in place")
                numbers.append(number)
        return tuple(numbers)

    def _chooses_by_value(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Return whether the shape of an operator's result depends on values."""
        if not any(tag in func.tags for tag in _DATA_TAGS):
            return False
        masks = (torch.bool, torch.uint8)
        by_numbers = all(index.dtype not in masks for index in tensors_in(args[1:]))
        return not (func is torch.ops.aten.index.Tensor and by_numbers)

    def _recorded(self, argument: Any) -> Any:
        return Slot(self.slot_of(argument)) if isinstance(argument, Tensor) else argument

    def slot_of(self, tensor: Tensor) -> int:
        """Return the slot of a tensor; one that is not known yet existed before the run."""
        number = self._entry(tensor)
        if number is not None:
            return number
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise self.refuse(f"it reads a {type(tensor).__name__} of layout {tensor.layout}")
        number = self._place(tensor, self._storage_of(tensor))
        self.leaves[number] = tensor
        self.meets_state = self.meets_state or self.values[number].storage == 0
        return number

    def replaces(self, before: Tensor, now: Tensor, was_passed: bool) -> bool:
        """Return whether the run made a tensor to keep in place of another that it did not read.

        ``was_passed`` is whether the other one was given to a function, be it one of its shape. In
        a chain, the next step finds a tensor of another shape, or with another ``grad``, if the
        tensor depends on the states. ``keeps_values`` tells afterwards whether one does.
        """
        made = self._entry(now)
        moving = self._is_moving(made)
        if made is None or self._entry(before) is not None or (moving and was_passed):
            return False
        self.keeps_values |= moving
        return True

    def _entry(self, tensor: Tensor) -> int | None:
        """Return the slot of a tensor of the run, or None for another tensor."""
        entry = self._slots.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def sharing(self, slot: int) -> list[int]:
        """Return the slots of the tensors that have the memory of a slot's tensor."""
        storage = self.values[slot].storage
        return [number for number, value in self.values.items() if value.storage == storage]

    def _output(self, tensor: Tensor, inputs: list[Tensor]) -> int:
        number = self._entry(tensor)
        if number is not None:
            return number  # an operator in place returns its argument
        address = tensor.untyped_storage().data_ptr()
        storage = self._count
        for other in inputs:
            if address and other.untyped_storage().data_ptr() == address:
                storage = self.values[self.slot_of(other)].storage
        return self._place(tensor, storage)

    def _storage_of(self, tensor: Tensor) -> int:
        """Return the number of the memory of a tensor that existed before the run."""
        return self._storages.setdefault(tensor.untyped_storage().data_ptr(), self._count)

    def _place(self, tensor: Tensor, storage: int) -> int:
        number = self._count
        self._count += 1
        self._slots[id(tensor)] = weakref.ref(tensor), number
        self.values[number] = Value(tuple(tensor.shape), tensor.dtype, tensor.device, storage)
        return number


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operator draws random numbers, unlike attention without a dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    k = names.index("dropout_p")
    return bool((args[k] if k < len(args) else kwargs.get("dropout_p", 0.0)) != 0)
