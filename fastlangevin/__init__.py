"""Langevin sampling for energy-based models."""

import importlib
from typing import TYPE_CHECKING, Any

from fastlangevin._version import __version__

if TYPE_CHECKING:
    # "as" tells type checkers that these modules are public.
    from fastlangevin import anneal as anneal
    from fastlangevin import distributed as distributed
    from fastlangevin import learn as learn
    from fastlangevin import noise as noise
    from fastlangevin import presets as presets
    from fastlangevin import testing as testing
    from fastlangevin.diagnostics import Diagnostics
    from fastlangevin.energies import ConvEnergy, GaussianEnergy
    from fastlangevin.learn.model import load, save
    from fastlangevin.learn.push_to_hub import push_to_hub
    from fastlangevin.replay import ReplayBuffer
    from fastlangevin.sampler import LangevinSampler
    from fastlangevin.step import langevin_step_

__all__ = [
    "ConvEnergy",
    "Diagnostics",
    "GaussianEnergy",
    "LangevinSampler",
    "ReplayBuffer",
    "__version__",
    "anneal",
    "distributed",
    "langevin_step_",
    "load",
    "noise",
    "push_to_hub",
    "save",
]

# A name is imported at its first use, so that `fastlangevin --help` does not wait for torch, and
# the sampler does not wait for the packages that are built on it.
_HOMES = {
    "ConvEnergy": "energies",
    "Diagnostics": "diagnostics",
    "GaussianEnergy": "energies",
    "LangevinSampler": "sampler",
    "ReplayBuffer": "replay",
    "langevin_step_": "step",
    "load": "learn.model",
    "push_to_hub": "learn.push_to_hub",
    "save": "learn.model",
}
_MODULES = ("anneal", "distributed", "learn", "noise", "presets", "testing")


if not TYPE_CHECKING:  # a checker would take every name for one of this module

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"fastlangevin.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(f"fastlangevin.{name}")
        from fastlangevin.names import unknown_attribute

        raise unknown_attribute(__name__, name, __dir__())


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
