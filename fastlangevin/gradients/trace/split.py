"""Splits a trace into what is computed once per chain and what is computed at every step."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastlangevin.gradients.trace.instructions import Instruction, Trace, Value

aten = torch.ops.aten

# Operators that read only the shape, dtype and device of their first argument, with the number
# that fills the result.
_FILLED: dict[Any, int] = {
    aten.ones_like.default: 1,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}


class Draft:
    """The instructions of a program while it is being made.

    ``once`` computes what does not depend on the states, ``added`` prepares it for the steps, as by
    packing weights, and ``each`` runs at every step and ends in ``results``. Slot 0 holds the
    states. ``kept``: constants that are computed in any case.
    """

    def __init__(self, trace: Trace, results: tuple[int, ...], kept: tuple[int, ...] = ()) -> None:
        self.values = dict(trace.values)
        self.results, self.kept = results, kept
        instructions = [self._without_shape_reads(i) for i in trace.instructions]
        moving = self._moving(instructions)
        self.once = [i for i in instructions if not self._touches(i, moving)]
        self.added: list[Instruction] = []
        self.each = [i for i in instructions if self._touches(i, moving)]
        self.each = self._live(self.each, results)
        self.prune()

    def prune(self) -> None:
        """Drop what no result needs."""
        self.each = self._live(self.each, self.results)
        self.added = self._live(self.added, self.constants())
        self.once = self._live(self.once, (*self.inputs(), *self.kept))

    def constants(self) -> list[int]:
        """Return the slots that the steps read and that are computed before them."""
        made = {0} | {n for instruction in self.each for n in instruction.written}
        read = [n for i in self.each for n in i.reads] + list(self.results)
        return [n for n in dict.fromkeys(read) if n not in made]

    def inputs(self) -> list[int]:
        """Return the slots that ``added`` and the steps read and that ``once`` or a leaf holds."""
        made = {n for instruction in self.added for n in instruction.written}
        read = [n for i in self.added for n in i.reads] + self.constants()
        return [n for n in dict.fromkeys(read) if n not in made]

    def once_reads(self, results: Iterable[int]) -> list[int]:
        """Return the slots that ``once`` and its results read."""
        return sorted({n for i in self.once for n in i.reads} | set(results))

    def new_slot(self, value: Value) -> int:
        """Return a new slot for a tensor of its own memory."""
        number = len(self.values)
        while number in self.values:
            number += 1
        self.values[number] = value._replace(storage=number)
        return number

    def last_reads(self) -> dict[int, int]:
        """Return, for each slot, the index of the last step instruction that reads it."""
        last = {n: k for k, i in enumerate(self.each) for n in (*i.written, *i.reads)}
        return last | {n: len(self.each) for n in self.results}

    def readers(self) -> dict[int, list[int]]:
        """Return, for each slot that is read, the indices of the step instructions that read it."""
        readers: dict[int, list[int]] = {}
        for k, instruction in enumerate(self.each):
            for n in dict.fromkeys(instruction.reads):
                readers.setdefault(n, []).append(k)
        return readers

    def _without_shape_reads(self, instruction: Instruction) -> Instruction:
        fill = _FILLED.get(instruction.op)
        (number, *_) = instruction.outputs
        if fill is None or number is None:
            return instruction
        value = self.values[number]
        return Instruction(
            aten.full.default,
            (list(value.shape), fill),
            {"dtype": value.dtype, "device": value.device, "layout": torch.strided},
            (number,),
            True,
        )

    def _storages(self, numbers: Iterable[int]) -> set[int]:
        return {self.values[n].storage for n in numbers}

    def _touches(self, instruction: Instruction, storages: set[int]) -> bool:
        return bool(storages & self._storages((*instruction.reads, *instruction.written)))

    def _moving(self, instructions: Sequence[Instruction]) -> set[int]:
        """Return the memory whose content depends on the states, or on the order of steps."""
        moving = {self.values[0].storage}
        while True:
            size, read = len(moving), set[int]()
            for instruction in instructions:
                if self._touches(instruction, moving):
                    moving |= self._storages(instruction.written)
                    moving |= self._storages(instruction.writes)
                    read |= self._storages(instruction.reads)
                else:
                    # Changed after a step has read it, so its value is not the final one.
                    moving |= self._storages(instruction.writes) & read
            if len(moving) == size:
                return moving

    def _live(
        self, instructions: Sequence[Instruction], results: Iterable[int]
    ) -> list[Instruction]:
        needed = set(results)
        storages = self._storages(needed)
        live = []
        for instruction in reversed(instructions):
            if needed.isdisjoint(instruction.written) and storages.isdisjoint(
                self._storages(instruction.writes)
            ):
                continue
            live.append(instruction)
            needed.update(instruction.reads)
            storages |= self._storages(instruction.reads)
        return live[::-1]
