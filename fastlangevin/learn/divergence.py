"""DivergenceGuard: stop a run that has diverged, and say why."""

import math

from fastlangevin.learn.learner import Metrics


class DivergedError(RuntimeError):
    """Learning has diverged; the message says how."""


class DivergenceGuard:
    """Raises DivergedError if energies grow without bound or chains stay saturated.

    Args:
        max_energy: Bound on |mean energy| of the data and of the samples, in every iteration.
        max_saturation: Bound on the fraction of sample elements at or beyond the clamp, which is
            (-1, 1) if the sampler has none.
        patience: Number of consecutive iterations for which max_saturation must be exceeded,
            because the saturation of single batches varies widely."""

    def __init__(self, max_energy: float, max_saturation: float, patience: int = 50) -> None:
        self.max_energy = max_energy
        self.max_saturation = max_saturation
        self.patience = patience
        self.saturated = 0

    @property
    def calm(self) -> bool:
        """Whether the last iteration showed no sign of divergence and may be saved."""
        return self.saturated == 0

    def check(self, metrics: Metrics) -> None:
        """Raise DivergedError if the metrics of an iteration pass a bound."""
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
