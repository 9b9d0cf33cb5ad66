"""The samplers of ebm-anatomy: Nijkamp, Hill, Han, Zhu and Wu; Hill, Mitchell and Zhu."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.chain.chain import check_finite
from fastlangevin.diagnostics import Diagnostics
from fastlangevin.gradients.modules import device_of
from fastlangevin.names import check_name, keywords_checked
from fastlangevin.presets.common import Randomness, Samplers, random_keywords
from fastlangevin.sampler import LangevinSampler

INITS = ("persistent", "data", "uniform", "gaussian")


@keywords_checked
def anatomy(
    f: Callable[..., Tensor],
    config: Mapping[str, Any],
    q: Tensor | None = None,
    s_t_0: Tensor | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``sample_s_t(L, init_type, update_s_t_0=True)`` of the anatomy of MCMC-based learning.

        x <- x - dE/dx + epsilon z

    f: the energy E, of any output shape: its sum is differentiated. config: ``epsilon``,
    ``batch_size``, ``im_ch``, ``im_sz`` and, for chains from data, ``data_epsilon``; other keys are
    not read. q [N, ...]: the data, for init_type "data". s_t_0 [N, ...]: the persistent states, one
    per datum, for init_type "persistent"; a batch of distinct states is drawn and, with
    update_s_t_0, written back in place. "uniform" is U(-1, 1), "gaussian" N(0, 1). Returns a
    function with the presets' keywords (``noise`` is [L, batch_size, ...]). It returns (x, r): x
    is detached; r is a 0-d tensor, the mean over steps and chains of |dE/dx|, from
    :meth:`LangevinSampler.diagnose`.

    Differs: random numbers come from the noise contract; s_t_0 may be on another device than f.
    Source: point0bar1/ebm-anatomy, train_data.py; Nijkamp, Hill, Han, Zhu, Wu, AAAI 2020, sec. 3.
    """
    samplers = Samplers()
    epsilon, n = float(config["epsilon"]), int(config["batch_size"])
    shape = (n, config["im_ch"], config["im_sz"], config["im_sz"])

    def start(init_type: str, seed: int, first_chain: int) -> tuple[Tensor, Tensor | None]:
        """(x0, its slots in s_t_0 or None)."""
        check_name("anatomy: init_type", init_type, INITS)
        device = device_of(f)
        normal = partial(_noise.normal, seed=seed, step=0, first_chain=first_chain)
        if init_type == "uniform":
            return _noise.initial(shape, seed=seed, first_chain=first_chain, device=device), None
        if init_type == "gaussian":
            return normal(shape, stream=_noise.INITIAL, device=device), None
        bank, name = (q, "q") if init_type == "data" else (s_t_0, "s_t_0")
        if bank is None:
            raise ValueError(f"anatomy: init_type {init_type!r} needs {name}")
        if bank.shape[0] < n:
            raise ValueError(f"anatomy: {name} holds {bank.shape[0]} states for a batch of {n}")
        words = _noise.words(
            (1, bank.shape[0]), seed=seed, step=0, stream=_noise.ORDER, first_chain=first_chain
        )
        slots = words[0].argsort(stable=True)[:n].to(bank.device)
        x = bank[slots].to(device or bank.device)
        if init_type == "persistent":
            return x, slots
        z = normal(x.shape, stream=_noise.DATA, device=x.device)
        return x + config["data_epsilon"] * z.to(x.dtype), None

    @random_keywords
    def sample_s_t(
        L: int, init_type: str, update_s_t_0: bool = True, *, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        x, slots = start(init_type, random.seed, random.first_chain)
        sampler = samplers(f, steps=L, step_size=1.0, noise_std=epsilon)
        chains = _diagnose(sampler, x, random)
        if slots is not None and update_s_t_0:
            assert s_t_0 is not None
            s_t_0.data[slots] = chains.x.to(s_t_0)
        return chains.x, chains.grad_norm.mean()

    return sample_s_t


@keywords_checked
def anatomy_eval(
    f: Callable[..., Tensor], config: Mapping[str, Any], x_s_t_0: Tensor
) -> Callable[..., tuple[Tensor, ...]]:
    """``langevin_grad()`` or ``langevin_mh()`` of the anatomy's evaluation: recorded long chains.

        x <- x - (epsilon^2 / 2) d(E / T)/dx + epsilon z,    or x <- x - d(E / T)/dx at epsilon = 0

    with T = temp_factor train_epsilon^2 / 2, or temp_factor if train_epsilon is 0. With
    ``use_mh_langevin`` each step is accepted or rejected. f: the energy E, [B] or [B, 1]. config:
    ``num_mcmc_steps`` L, ``epsilon``, ``temp_factor``, ``train_epsilon``, ``use_mh_langevin``;
    other keys are not read. x_s_t_0 [B, ...]: the initial states. Returns a function with the
    presets' keywords (``noise`` is [L, B, ...]). It returns (x, ens, grads): x is detached; ens
    [L, B], the energy E / T at every step, and grads [L, B], the norm of every move, are on the
    CPU. With ``use_mh_langevin`` it also returns accepts [L], the share of the chains that moved.

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

    @random_keywords
    def langevin_grad(*, random: Randomness) -> tuple[Tensor, ...]:
        chains = _diagnose(sampler, x_s_t_0, random)
        records = [(chains.energy / temperature).cpu(), (chains.grad_norm * scale).cpu()]
        if adjusted:
            records.append(chains.accepted.mean(1).cpu())
        return chains.x, *records

    return langevin_grad


def _diagnose(sampler: LangevinSampler, x: Tensor, random: Randomness) -> Diagnostics:
    chains = sampler.diagnose(x, **random._asdict())
    check_finite(chains.x, None, sampler.steps)
    return chains
