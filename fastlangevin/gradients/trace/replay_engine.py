"""The explicit engine for networks of any operators: it replays a trace, without autograd.

What does not depend on the states is computed once per chain: normalised weights, embeddings of
labels, an encoded observation, and the gradient of everything linear at the network's end.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.precision import network_precision
from fastlangevin.gradients.trace.constants import Constants
from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.gradients.trace.program import Program, preparation
from fastlangevin.kernels.memory import versions


class ReplayGradient:
    """Energies and d energy / d x of the batches of one call, by replaying a trace.

    The constants are computed by :meth:`begin` from the current weights and from the call's keyword
    arguments, and again by a call if a version counter or an address shows that one has changed.
    ``is_kept`` is whether later calls may replay the same trace.
    """

    def __init__(
        self,
        trace: Trace,
        programs: "Programs",
        model_kwargs: dict[str, Any],
        precision: str | None,
        is_kept: bool = True,
    ) -> None:
        self.trace, self.precision, self.is_kept = trace, precision, is_kept
        self._programs = programs
        self._model_kwargs = model_kwargs
        self._watched = list(trace.leaves.values())
        self._inputs: dict[int, Tensor] = {}  # what the energy computes without the states
        self._constants: dict[bool, list[Tensor]] = {}  # by whether the step wants energies
        self._fixed: FixedInputs | None = None
        self._seen: list[tuple[int, int]] = []
        self._dtype = trace.values[0].dtype

    def begin(self) -> None:
        """Forget the constants."""
        self._seen, self._inputs, self._constants = versions(self._watched), {}, {}

    def recordable(self) -> "ReplayGradient":
        """Return an engine whose steps read the same memory in every chain, for a CUDA graph.

        Its chains start with :meth:`begin_with` in place of :meth:`begin`.
        """
        engine = ReplayGradient(self.trace, self._programs, {}, self.precision)
        engine._fixed = FixedInputs(self.trace.values[0].device)
        return engine

    def begin_with(self, call: "ReplayGradient") -> None:
        """Write the inputs for the arguments of a call's engine, and for the weights of now."""
        assert self._fixed is not None
        self.begin()
        with torch.no_grad(), network_precision(self.precision, self._fixed.device):
            self._inputs = self._fixed.write(self._programs.inputs(call._model_kwargs))

    def forget_constants(self) -> None:
        """Let the next step compute its constants from the inputs again."""
        self._constants = {}

    def buffers(self) -> list[Tensor]:
        """Return the fixed memory that the steps read. A number in it has moved if it changed."""
        assert self._fixed is not None
        return list(self._fixed.tensors.values())

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n] or None, d energy / d x in x's shape and dtype)."""
        if not x.shape[0]:
            return (x.new_zeros(0) if want_energies else None), torch.zeros_like(x)
        if self._seen != versions(self._watched):
            self.begin()
        program = self._programs.of(want_energies)
        with torch.no_grad(), network_precision(self.precision, x.device):
            if not self._constants:
                self._inputs = self._inputs or self._programs.inputs(self._model_kwargs)
                self._constants = self._programs.prepare(self._inputs)
            constants = self._constants[want_energies]
            with torch._C._AutoDispatchBelowAutograd():
                *energies, grad = program.step(x.to(self._dtype), *constants)
        return (energies[0].reshape(-1) if energies else None), grad.to(x.dtype)

    def held_bytes(self) -> int:
        """Estimate the bytes held: the constants of a chain, and the values of a step."""
        return self.weight_bytes() + self._programs.of(False).step_bytes

    def weight_bytes(self) -> int:
        """Return the bytes of the constants of a chain, such as normalised weights."""
        return self._programs.of(False).constant_bytes


class FixedInputs:
    """The inputs of a trace's programs, by slot, in memory of their own on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tensors: dict[int, Tensor] = {}

    def write(self, values: dict[int, Tensor]) -> dict[int, Tensor]:
        """Copy values of the same shapes as before, and return the tensors that hold them."""
        if not self.tensors:
            self.tensors = {n: value.clone() for n, value in values.items()}
            return self.tensors
        here = [n for n, value in values.items() if value.device == self.device]
        if here:
            torch._foreach_copy_([self.tensors[n] for n in here], [values[n] for n in here])
        for n in values.keys() - here:
            # A launch contains a number from the host's memory itself: one for each value.
            if not torch.equal(self.tensors[n], values[n]):
                self.tensors[n] = values[n].clone()
        return self.tensors


class Programs:
    """The programs of a trace, with and without energies, made when they are first needed."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def of(self, energies: bool) -> Program:
        return self._with_energies if energies else self._without

    def inputs(self, model_kwargs: dict[str, Any]) -> dict[int, Tensor]:
        """Return the inputs of both programs by slot.

        The last step of a chain wants energies and the others do not, but what is expensive to
        compute, such as the encoding of an observation, is computed once for all of them.
        """
        return dict(zip(self._slots, self._constants.compute(model_kwargs), strict=True))

    def prepare(self, inputs: dict[int, Tensor]) -> dict[bool, list[Tensor]]:
        """Return the constants of both programs, by whether it computes energies.

        Their packed weights are the same tensors.
        """
        values = [inputs[n] for n in self._slots]
        return dict(zip((False, True), self._prepare(*values), strict=True))

    @functools.cached_property
    def _without(self) -> Program:
        return Program(self.trace, False)

    @functools.cached_property
    def _with_energies(self) -> Program:
        return Program(self.trace, True)

    @functools.cached_property
    def _slots(self) -> list[int]:
        return list(dict.fromkeys((*self._without.inputs, *self._with_energies.inputs)))

    @functools.cached_property
    def _prepare(self) -> Callable[..., list[list[Tensor]]]:
        return preparation(self.trace, (self._without, self._with_energies), self._slots)

    @functools.cached_property
    def _constants(self) -> Constants:
        return Constants(self.trace, self._slots)
