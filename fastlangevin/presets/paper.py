"""Short-run MCMC and its authors' later code: Nijkamp, Hill, Zhu and Wu; Hill et al."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.gradients.network import device_of
from fastlangevin.presets.common import Samplers, draw_distinct, measure, take_seed
from fastlangevin.sampler import LangevinSampler

INITS = ("persistent", "data", "uniform", "gaussian")


def short_run(
    f: Callable[..., Tensor], shape: Sequence[int] = (3, 32, 32), m: int = 64
) -> Callable[..., Tensor]:
    """``sample_q(K=100, s=1e-2)`` of short-run MCMC: m chains from U(-1, 1), each time anew.

        x <- x + (df/dx + s z)

    f: the negative energy of [m, *shape], of any output shape: the chain ascends its sum. Returns a
    function ``sample_q(K=100, s=1e-2, *, x0=None, seed=None, generator=None, noise=None)`` that
    returns x [m, *shape], detached. ``x0`` starts elsewhere; ``noise`` [K, m, *shape] replaces the
    noise.

    Differs: x0 and noise come from the noise contract; f's parameters collect no ``.grad``.
    Source: enijkamp/short_run, train_cifar10_minimal.py (there s = 0.01 is fixed), and
    enijkamp/short_run_mcmc_apex, whose half precision is ``precision="fp16"`` of a
    :class:`LangevinSampler` of the same settings.
    """
    samplers = Samplers()
    if not isinstance(shape, Sequence):
        raise TypeError(f"short_run: shape must be a sequence of integers, got {shape!r}")

    def sample_q(
        K: int = 100,
        s: float = 1e-2,
        *,
        x0: Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Tensor:
        seed = take_seed(seed, generator)
        x = x0
        if x is None:
            x = _noise.initial((m, *shape), seed=seed, first_chain=first_chain, device=device_of(f))
        sampler = samplers(f, steps=K, step_size=1.0, noise_std=s, maximize=True)
        return sampler(x, seed=seed, noise=noise, first_chain=first_chain)

    return sample_q


def anatomy(
    f: Callable[..., Tensor],
    config: Mapping[str, Any],
    q: Tensor | None = None,
    s_t_0: Tensor | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``sample_s_t(L, init_type, update_s_t_0=True)`` of the anatomy of MCMC-based learning.

        x <- x - dE/dx + epsilon z

    f: the energy E, of any output shape: its sum is what is differentiated. config: ``epsilon``,
    ``batch_size``, ``im_ch``, ``im_sz`` and, for chains from data, ``data_epsilon``; other keys are
    not read. q [N, ...]: the data, for init_type "data". s_t_0 [N, ...]: the persistent states, one
    per datum, for init_type "persistent"; a batch of distinct ones is drawn and, with update_s_t_0,
    written back in place. "uniform" is U(-1, 1), "gaussian" N(0, 1). Returns a function that takes
    ``seed``, ``generator`` and ``noise`` [L, batch_size, ...] besides, and returns (x, r): x
    detached, r a 0-d tensor, the mean over steps and chains of |dE/dx|, from
    :meth:`LangevinSampler.diagnose`.

    Differs: random numbers come from the noise contract; s_t_0 may be on another device than f.
    Source: point0bar1/ebm-anatomy, train_data.py; Nijkamp, Hill, Han, Zhu, Wu, AAAI 2020, sec. 3.
    """
    samplers = Samplers()
    epsilon, n = float(config["epsilon"]), int(config["batch_size"])
    shape = (n, config["im_ch"], config["im_sz"], config["im_sz"])

    def start(init_type: str, seed: int, first_chain: int) -> tuple[Tensor, Tensor | None]:
        if init_type not in INITS:
            raise ValueError(
                f"anatomy: init_type must be one of {', '.join(INITS)}, got {init_type!r}"
            )
        device = device_of(f)
        if init_type == "uniform":
            return _noise.initial(shape, seed=seed, first_chain=first_chain, device=device), None
        if init_type == "gaussian":
            z = _noise.normal(
                shape, seed=seed, step=0, stream=_noise.INITIAL, device=device,
                first_chain=first_chain,
            )  # fmt: skip
            return z, None
        bank, name = (q, "q") if init_type == "data" else (s_t_0, "s_t_0")
        if bank is None:
            raise ValueError(f"anatomy: init_type {init_type!r} needs {name}")
        if bank.shape[0] < n:
            raise ValueError(f"anatomy: {name} holds {bank.shape[0]} states for a batch of {n}")
        slots = draw_distinct(n, bank.shape[0], seed, first_chain).to(bank.device)
        x = bank[slots].to(device or bank.device)
        if init_type == "persistent":
            return x, slots
        z = _noise.normal(
            x.shape, seed=seed, step=0, stream=_noise.DATA, device=x.device,
            first_chain=first_chain,
        )  # fmt: skip
        return x + config["data_epsilon"] * z.to(x.dtype), None

    def sample_s_t(
        L: int,
        init_type: str,
        update_s_t_0: bool = True,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> tuple[Tensor, Tensor]:
        seed = take_seed(seed, generator)
        x, slots = start(init_type, seed, first_chain)
        sampler = samplers(f, steps=L, step_size=1.0, noise_std=epsilon)
        found = measure(sampler, x, seed=seed, noise=noise, first_chain=first_chain)
        if slots is not None and update_s_t_0:
            assert s_t_0 is not None
            s_t_0.data[slots] = found.x.to(s_t_0)
        return found.x, found.grad_norm.mean()

    return sample_s_t


def anatomy_eval(
    f: Callable[..., Tensor], config: Mapping[str, Any], x_s_t_0: Tensor
) -> Callable[..., tuple[Tensor, ...]]:
    """``langevin_grad()`` of the anatomy's evaluation, or ``langevin_mh()``: recorded long chains.

        x <- x - (epsilon^2 / 2) d(E / T)/dx + epsilon z,    or x <- x - d(E / T)/dx at epsilon = 0

    with T = temp_factor train_epsilon^2 / 2, or temp_factor where train_epsilon is 0; each step
    accepted or rejected under ``use_mh_langevin``. f: the energy E, [B] or [B, 1]. config:
    ``num_mcmc_steps`` L, ``epsilon``, ``temp_factor``, ``train_epsilon``, ``use_mh_langevin``;
    other keys are not read. x_s_t_0 [B, ...]: the initial states. Returns a function that takes
    ``seed``, ``generator`` and ``noise`` [L, B, ...] and returns (x, ens, grads): x detached, ens
    [L, B] the energy E / T at every step, grads [L, B] the norm of every move, both on the CPU;
    under ``use_mh_langevin`` also accepts [L], the share of the chains that moved.

    Differs: prints nothing; random numbers come from the noise contract.
    Source: point0bar1/ebm-anatomy, eval.py.
    """
    train_epsilon, epsilon = config["train_epsilon"], float(config["epsilon"])
    temperature = config["temp_factor"] * (train_epsilon**2 / 2 if train_epsilon > 0 else 1)
    adjusted = bool(config.get("use_mh_langevin", False))
    scale = (epsilon**2 / 2 if epsilon > 0 else 1.0) / temperature
    sampler = LangevinSampler(
        f, steps=config["num_mcmc_steps"], step_size=scale, noise_std=epsilon, metropolis=adjusted
    )

    def langevin_grad(
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> tuple[Tensor, ...]:
        found = measure(
            sampler, x_s_t_0, seed=take_seed(seed, generator), noise=noise, first_chain=first_chain
        )
        records = (found.energy / temperature).cpu(), (found.grad_norm * scale).cpu()
        return (
            (found.x, *records, found.accepted.mean(1).cpu()) if adjusted else (found.x, *records)
        )

    return langevin_grad
