"""The explicit engine for networks of any operators: it replays a trace, without autograd.

What does not depend on the states is computed once per chain: normalised weights, embeddings of
labels, an encoded observation, and the gradient of everything linear at the network's end.
"""

from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.precision import network_precision
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
        arguments = {n: model_kwargs[name].detach() for n, name in trace.arguments.items()}
        self._leaves = {n: leaf.detach() for n, leaf in trace.leaves.items()} | arguments
        self._watched = list(trace.leaves.values())
        self._constants: dict[bool, tuple[Tensor, ...]] = {}
        self._seen: list[tuple[int, int]] = []
        self._dtype = trace.values[0].dtype

    def begin(self) -> None:
        """Forget the constants.

        This is needed before every chain: a write through ``.data`` leaves no other trace.
        """
        self._seen, self._constants = self._versions(), {}
        # The parameters may have been given other memory.
        self._leaves |= {n: leaf.detach() for n, leaf in self.trace.leaves.items()}

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
                constants = program.prepare(*[self._leaves[n] for n in program.leaves])
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
        self._made: dict[bool, Program] = {}

    def of(self, energies: bool) -> Program:
        program = self._made.get(energies)
        if program is None:
            program = self._made[energies] = Program(self.trace, energies)
        return program
