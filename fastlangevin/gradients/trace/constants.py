"""Tensors that an energy computes from its weights and arguments alone, and not from the states."""

from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.gradients.trace.program import compiled
from fastlangevin.gradients.trace.split import Draft


class Constants:
    """Computes the tensors of some slots of a trace, which do not depend on the states."""

    def __init__(self, trace: Trace, slots: list[int]) -> None:
        self.slots = slots
        draft = Draft(trace, (), kept=tuple(slots))
        read = draft.once_reads(slots)
        self.leaves = {n: trace.leaves[n] for n in read if n in trace.leaves}
        self.arguments = {n: trace.arguments[n] for n in read if n in trace.arguments}
        self._compute = compiled([*self.leaves, *self.arguments], draft.once, slots, ())

    @torch.no_grad()
    def compute(self, model_kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the tensors for the current values of the leaves and these arguments."""
        arguments = [model_kwargs[name].detach() for name in self.arguments.values()]
        values: tuple[Tensor, ...] = self._compute(
            *[leaf.detach() for leaf in self.leaves.values()], *arguments
        )
        return values


class ComputedConstants:
    """Tensors of a trace, such as normalised weights, in memory of their own.

    ``targets`` maps their slots to this memory, which :meth:`refresh` writes to.
    """

    def __init__(self, trace: Trace, targets: dict[int, Tensor]) -> None:
        self._targets = list(targets.values())
        self._constants = Constants(trace, list(targets))
        self.leaves = list(self._constants.leaves.values())
        self.reads_arguments = bool(self._constants.arguments)

    def refresh(self) -> None:
        """Compute the tensors again from the current values of the leaves."""
        for target, value in zip(self._targets, self._constants.compute({}), strict=True):
            target.copy_(value)


class ReadNumbers:
    """Python numbers that a run read from tensors, by the slots of these."""

    def __init__(self, trace: Trace, numbers: dict[int, Any]) -> None:
        self._numbers = list(numbers.values())
        self._constants = Constants(trace, list(numbers))

    def hold(self, model_kwargs: dict[str, Any]) -> bool:
        """Return whether a run with these arguments would read the same numbers."""
        now = [value.item() for value in self._constants.compute(model_kwargs)]
        return now == self._numbers
