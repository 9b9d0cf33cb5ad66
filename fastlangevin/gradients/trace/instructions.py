"""A run of an energy and of its backward pass as a list of operators."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among the arguments of an instruction."""

    number: int


@dataclass(frozen=True)
class Instruction:
    """One operator. ``outputs`` are slot numbers, with None for outputs that are not tensors."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int | None, ...]
    single: bool  # whether the operator returns a tensor, and not a tuple or list
    writes: tuple[int, ...] = ()  # slots that it changes in place

    @functools.cached_property
    def reads(self) -> tuple[int, ...]:
        return tuple(slot.number for slot in slots_in((self.args, self.kwargs)))

    @property
    def written(self) -> list[int]:
        return [number for number in self.outputs if number is not None]


class Value(NamedTuple):
    """What is known of the tensor in a slot. Views of one tensor have the same ``storage``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storage: int


@dataclass(frozen=True)
class Trace:
    """The operators of one run, from the states in slot 0 to the energies and their gradient."""

    instructions: tuple[Instruction, ...]
    values: dict[int, Value]
    leaves: dict[int, Tensor]  # tensors that existed before the run, by slot, without the states
    energies: int
    grad: int
    is_autocast: bool = False  # whether the run was under autocast
    arguments: dict[int, str] = field(default_factory=dict)  # keyword arguments, by slot

    def with_arguments(self, model_kwargs: dict[str, Any]) -> "Trace":
        """Return the trace with the leaves that are keyword arguments known by name instead."""
        names = {id(value): name for name, value in model_kwargs.items()}
        arguments = {n: names[id(leaf)] for n, leaf in self.leaves.items() if id(leaf) in names}
        leaves = {n: leaf for n, leaf in self.leaves.items() if n not in arguments}
        return replace(self, leaves=leaves, arguments=arguments)


def slots_in(arguments: Any) -> Iterator[Slot]:
    """Yield the slots in a structure of tuples, lists and dictionaries."""
    if isinstance(arguments, Slot):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for item in arguments:
            yield from slots_in(item)
    elif isinstance(arguments, dict):
        yield from slots_in(tuple(arguments.values()))


def mapped(arguments: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a structure of tuples, lists and dictionaries with every other item converted."""
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(mapped(item, convert) for item in arguments)
    if isinstance(arguments, dict):
        return {key: mapped(item, convert) for key, item in arguments.items()}
    return convert(arguments)


def renamed(instruction: Instruction, names: dict[int, int]) -> Instruction:
    """Return an instruction that reads other slots, those that ``names`` maps its slots to."""

    def rename(argument: Any) -> Any:
        if isinstance(argument, Slot):
            return Slot(names.get(argument.number, argument.number))
        return argument

    args, kwargs = mapped(instruction.args, rename), mapped(instruction.kwargs, rename)
    return replace(instruction, args=args, kwargs=kwargs)
