"""The interface of a gradient engine."""

from typing import Protocol

from torch import Tensor


class Engine(Protocol):
    """Computes energies and d energy / d x for batches of one shape."""

    @property
    def precision(self) -> str | None:
        """The precision in which it computes, which may be higher than that of the call."""

    def begin(self) -> None:
        """Read the weights.

        This is needed before every chain: a write through ``.data`` leaves no other trace.
        """

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n] or None, d energy / d x) for x [n, ...]."""

    def held_bytes(self) -> int | None:
        """Return the most bytes held during and between calls, without the gradient, if known."""

    def weight_bytes(self) -> int:
        """Return how many of these are copies of the weights and what is computed from them."""
