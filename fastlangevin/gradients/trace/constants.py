"""Tensors that an energy computes from its weights alone, such as normalised weights."""

from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.gradients.trace.program import compiled
from fastlangevin.gradients.trace.split import Draft


class ComputedConstants:
    """Tensors of a trace that do not depend on the states, in memory of their own.

    ``targets`` maps their slots to this memory, which :meth:`refresh` writes to.
    """

    def __init__(self, trace: Trace, targets: dict[int, Tensor]) -> None:
        self.targets = targets
        draft = Draft(trace, (), kept=tuple(targets))
        self._leaves = [n for n in draft.once_reads(targets) if n in trace.leaves]
        self.leaves = [trace.leaves[n] for n in self._leaves]
        self.reads_arguments = not trace.arguments.keys().isdisjoint(draft.once_reads(targets))
        self._compute = compiled(self._leaves, draft.once, targets, ())

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the tensors again from the current values of the leaves."""
        values = self._compute(*[leaf.detach() for leaf in self.leaves])
        for target, value in zip(self.targets.values(), values, strict=True):
            target.copy_(value)


class ReadNumbers:
    """Python numbers that a run read from tensors, by the slots of these."""

    def __init__(self, trace: Trace, numbers: dict[int, Any]) -> None:
        self.numbers = numbers
        values = {slot: trace.values[slot] for slot in numbers}
        self._constants = ComputedConstants(
            trace,
            {s: torch.empty(v.shape, dtype=v.dtype, device=v.device) for s, v in values.items()},
        )
        self.read_arguments = self._constants.reads_arguments

    def hold(self) -> bool:
        """Return whether the tensors have the same values now."""
        self._constants.refresh()
        now = [target.item() for target in self._constants.targets.values()]
        return now == list(self.numbers.values())
