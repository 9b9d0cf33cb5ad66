"""The Langevin sampler of torchebm."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_clamp, check_number
from fastlangevin.gradients.modules import call_network, device_of
from fastlangevin.gradients.untouched import left_as_found
from fastlangevin.names import keywords_checked
from fastlangevin.presets.common import Randomness, Samplers, random_keywords
from fastlangevin.sampler import LangevinSampler


class torchebm(nn.Module):  # lower case, like all presets
    """``torchebm.samplers.LangevinDynamics``, run by a :class:`LangevinSampler`.

        x <- clamp(x - eta dE/dx + noise_scale sqrt(2 eta) z)

    model: the energy, a torchebm ``BaseModel`` or any module or callable, [n, ...] -> [n] or
    [n, 1]. step_size (eta) and noise_scale: numbers or torchebm's schedulers. clamp: (lo, hi) or
    None. dtype: the dtype of the states and the result. device: the model's by default. The sampler
    is a module that contains the model, so ``to`` moves both. integrator: None, "euler_maruyama" or
    an instance of that class for the same device and dtype; the attribute holds what was passed.
    ``schedulers``, ``get_scheduled_value`` and the other methods for schedulers are torchebm's.

    Differs: models need not be a ``BaseModel``; noise_scale=0 is allowed; BatchNorm's statistics
    are left unchanged; the gradient is autograd's, also if the model has an analytic ``gradient``.
    Raises ValueError for a step_size or noise_scale below 0, a clamp without lo < hi and a decay
    other than 0 (which the original accepts and does not use), and ValueError or TypeError for
    integrators other than Euler-Maruyama.
    Source: torchebm 0.8.9, samplers/langevin_dynamics.py.
    """

    _device_marker: Tensor

    @keywords_checked
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
        # ``to`` moves it, which gives the device of a model without tensors.
        marker = torch.empty(0, dtype=torch.float32, device=device)
        self.register_buffer("_device_marker", marker, persistent=False)
        self.integrator = _check_integrator(integrator, self.device, dtype)
        self._samplers = Samplers(sums=False)

    @property
    def device(self) -> torch.device:
        """The model's device. If it has no tensors: ``device``, or where ``to`` moved it."""
        return device_of(self.model) or self._device_marker.device

    def register_scheduler(self, name: str, scheduler: Any) -> None:
        """Use a scheduler for "step_size" or "noise_scale"."""
        self.schedulers[name] = scheduler

    def get_schedulers(self) -> dict[str, Any]:
        return self.schedulers

    def get_scheduled_value(self, name: str) -> float:
        """Return the current step_size or noise_scale. Raises KeyError for other names."""
        if name not in self.schedulers:
            raise KeyError(f"torchebm: no scheduler of {name!r}")
        return float(self.schedulers[name].get_value())

    def step_schedulers(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.step()

    def reset_schedulers(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.reset()

    @random_keywords
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
        random: Randomness,
    ) -> Any:
        """Take n_steps >= 1 steps from x [n, ...], or from N(0, 1) in [n_samples, *dim].

        y and model_kwargs are passed to the model. ``noise`` is [n_steps, n, ...].
        Returns the last states [n, ...]. With return_trajectory it returns the states after steps
        thin, 2 thin, ...: [n, n_steps // thin, ...]. With return_diagnostics it returns a pair of
        either and a dict of the states' mean and var over the chains [n_steps // thin, ...] and
        their mean energy [n_steps // thin].
        """
        if thin < 1:
            raise ValueError(f"torchebm: thin must be >= 1, got {thin}")
        if x is None:
            x = self._start(dim, n_samples, random)
        x = x.to(self.device, self.dtype)
        if y is not None:
            model_kwargs = {**(model_kwargs or {}), "y": y}
        kwargs = {
            name: value.to(x.device) if isinstance(value, Tensor) else value
            for name, value in (model_kwargs or {}).items()
        }
        sampler = self._sampler(n_steps, reset_schedulers)
        options = random._asdict() | kwargs
        if not (return_trajectory or return_diagnostics):
            return sampler(x, **options).to(self.dtype)
        # [n_steps // thin, n, ...]; the last state is among them if thin divides n_steps.
        states = sampler.trajectory(x, every=thin, **options)[1:]
        if return_trajectory or n_steps % thin == 0:
            last = states[-1] if len(states) else x
        else:
            last = sampler(x, **options)
        out = states.transpose(0, 1) if return_trajectory else last
        out = out.to(self.dtype, memory_format=torch.contiguous_format)
        return (out, self._diagnose(states, kwargs)) if return_diagnostics else out

    def _start(self, dim: int | tuple[int, ...] | None, n: int, random: Randomness) -> Tensor:
        if dim is None:
            raise ValueError("torchebm: give x or dim")
        return _noise.normal(
            (n, *((dim,) if isinstance(dim, int) else dim)), seed=random.seed, step=0,
            stream=_noise.INITIAL, first_chain=random.first_chain, device=self.device,
        )  # fmt: skip

    def _diagnose(self, states: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Mean and variance over the chains, and the mean energy, of states [k, n, ...]."""
        with torch.no_grad(), left_as_found(self.model, states.device):
            energies = [
                call_network(self.model, x, model_kwargs).to(self.dtype).mean() for x in states
            ]
        if states.shape[1] > 1:
            var = states.var(1, unbiased=False).clamp(1e-10, 1e10)
        else:
            var = 0 * states[:, 0]
        energy = torch.stack(energies) if energies else states.new_empty(0)
        records = {"mean": states.mean(1), "var": var, "energy": energy}
        return {name: value.to(self.dtype) for name, value in records.items()}

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


class _Constant(NamedTuple):
    """A scheduler of a constant."""

    value: float

    def get_value(self) -> float:
        return self.value

    def step(self) -> float:
        return self.value

    def reset(self) -> None:
        pass


def _check_integrator(integrator: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return an integrator that is Euler-Maruyama's; raises TypeError or ValueError otherwise."""
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
    if (torch.device(integrator.device).type, integrator.dtype) != (device.type, dtype):
        raise ValueError(
            f"torchebm: integrator must be of the sampler's device/dtype {device}, {dtype}, got "
            f"{integrator.device}, {integrator.dtype}"
        )
    return integrator
