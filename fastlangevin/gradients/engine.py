"""What a gradient engine is: energies and input gradients of batches of one shape."""

from typing import Protocol

from torch import Tensor


class Engine(Protocol):
    """Computes energies and d energy / d x for batches of one shape."""

    def begin(self) -> None:
        """Read the weights, before a chain."""

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """(energies [n] or None, d energy / d x) of x [n, ...]."""

    def held_bytes(self) -> int | None:
        """The most bytes held between and during calls, besides the gradient, if known."""
