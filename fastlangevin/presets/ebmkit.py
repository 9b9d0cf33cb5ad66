"""The Langevin sampler of ebmkit."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastlangevin.arguments import (
    GradClip,
    Schedule,
    check_clamp,
    check_count,
    check_grad_clip,
    check_number,
    check_schedule,
)
from fastlangevin.names import keywords_checked
from fastlangevin.presets.common import Randomness, Samplers, random_keywords
from fastlangevin.sampler import LangevinSampler


class ebmkit:  # lower case, like all presets
    """``ebm.LangevinDynamics`` of ebmkit, run by a :class:`LangevinSampler`.

        x <- clamp(x - step_size clip(dE/dx) + noise_scale z)

    noise_scale None means sqrt(2 step_size). grad_clip: a bound on each element, or None. clamp:
    (lo, hi) or None. An energy is any callable, of any output shape: its sum is differentiated.

    Differs: BatchNorm's statistics are left unchanged; states of half precision are computed, and
    returned, in float32. Source: ebmkit 0.16.0, ebm/samplers/langevin.py.
    """

    @keywords_checked
    def __init__(
        self,
        step_size: Schedule = 1e-2,
        steps: int = 100,
        noise_scale: float | None = None,
        grad_clip: GradClip | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> None:
        self.step_size, self.steps, self.noise_scale = step_size, steps, noise_scale
        check_schedule("ebmkit", "step_size", step_size, check_count("ebmkit", "steps", steps))
        if noise_scale is not None:
            check_number("ebmkit", "noise_scale", noise_scale)
        self.grad_clip = check_grad_clip("ebmkit", grad_clip)
        self.clamp = check_clamp("ebmkit", clamp)
        self._samplers, self._steppers = Samplers(), Samplers()

    @property
    def last_accept_rate(self) -> float | None:
        """None, as for every sampler that accepts every step."""
        return None

    @random_keywords
    def sample(
        self,
        energy: Callable[..., Tensor],
        x_init: Tensor,
        *,
        steps: int | None = None,
        return_trajectory: bool = False,
        random: Randomness,
    ) -> Tensor:
        """Return the states after ``steps`` steps [n, ...], or all [steps + 1, n, ...]."""
        sampler = self._sampler(self._samplers, energy, self.steps if steps is None else steps)
        run = sampler.trajectory if return_trajectory else sampler
        return run(x_init, **random._asdict())

    @random_keywords
    def step(self, energy: Callable[..., Tensor], x: Tensor, *, random: Randomness) -> Tensor:
        """Take one step; ``noise`` is [1, n, ...]."""
        return self._sampler(self._steppers, energy, 1)(x, **random._asdict())

    def _sampler(
        self, samplers: Samplers, energy: Callable[..., Tensor], steps: int
    ) -> LangevinSampler:
        std: Any = self.noise_scale
        if std is None:
            a = check_schedule("ebmkit", "step_size", self.step_size, steps)
            std = (2 * a) ** 0.5 if isinstance(a, Tensor | float) else [(2 * v) ** 0.5 for v in a]
        return samplers(
            energy,
            steps=steps,
            step_size=self.step_size,
            noise_std=std,
            clamp=self.clamp,
            grad_clip=self.grad_clip,
        )
