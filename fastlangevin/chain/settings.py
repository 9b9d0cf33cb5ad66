"""The settings of a sampler."""

from typing import NamedTuple

from torch import Tensor

from fastlangevin.arguments import Coefficient, GradClip
from fastlangevin.kernels.memory import in_memory


class Settings(NamedTuple):
    """The checked arguments of LangevinSampler's constructor, except the energy and the start."""

    steps: int
    step_size: Coefficient | list[float]
    noise_std: Coefficient | list[float]
    maximize: bool
    clamp: tuple[float, float] | None
    grad_clip: GradClip | None
    noise_order: str
    precision: str | None
    backend: str
    gradient: str
    metropolis: bool


def check_metropolis(op: str, settings: Settings) -> None:
    """ValueError for settings with which the density of a proposal is not known."""
    for name in ("step_size", "noise_std"):
        value = getattr(settings, name)
        zero = (
            value.device.type == "cpu" and in_memory(value) and bool((value == 0).any())
            if isinstance(value, Tensor)
            else 0 in (value if isinstance(value, list) else [value])
        )
        if zero:
            raise ValueError(f"{op}: metropolis=True needs {name} > 0, got 0")
    if settings.noise_order != "after":
        raise ValueError(
            f'{op}: metropolis=True needs noise_order "after", got {settings.noise_order!r}'
        )
    if isinstance(settings.grad_clip, tuple) and settings.grad_clip[0] == "batch_norm":
        raise ValueError(
            f"{op}: metropolis=True accepts or rejects each chain on its own, but a "
            '"batch_norm" clip ties them together'
        )
    if settings.gradient == "network":
        raise ValueError(f"{op}: metropolis=True compares energies, and a score network has none")
