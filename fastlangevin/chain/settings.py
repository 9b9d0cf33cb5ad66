"""The settings of a sampler, as one record."""

from typing import NamedTuple

from torch import Tensor

from fastlangevin.arguments import Coefficient, GradClip
from fastlangevin.kernels.memory import in_memory


class Settings(NamedTuple):
    """The constructor's arguments of LangevinSampler, checked, less the energy."""

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
    """ValueError for settings under which a proposal's density is not known."""
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
            f'{op}: metropolis=True accepts each chain by itself; a "batch_norm" clip ties them'
        )
    if settings.gradient == "network":
        raise ValueError(f"{op}: metropolis=True compares energies; a score network has none")
