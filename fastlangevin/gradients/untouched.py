"""Evaluations of an energy that leave generators and the buffers of modules unchanged."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.draws import ONE_AT_A_TIME, Draws
from fastlangevin.gradients.modules import Network, submodules_of


class Isolation:
    """Keeps the evaluations of an energy during one call from changing anything else.

    Random numbers come from generators that belong to the call (see :class:`Draws`, which takes
    the arguments ``seed`` and ``twice``). Buffers of modules in train mode are restored after each
    step (see :class:`Buffers`), and only one thread at a time takes a step with such modules. The
    requires_grad flags are never changed.
    """

    def __init__(
        self,
        energy: Callable[..., Any],
        device: torch.device,
        seed: int | None = None,
        twice: bool = False,
    ) -> None:
        self.network = Network(energy)
        self._buffers = Buffers(energy)
        self._draws = Draws(seed, device, twice)

    def step(self, number: int = 0) -> contextlib.AbstractContextManager[None]:
        """Return the context in which to evaluate the energy at step ``number``.

        The context must not be nested or shared between threads.
        """
        draws = self._draws.step(number)
        return self._exclusive(draws) if self._buffers.exist else draws

    def backward(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for a backward pass through steps that have been taken."""
        return self._draws.backward()

    @contextlib.contextmanager
    def _exclusive(self, draws: Draws) -> Iterator[None]:
        with ONE_AT_A_TIME, self._buffers.put_back(), draws:
            yield


class Buffers:
    """The buffers of those modules of an energy that are in train mode.

    Every forward pass changes the statistics of BatchNorm and the vectors of spectral norm.
    Restoring them after each step leaves no trace and makes the energy the same function at every
    step. A module has a single set of buffers, so updates that another thread makes to them during
    a step, for example by training the module, are lost.
    """

    def __init__(self, energy: Callable[..., Any]) -> None:
        self._modules = [
            module
            for module in submodules_of(energy)
            # A module frozen by torch.jit.freeze has no attribute "training".
            if getattr(module, "training", False) and module._buffers
        ]
        self.exist = bool(self._modules)
        self._values: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """On exit, restore the values that the buffers had on entry, also if the energy raises."""
        buffers = [
            (module, name, buffer, self._value(buffer))
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            yield
        finally:
            for module, name, buffer, value in buffers:
                # Through .data, autograd does not see this as a change of a tensor that it saved.
                buffer.data.copy_(value)
                module._buffers[name] = buffer
                self._values[id(buffer)] = buffer, _version(buffer), value

    def _value(self, buffer: Tensor) -> Tensor:
        """Return a copy of a buffer: the copy of the step before unless it has been written to."""
        _, version, value = self._values.get(id(buffer), (None, None, None))
        if value is None or version is None or version != _version(buffer):
            return buffer.detach().clone()
        return value


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def left_as_found(
    energy: Callable[..., Any], device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Return a context for an energy that restores what the energy changes, also if it raises.

    Buffers of modules in train mode are restored. The energy draws the numbers that torch's
    generators would give next, but these generators do not advance.
    """
    return Isolation(energy, device).step()
