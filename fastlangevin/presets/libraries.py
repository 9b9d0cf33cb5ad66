"""The Langevin samplers of torchebm and ebmkit by their signatures, and ULA at a temperature."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlangevin import noise as _noise
from fastlangevin.arguments import (
    GradClip,
    Schedule,
    check_clamp,
    check_count,
    check_grad_clip,
    check_number,
    check_schedule,
)
from fastlangevin.gradients.autograd import call_network, device_of, left_as_found
from fastlangevin.presets.common import Samplers, take_seed
from fastlangevin.sampler import LangevinSampler


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
        a = torch.as_tensor(a, dtype=torch.float64, device="cpu")[:, None]
    if not isinstance(temperature, Tensor):
        temperature = check_number("ula", "temperature", temperature)
    product = 2 * a * temperature
    std = product.sqrt() if isinstance(product, Tensor) else math.sqrt(product)
    return LangevinSampler(energy, steps=steps, step_size=step_size, noise_std=std, **settings)


class torchebm(nn.Module):  # lower case, as all presets are called
    """``torchebm.samplers.LangevinDynamics`` with our sampler behind it.

        x <- clamp(x - eta dE/dx + noise_scale sqrt(2 eta) z)

    model: the energy, a torchebm ``BaseModel`` or any module or callable, [n, ...] -> [n], [n, 1].
    step_size (eta) and noise_scale: numbers or torchebm's schedulers. clamp: (lo, hi) or None.
    dtype: of the states and the result. device: by default the model's; ``to`` moves both, as the
    sampler is a module with the model inside. integrator: None, "euler_maruyama" or an instance of
    that class for the same device and dtype. ``get_scheduled_value``, ``schedulers`` and their like
    are torchebm's. Raises ValueError for a step_size or noise_scale below 0 and a clamp without
    lo < hi.

    Differs: modules need not be ``BaseModel``; noise_scale=0 is legal; BatchNorm's statistics stay;
    an analytic ``gradient`` of a model is not called, autograd is. Raises ValueError for a decay
    other than 0, which the original takes and does not use, and ValueError or TypeError for other
    integrators than Euler and Maruyama's; ``integrator`` is what was given, None by default.
    Source: torchebm 0.8.9, samplers/langevin_dynamics.py.
    """

    _place: Tensor

    def __init__(
        self,
        model: Callable[..., Tensor],
        step_size: Any = 1e-3,
        noise_scale: Any = 1.0,
        decay: float = 0.0,
        clamp: tuple[float, float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        integrator: Any = None,
    ) -> None:
        super().__init__()
        if decay != 0:
            raise ValueError(
                f"torchebm: decay must be 0, which torchebm does not use, got {decay!r}"
            )
        self.schedulers: dict[str, Any] = {}
        for name, value in (("step_size", step_size), ("noise_scale", noise_scale)):
            scheduled = hasattr(value, "get_value")
            value = value if scheduled else _Constant(check_number("torchebm", name, value))
            self.register_scheduler(name, value)
        self.model, self.clamp, self.dtype = model, check_clamp("torchebm", clamp), dtype
        # It follows the sampler where the model has no tensors to tell the device by.
        self.register_buffer(
            "_place", torch.empty(0, dtype=torch.float32, device=device), persistent=False
        )
        self.integrator = _check_integrator(integrator, self.device, dtype)
        self._samplers = Samplers(sums=False)

    @property
    def device(self) -> torch.device:
        """The model's, or where it has no tensors the one given."""
        return device_of(self.model) or self._place.device

    def register_scheduler(self, name: str, scheduler: Any) -> None:
        """Take step_size or noise_scale from a scheduler."""
        self.schedulers[name] = scheduler

    def get_schedulers(self) -> dict[str, Any]:
        return self.schedulers

    def get_scheduled_value(self, name: str) -> float:
        """The present value of step_size or noise_scale; KeyError for another name."""
        if name not in self.schedulers:
            raise KeyError(f"torchebm: no scheduler of {name!r}")
        return float(self.schedulers[name].get_value())

    def step_schedulers(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.step()

    def reset_schedulers(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.reset()

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

    def extra_repr(self) -> str:
        values = {name: value.get_value() for name, value in self.schedulers.items()}
        return ", ".join(f"{name}={value!r}" for name, value in values.items())

    def _sampler(self, steps: int, reset: bool) -> LangevinSampler:
        if reset:
            self.reset_schedulers()
        etas, scales = [], []
        for _ in range(steps):
            etas.append(self.get_scheduled_value("step_size"))
            scales.append(self.get_scheduled_value("noise_scale"))
            self.step_schedulers()
        stds = [scale * math.sqrt(2 * eta) for eta, scale in zip(etas, scales, strict=True)]
        return self._samplers(
            self.model, steps=steps, step_size=etas, noise_std=stds, clamp=self.clamp
        )


class ebmkit:  # lower case, as all presets are called
    """``ebm.LangevinDynamics`` of ebmkit with our sampler behind it.

        x <- clamp(x - step_size clip(dE/dx) + noise_scale z)

    noise_scale None is sqrt(2 step_size). grad_clip: a bound on each element, or None. clamp: (lo,
    hi) or None. Energies are any callables, of any output shape: the sum is what is differentiated.

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
        check_schedule("ebmkit", "step_size", step_size, check_count("ebmkit", "steps", steps))
        if noise_scale is not None:
            check_number("ebmkit", "noise_scale", noise_scale)
        self.grad_clip = check_grad_clip("ebmkit", grad_clip)
        self.clamp = check_clamp("ebmkit", clamp)
        self._samplers, self._steppers = Samplers(), Samplers()

    @property
    def last_accept_rate(self) -> float | None:
        """None, as of all samplers that accept every step."""
        return None

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


class _Constant(NamedTuple):
    """A number as a scheduler."""

    value: float

    def get_value(self) -> float:
        return self.value

    def step(self) -> float:
        return self.value

    def reset(self) -> None:
        pass


def _check_integrator(integrator: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """What stands for Euler and Maruyama's method; TypeError or ValueError for all else."""
    if integrator is None or isinstance(integrator, str):
        if integrator not in (None, "euler_maruyama"):
            raise ValueError(
                f'torchebm: integrator must be None or "euler_maruyama", got {integrator!r}'
            )
        return integrator
    kinds = [kind.__name__ for kind in type(integrator).__mro__]
    if "BaseSDERungeKuttaIntegrator" not in kinds:
        raise TypeError(
            "torchebm: integrator must be a BaseSDERungeKuttaIntegrator, got "
            f"{type(integrator).__name__}"
        )
    if kinds[0] != "EulerMaruyamaIntegrator":
        raise ValueError(f"torchebm: integrator must be an EulerMaruyamaIntegrator, got {kinds[0]}")
    place = torch.device(integrator.device).type, integrator.dtype
    if place != (device.type, dtype):
        raise ValueError(
            f"torchebm: integrator must be of the sampler's device/dtype {device}, {dtype}, got "
            f"{integrator.device}, {integrator.dtype}"
        )
    return integrator
