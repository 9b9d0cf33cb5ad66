"""Annealed schedules against their formulas, and what chains along them sample."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl


@pytest.mark.parametrize("form", [list, torch.tensor], ids=["list", "tensor"])
def test_annealing_levels_have_the_papers_step_sizes_and_noise(form: Callable) -> None:
    sigmas, each, rate = [8.0, 2.0, 0.5], 4, 3e-4
    plan = fl.anneal.levels(form(sigmas), steps_each=each, step_lr=rate)
    assert plan.steps == 12
    for k in range(12):
        i = k // each
        alpha = rate * (sigmas[i] / sigmas[-1]) ** 2
        assert plan.level[k] == i
        assert plan.sigma[k] == sigmas[i]
        assert plan.step_size[k] == pytest.approx(alpha, rel=1e-14)
        assert plan.noise_std[k] == pytest.approx(math.sqrt(2 * alpha), rel=1e-14)


def test_annealed_chains_find_both_modes_where_plain_ones_stay() -> None:
    """The exact score of 0.2 N(-4, 0.1^2) + 0.8 N(4, 0.1^2), blurred by sigma.

    The part to the left is 0.2 in the limit of many slow levels. Few freeze it earlier, where the
    blurred modes are less unequal: at 0.24 over these, with a standard error of 0.007.
    """
    n, spread, weights = 4000, 0.1, torch.tensor([0.2, 0.8])
    centres = torch.tensor([-4.0, 4.0])

    def score(x: Tensor, sigma: float) -> Tensor:
        variance = spread**2 + sigma**2
        logits = weights.log() - (x - centres) ** 2 / (2 * variance)
        return (logits.softmax(1) * (centres - x)).sum(1, keepdim=True) / variance

    sigmas = fl.anneal.geometric(8.0, 0.05, 16)
    plan = fl.anneal.levels(sigmas, steps_each=20, step_lr=0.1 * 0.05**2)
    run = fl.LangevinSampler.from_score(
        score, steps=plan.steps, step_size=plan.step_size, noise_std=plan.noise_std
    )
    x = run(torch.full((n, 1), 4.0), seed=0, step_kwargs={"sigma": plan.sigma})
    left = float((x < 0).double().mean())
    assert 0.2 < left < 0.3
    assert float((x.abs() - 4).abs().max()) < 1.0
    plain = fl.LangevinSampler.from_score(
        score, steps=plan.steps, step_size=plan.step_size[-1], noise_std=plan.noise_std[-1]
    )
    assert bool((plain(torch.full((n, 1), 4.0), seed=0, sigma=0.05) > 0).all())


def test_linear_harmonic_and_geometric() -> None:
    assert fl.anneal.linear(0.8, 4) == pytest.approx([0.6, 0.4, 0.2, 0.0])
    assert fl.anneal.harmonic(0.6, 3) == pytest.approx([0.6, 0.3, 0.2])
    assert fl.anneal.geometric(8.0, 1.0, 4) == pytest.approx([8.0, 4.0, 2.0, 1.0])
    assert fl.anneal.geometric(8.0, 1.0, 1) == [8.0]


def test_a_sampler_accepts_annealing_schedules() -> None:
    """b_K-1 = 0: the last step adds no noise, so that its end is a function of the state before."""
    run = fl.LangevinSampler(
        fl.GaussianEnergy(), steps=5, step_size=1.0, noise_std=fl.anneal.linear(0.5, 5)
    )
    trajectory = run.trajectory(torch.ones(3, 2), seed=0)
    assert torch.equal(trajectory[-1], torch.zeros(3, 2))
    assert not torch.equal(trajectory[-2], torch.zeros(3, 2))


WRONG = [
    (lambda: fl.anneal.levels([], 2, 0.1), "sigmas must be one or more values > 0, got"),
    (lambda: fl.anneal.levels([1.0, 0.0], 2, 0.1), "sigmas must be one or more values > 0"),
    (lambda: fl.anneal.levels([1.0, math.nan], 2, 0.1), "sigmas must be finite"),
    (lambda: fl.anneal.levels([1.0], 0, 0.1), "steps_each must be at least 1, got 0"),
    (lambda: fl.anneal.levels([1.0], 2, -0.1), "step_lr must be finite and >= 0, got -0.1"),
    (lambda: fl.anneal.geometric(1.0, 0.0, 3), "first and last must be > 0, got 1.0 and 0.0"),
    (lambda: fl.anneal.linear(math.inf, 3), "value must be finite and >= 0, got inf"),
    (lambda: fl.anneal.harmonic(1.0, 0), "steps must be at least 1, got 0"),
]


@pytest.mark.parametrize(("make", "match"), WRONG, ids=[w[1] for w in WRONG])
def test_impossible_annealing_schedules_are_refused(make: Callable, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_cooldown_follows_the_chain_and_adds_no_noise() -> None:
    net = fl.ConvEnergy(1, 8, 4)
    sampler = fl.LangevinSampler(net, steps=3, step_size=2.0, noise_std=0.1, clamp=(-1, 1))
    cooled = fl.LangevinSampler(net, **fl.anneal.cooldown(sampler.settings(), 3))
    assert cooled.clamp == (-1, 1)
    assert cooled.step_size == pytest.approx([2.0, 2.0, 2.0, 1.0, 10**-0.5, 0.1])
    states = cooled.trajectory(n=4, seed=1)
    assert torch.equal(states[3], sampler(n=4, seed=1))
    descent = fl.LangevinSampler(
        net, 3, step_size=cooled.step_size[3:], noise_std=0.0, clamp=(-1, 1)
    )
    assert torch.equal(states[-1], descent(states[3], seed=2))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step_size", [1.0, 0.5], r"step_size must be a number, and not a schedule"),
        ("noise_std", torch.tensor([0.1, 0.2]), r"noise_std must be a number, and not a schedule"),
    ],
)
def test_a_cooldown_of_a_schedule_is_refused(name: str, value: Any, message: str) -> None:
    sampler = fl.LangevinSampler(fl.GaussianEnergy(), steps=2, **{name: value})
    with pytest.raises(TypeError, match=message):
        fl.anneal.cooldown(sampler.settings())
    with pytest.raises(ValueError, match="cooldown: steps must be"):
        fl.anneal.cooldown({"steps": 2, "step_size": 1.0, "noise_std": 0.1}, steps=0)
