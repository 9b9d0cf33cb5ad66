"""The Langevin samplers of torchebm and ebmkit by their signatures, and ULA at a temperature."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import GradClip, Schedule, check_number, check_schedule
from fastlangevin.presets.common import Samplers, take_seed
from fastlangevin.sampler import LangevinSampler
from fastlangevin.scores.general import call_network, device_of, left_as_found


def ula(
    energy: Callable[..., Tensor],
    temperature: float | Tensor = 1.0,
    *,
    steps: int = 100,
    step_size: Schedule = 1e-2,
    **settings: Any,
) -> LangevinSampler:
    """The unadjusted Langevin algorithm at a temperature: a :class:`LangevinSampler`.

        x <- x - a dE/dx + sqrt(2 a T) z

    whose law tends to exp(-E / T) as a tends to 0. temperature T >= 0: a number, or a tensor [n] of
    one per chain. step_size a: a number, a sequence of K, a tensor [n], [K, 1] or [K, n].
    ``settings``: the sampler's others. Raises TypeError for noise_std, which a and T decide.
    Source: Roberts and Tweedie 1996, sec. 1.4.1.
    """
    if "noise_std" in settings:
        raise TypeError("ula: takes no noise_std, which is sqrt(2 step_size temperature)")
    a: Any = step_size
    if not isinstance(a, Tensor | int | float):
        a = torch.as_tensor(a, dtype=torch.float64)[:, None]
    if not isinstance(temperature, Tensor):
        temperature = check_number("ula", "temperature", temperature)
    product = 2 * a * temperature
    std = product.sqrt() if isinstance(product, Tensor) else math.sqrt(product)
    return LangevinSampler(energy, steps=steps, step_size=step_size, noise_std=std, **settings)


class torchebm:  # lower case, as all presets are called
    """``torchebm.samplers.LangevinDynamics`` with our sampler behind it.

        x <- clamp(x - eta dE/dx + noise_scale sqrt(2 eta) z)

    model: the energy, a torchebm ``BaseModel`` or any module or callable, [n, ...] -> [n], [n, 1].
    step_size (eta) and noise_scale: numbers or torchebm's schedulers. clamp: (lo, hi) or None.
    dtype: of the states and the result. device: by default the model's.

    Differs: modules need not be ``BaseModel``; noise_scale=0 is legal; BatchNorm's statistics stay;
    an analytic ``gradient`` of a model is not called, autograd is. Raises ValueError for a decay
    other than 0, which the original takes and does not use, and for another integrator than
    "euler_maruyama". Source: torchebm 0.8.9, samplers/langevin_dynamics.py.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        step_size: Any = 1e-3,
        noise_scale: Any = 1.0,
        decay: float = 0.0,
        clamp: tuple[float, float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        integrator: str | None = None,
    ) -> None:
        if decay != 0:
            raise ValueError(
                f"torchebm: decay must be 0, which torchebm does not use, got {decay!r}"
            )
        if integrator not in (None, "euler_maruyama"):
            raise ValueError(
                f'torchebm: integrator must be None or "euler_maruyama", got {integrator!r}'
            )
        self.model, self.step_size, self.noise_scale = model, step_size, noise_scale
        self.clamp, self.dtype = clamp, dtype
        self.device = device_of(model) if device is None else torch.device(device)
        self._samplers = Samplers()

    def sample(
        self,
        x: Tensor | None = None,
        dim: int | tuple[int, ...] | None = None,
        n_steps: int = 100,
        n_samples: int = 1,
        thin: int = 1,
        return_trajectory: bool = False,
        return_diagnostics: bool = False,
        reset_schedulers: bool = True,
        *,
        y: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Any:
        """n_steps >= 1 steps from x [n, ...], or from N(0, 1) in [n_samples, *dim].

        y and model_kwargs go to the model. ``seed`` and ``noise`` [n_steps, n, ...] are ours.
        Returns the last states [n, ...]; with return_trajectory those after steps thin, 2 thin,
        ..., [n, n_steps // thin, ...]; with return_diagnostics a pair of that and a dict of their
        mean and var over the chains [n_steps // thin, ...] and energy [n_steps // thin].
        """
        if thin < 1:
            raise ValueError(f"torchebm: thin must be >= 1, got {thin}")
        seed = take_seed(seed, generator)
        if x is None and dim is None:
            raise ValueError("torchebm: give x or dim")
        if x is None:
            assert dim is not None
            shape = (n_samples, *((dim,) if isinstance(dim, int) else dim))
            x = _noise.normal(
                shape, seed=seed, step=0, stream=_noise.INITIAL, device=self.device,
                first_chain=first_chain,
            )  # fmt: skip
        x = x.to(self.device, self.dtype)
        given = dict(model_kwargs or {}) | ({} if y is None else {"y": y})
        moved = {
            name: value.to(x.device) if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        sampler = self._sampler(n_steps, reset_schedulers)
        options: dict[str, Any] = {"seed": seed, "noise": noise, "first_chain": first_chain}
        options |= moved
        if not (return_trajectory or return_diagnostics):
            return sampler(x, **options).to(self.dtype)
        # [n_steps // thin, n, ...]; the last state is among them where thin divides n_steps.
        kept = sampler.trajectory(x, every=thin, **options)[1:]
        if return_trajectory or n_steps % thin == 0:
            last = kept[-1] if len(kept) else x
        else:
            last = sampler(x, **options)
        out = kept.transpose(0, 1) if return_trajectory else last
        out = out.to(self.dtype, memory_format=torch.contiguous_format)
        if not return_diagnostics:
            return out
        with torch.no_grad(), left_as_found(self.model, x.device):
            energy = [call_network(self.model, x, moved).to(self.dtype).mean() for x in kept]
        several = kept.shape[1] > 1
        var = kept.var(1, unbiased=False).clamp(1e-10, 1e10) if several else 0 * kept[:, 0]
        found = {"mean": kept.mean(1), "var": var}
        found["energy"] = torch.stack(energy) if energy else x.new_empty(0)
        return out, {name: value.to(self.dtype) for name, value in found.items()}

    def _sampler(self, steps: int, reset: bool) -> LangevinSampler:
        etas, scales = (_values(v, steps, reset) for v in (self.step_size, self.noise_scale))
        stds = [scale * math.sqrt(2 * eta) for eta, scale in zip(etas, scales, strict=True)]
        return self._samplers(
            self.model, steps=steps, step_size=etas, noise_std=stds, clamp=self.clamp
        )


class ebmkit:  # lower case, as all presets are called
    """``ebm.LangevinDynamics`` of ebmkit with our sampler behind it.

        x <- clamp(x - step_size clip(dE/dx) + noise_scale z)

    noise_scale None is sqrt(2 step_size). grad_clip: a bound on each element, or None. clamp: (lo,
    hi) or None. Energies are any callables, [n, ...] -> [n].

    Differs: BatchNorm's statistics stay as they were; states of half precision are walked on, and
    returned, in float32. Source: ebmkit 0.16.0, ebm/samplers/langevin.py.
    """

    def __init__(
        self,
        step_size: Schedule = 1e-2,
        steps: int = 100,
        noise_scale: float | None = None,
        grad_clip: GradClip | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> None:
        self.step_size, self.steps, self.noise_scale = step_size, steps, noise_scale
        check_schedule("ebmkit", "step_size", step_size, steps)
        self.grad_clip, self.clamp = grad_clip, clamp
        self._samplers, self._steppers = Samplers(), Samplers()

    def sample(
        self,
        energy: Callable[..., Tensor],
        x_init: Tensor,
        *,
        steps: int | None = None,
        return_trajectory: bool = False,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Tensor:
        """The states after ``steps`` steps [n, ...], or all [steps + 1, n, ...], x_init first."""
        sampler = self._sampler(self._samplers, energy, self.steps if steps is None else steps)
        options: dict[str, Any] = {"seed": take_seed(seed, generator), "noise": noise}
        options["first_chain"] = first_chain
        if return_trajectory:
            return sampler.trajectory(x_init, **options)
        return sampler(x_init, **options)

    def step(
        self,
        energy: Callable[..., Tensor],
        x: Tensor,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Tensor:
        """One step; ``noise`` is [1, n, ...]."""
        sampler = self._sampler(self._steppers, energy, 1)
        return sampler(x, seed=take_seed(seed, generator), noise=noise, first_chain=first_chain)

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


def _values(value: Any, steps: int, reset: bool) -> list[float]:
    """A number, or a torchebm scheduler's values, step by step; it is left as its sampler would."""
    if not hasattr(value, "get_value"):
        return [float(value)] * steps
    if reset:
        value.reset()
    found = []
    for _ in range(steps):
        found.append(float(value.get_value()))
        value.step()
    return found
