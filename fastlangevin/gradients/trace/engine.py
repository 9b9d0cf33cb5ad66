"""The explicit engine for networks of any operators: it replays a trace, without autograd.

What does not depend on the states is computed once per chain: normalised weights, embeddings of
labels, an encoded observation, and the gradient of everything linear at the network's end.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.precision import network_precision
from fastlangevin.gradients.trace.constants import Constants
from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.gradients.trace.program import Program


class TracedGradient:
    """Energies and d energy / d x of the batches of one call, by replaying a trace.

    The constants are computed by :meth:`begin` from the current weights and from the call's keyword
    arguments, and again by a call if a version counter or an address shows that one has changed.
    """

    def __init__(
        self,
        trace: Trace,
        programs: "Programs",
        model_kwargs: dict[str, Any],
        precision: str | None,
    ) -> None:
        self.trace, self.precision = trace, precision
        self._programs = programs
        self._model_kwargs = model_kwargs
        self._watched = list(trace.leaves.values())
        self._inputs: dict[int, Tensor] = {}  # what the energy computes without the states
        self._constants: dict[bool, tuple[Tensor, ...]] = {}
        self._seen: list[tuple[int, int]] = []
        self._dtype = trace.values[0].dtype

    def begin(self) -> None:
        """Forget the constants.

        This is needed before every chain: a write through ``.data`` leaves no other trace.
        """
        self._seen, self._inputs, self._constants = self._versions(), {}, {}

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n] or None, d energy / d x in x's shape and dtype)."""
        if not x.shape[0]:
            return (x.new_zeros(0) if want_energies else None), torch.zeros_like(x)
        if self._seen != self._versions():
            self.begin()
        program = self._programs.of(want_energies)
        with torch.no_grad(), network_precision(self.precision, x.device):
            constants = self._constants.get(want_energies)
            if constants is None:
                self._constants = {}  # two programs need not have packed weights at a time
                inputs = self._inputs or self._programs.inputs(self._model_kwargs)
                self._inputs = inputs
                constants = program.prepare(*[inputs[n] for n in program.inputs])
                self._constants[want_energies] = constants
            with torch._C._AutoDispatchBelowAutograd():
                *energies, grad = program.step(x.to(self._dtype), *constants)
        return (energies[0].reshape(-1) if energies else None), grad.to(x.dtype)

    def held_bytes(self) -> int:
        """Estimate the bytes held: the constants of a chain, and the values of a step."""
        program = self._programs.of(False)
        return program.constant_bytes + program.step_bytes

    def _versions(self) -> list[tuple[int, int]]:
        return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in self._watched]


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
    def _constants(self) -> Constants:
        return Constants(self.trace, self._slots)
