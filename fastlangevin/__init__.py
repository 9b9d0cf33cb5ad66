"""Langevin sampling for energy-based models."""

import importlib
from typing import TYPE_CHECKING, Any

from fastlangevin import anneal, noise
from fastlangevin._version import __version__
from fastlangevin.energies import ConvEnergy, GaussianEnergy
from fastlangevin.replay import ReplayBuffer
from fastlangevin.sampler import Diagnostics, LangevinSampler
from fastlangevin.step import langevin_step_

if TYPE_CHECKING:
    from fastlangevin.learn.checkpoint import load

__all__ = [
    "ConvEnergy",
    "Diagnostics",
    "GaussianEnergy",
    "LangevinSampler",
    "ReplayBuffer",
    "__version__",
    "anneal",
    "langevin_step_",
    "load",
    "noise",
]

_MODULES = ("learn", "presets", "testing")


def __getattr__(name: str) -> Any:
    # The sampler does not need what is built on it: learning is imported when it is asked for.
    if name == "load":
        from fastlangevin.learn.checkpoint import load

        return load
    if name in _MODULES:
        return importlib.import_module(f"fastlangevin.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
