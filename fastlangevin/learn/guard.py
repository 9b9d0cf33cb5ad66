"""DivergenceGuard: notice a run that is lost, and say why."""

import math

from fastlangevin.learn.learner import Metrics


class DivergedError(RuntimeError):
    """Learning has diverged; the message says how."""


class DivergenceGuard:
    """Raises DivergedError on energies that run away and on chains that stay saturated.

    ``max_energy`` bounds |mean energy| on data and samples in any one iteration. ``max_saturation``
    bounds the fraction of the samples' elements at or beyond the clamp (or (-1, 1) without one);
    it must be passed ``patience`` iterations running, since single batches swing.
    """

    def __init__(self, max_energy: float, max_saturation: float, patience: int = 50) -> None:
        self.max_energy = max_energy
        self.max_saturation = max_saturation
        self.patience = patience
        self.saturated = 0

    @property
    def calm(self) -> bool:
        """Whether the last iteration gave no sign of divergence, and is fit to be saved."""
        return self.saturated == 0

    def check(self, metrics: Metrics) -> None:
        for energy in (metrics.energy_data, metrics.energy_samples):
            if not math.isfinite(energy) or abs(energy) > self.max_energy:
                raise DivergedError(
                    f"energies run away at iteration {metrics.iteration}: |energy| is "
                    f"{abs(energy):.3g}, the bound max_energy is {self.max_energy:.3g}"
                )
        self.saturated = self.saturated + 1 if metrics.saturation > self.max_saturation else 0
        if self.saturated >= self.patience:
            raise DivergedError(
                f"chains are saturated at iteration {metrics.iteration}: "
                f"{metrics.saturation:.0%} of the samples' elements are at the bounds or beyond, "
                f"above max_saturation = {self.max_saturation:.0%} for {self.patience} iterations"
            )
