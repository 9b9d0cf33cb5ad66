"""An engine for energies whose modules keep what they compute, such as activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.autograd import EnergyGradient
from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.untouched import Isolation


class OwnLastStep:
    """Runs an engine, but the energy's own code where energies are wanted.

    The last step of a chain wants energies. After it, the attributes of the energy's modules hold
    the tensors that they would hold if the energy's code had run at every step.
    """

    def __init__(
        self,
        engine: Engine,
        energy: Callable[..., Any],
        device: torch.device,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.engine, self._model_kwargs = engine, model_kwargs
        self.precision = engine.precision  # one for all steps of a chain
        self._isolation = Isolation(energy, device)
        self._own = EnergyGradient(self._isolation.network, engine.precision, device)

    def begin(self) -> None:
        """Read the weights, before a chain starts."""
        self.engine.begin()

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n] or None, d energy / d x) for x [n, ...]."""
        if not want_energies:
            return self.engine(x, False)
        with self._isolation.step():
            return self._own(x, self._model_kwargs)

    def held_bytes(self) -> int | None:
        """Return None: autograd keeps the values of the last step."""
        return None

    def weight_bytes(self) -> int:
        """Return the bytes of the engine's copies of the weights."""
        return self.engine.weight_bytes()
