"""Langevin sampling for energy-based models."""

from fastlangevin import noise
from fastlangevin._version import __version__
from fastlangevin.energies import ConvEnergy, GaussianEnergy
from fastlangevin.sampler import Diagnostics, LangevinSampler
from fastlangevin.step import langevin_step_

__all__ = [
    "ConvEnergy",
    "Diagnostics",
    "GaussianEnergy",
    "LangevinSampler",
    "__version__",
    "langevin_step_",
    "noise",
]
