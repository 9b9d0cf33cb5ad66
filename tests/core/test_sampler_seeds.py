"""Seeds, starts, shards and resumed chains, bit for bit; the exact stationary law."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from tests.core.sampler_shared import (
    OPTIONS,
    ORDERS,
    SHAPE,
    N,
    contract_noise,
    double_well,
    everything,
    last,
    numbers,
    plain_chain,
    sampler,
)


@pytest.mark.parametrize(
    ("by", "method"),
    [
        ("default generator", "__call__"),
        ("generator", "__call__"),
        ("generator", "trajectory"),
        ("default generator", "diagnose"),
    ],
)
def test_a_missing_seed_is_one_draw_of_the_generator(by: str, method: str) -> None:
    x0, run = torch.zeros(3, 5), sampler(fl.GaussianEnergy())

    def sample() -> Tensor:
        options = {} if by == "default generator" else {"generator": generator}
        got = getattr(run, method)(x0, **options)
        return got if isinstance(got, Tensor) else got.x

    generator = torch.Generator()
    first = torch.default_generator if by == "default generator" else generator
    first.manual_seed(3)
    one, two = sample(), sample()
    after = first.get_state()
    first.manual_seed(3)
    assert torch.equal(sample(), one)
    assert torch.equal(sample(), two)
    assert (one == two).double().mean() < 0.5
    first.manual_seed(3)
    seeds = fl.noise.draw_seed(first), fl.noise.draw_seed(first)
    assert torch.equal(first.get_state(), after)
    if method == "__call__":
        assert torch.equal(run(x0, seed=seeds[0]), one)
        assert torch.equal(run(x0, seed=seeds[1]), two)


def test_a_generator_leaves_the_default_one_alone() -> None:
    before = torch.get_rng_state()
    sampler(fl.GaussianEnergy())(torch.zeros(3, 5), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, np.int64(12), np.uint64(2**63)], ids=repr)
def test_legal_seeds(x0: Tensor, net: nn.Module, seed: Any) -> None:
    want = last(plain_chain(net, x0, contract_noise(SHAPE, int(seed))))
    assert torch.allclose(sampler(net)(x0, seed=seed), want, atol=1e-12)


@pytest.mark.parametrize("first_chain", [0, 5])
@pytest.mark.parametrize("method", ["__call__", "trajectory"])
def test_chains_from_the_papers_p0(method: str, first_chain: int) -> None:
    """x0 = 2 u - 1 from the seed's own stream of initial states."""
    energy = fl.ConvEnergy(channels=1, size=8, width=2)
    u = fl.noise.uniform((6, 1, 8, 8), seed=9, step=0, stream=1, first_chain=first_chain)
    options = {"seed": 9, "first_chain": first_chain}
    run = getattr(sampler(energy), method)
    got, want = run(n=6, **options), run(2 * u - 1, **options)
    assert torch.equal(got, want)
    if method == "trajectory":
        assert torch.equal(got[0], 2 * u - 1)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_is_its_shards(options: dict) -> None:
    run = sampler(double_well, steps=7, step_size=0.02, **options)
    x0 = numbers((64, 3, 5, 7), torch.float32)
    whole = run(x0, seed=4, first_chain=32)
    parts = [run(x0[i : i + 16], seed=4, first_chain=32 + i) for i in range(0, 64, 16)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_chain_is_its_parts(options: dict) -> None:
    """20 steps are 12 and then 8 more."""
    run = functools.partial(sampler, double_well, step_size=0.02, **options)
    x0 = numbers((N, 3, 5, 7), torch.float32)
    whole = run(steps=20)(x0, seed=4, first_step=10)
    part = run(steps=12)(x0, seed=4, first_step=10)
    assert torch.equal(run(steps=8)(part, seed=4, first_step=22), whole)


@pytest.mark.parametrize("spectral", [False, True], ids=["", "spectral norm"])
def test_a_chain_is_its_parts_in_train_mode(x0: Tensor, spectral: bool) -> None:
    """Batch statistics, dropout and power iteration, too, do not remember where a run was cut."""
    energy = everything(spectral=spectral)
    run = functools.partial(sampler, energy, step_size=0.02)
    whole, part = run(steps=10)(x0, seed=4), run(steps=6)(x0, seed=4)
    assert torch.equal(run(steps=4)(part, seed=4, first_step=6), whole)


@pytest.mark.parametrize("spectral", [False, True], ids=["", "spectral norm"])
@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_the_same_numbers_with_and_without_a_graph(
    x0: Tensor, checkpoint: str, spectral: bool
) -> None:
    run = sampler(everything(spectral=spectral), step_size=0.02)
    got = run(x0, seed=4, differentiable=True, checkpoint=checkpoint)
    assert torch.allclose(got, run(x0, seed=4), rtol=0, atol=1e-12)


CHAINS = (64, 2**14)


def stationary_score(noise: float, noise_order: str = "after") -> float:
    """Standard errors between a chain's variance, of N = 2^20, and the law's for b = 0.5.

    From x0 = 0 the variance is its limit times 1 - (1 - a / s)^2K: here 1 - 4e-8.
    """
    energy, a, b = fl.GaussianEnergy(2.0), 1.0, 0.5
    run = fl.LangevinSampler(energy, 12, a, noise * b, noise_order=noise_order)
    x = run(torch.zeros(CHAINS), seed=0).double()
    limit = energy.stationary_variance(a, b)
    if noise_order == "before":
        limit *= (1 - a / 2.0) ** 2  # the chain is looked at after the move, not after the noise
    return float(x.square().mean() / limit - 1) / math.sqrt(2 / x.numel())


@pytest.mark.parametrize("noise_order", ORDERS)
def test_stationary_variance(noise_order: str) -> None:
    assert abs(stationary_score(1.0, noise_order)) <= 5


def test_one_percent_too_much_noise_fails() -> None:
    assert stationary_score(1.01) > 5
