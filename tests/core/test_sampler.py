"""LangevinSampler against a loop in plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from tests.core.sampler_shared import (
    CLAMPS,
    CLIPS,
    ORDERS,
    SCHEDULES,
    SHAPE,
    K,
    contract_noise,
    double_well,
    last,
    numbers,
    plain_chain,
    sampler,
    spelled_out,
)
from tests.pairwise import pairwise


@pytest.mark.parametrize(
    ("noise_order", "clamp", "grad_clip", "maximize"),
    pairwise(ORDERS, CLAMPS, CLIPS, [False, True]),
    ids=str,
)
def test_chains_match_a_plain_loop_under_every_option(
    net: nn.Module, x0: Tensor, noise_order: str, clamp: Any, grad_clip: Any, maximize: bool
) -> None:
    """With supplied noise, and with the contract's."""
    options = {
        "noise_order": noise_order, "clamp": clamp, "grad_clip": grad_clip, "maximize": maximize
    }  # fmt: skip
    z = numbers((K, *SHAPE), seed=1)
    run = sampler(net, **options)
    assert torch.allclose(run(x0, noise=z), last(plain_chain(net, x0, z, **options)), atol=1e-12)
    first = {"first_chain": 1000, "first_step": 2000}
    z = contract_noise(SHAPE, seed=7, **first)
    want = last(plain_chain(net, x0, z, **options))
    assert torch.allclose(run(x0, seed=7, **first), want, atol=1e-12)


def test_every_option_of_the_cases_changes_the_chain(net: nn.Module, x0: Tensor) -> None:
    """Orders, clamp, clips and sign all change the chain, so that the test above can fail."""
    z = numbers((K, *SHAPE), seed=1)
    variants = [{"noise_order": order, "clamp": CLAMPS[1]} for order in ORDERS]
    variants += [{"grad_clip": clip} for clip in CLIPS] + [{"maximize": True}]
    ends = [last(plain_chain(net, x0, z, **options)) for options in variants]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(ends) for b in ends[:i])
    grads = [step["grad"] for step in plain_chain(net, x0, z)]
    norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads])
    assert norms.min() < CLIPS[2][1] < norms.max()
    assert grads[0].abs().min() < CLIPS[1] < grads[0].abs().max()


@pytest.mark.parametrize(
    ("name", "form", "noise_order"),
    [
        (name, form, ORDERS[(i + j) % 3])
        for i, form in enumerate(SCHEDULES)
        for j, name in enumerate(("step_size", "noise_std"))
    ],
)
def test_chains_match_a_plain_loop_under_schedules(
    net: nn.Module, x0: Tensor, name: str, form: str, noise_order: str
) -> None:
    schedule, z = SCHEDULES[form](), numbers((K, *SHAPE), seed=1)
    got = sampler(net, **{name: schedule}, noise_order=noise_order)(x0, noise=z)
    plain = {name: spelled_out(schedule)}
    want = last(plain_chain(net, x0, z, **plain, noise_order=noise_order))
    assert torch.allclose(got, want, atol=1e-12)


def test_one_sampler_serves_several_batch_sizes(net: nn.Module) -> None:
    run = sampler(net, step_size=torch.linspace(0.1, 0.5, K, dtype=torch.float64).view(K, 1))
    for n in (1, 3):
        z, x = numbers((K, n, *SHAPE[1:]), seed=1), numbers((n, *SHAPE[1:]))
        want = last(plain_chain(net, x, z, step_size=spelled_out(run.step_size)))
        assert torch.allclose(run(x, noise=z), want, atol=1e-12)


@pytest.mark.parametrize("noise_order", ORDERS)
def test_without_noise_it_is_gradient_descent_exactly(noise_order: str) -> None:
    x = x0 = 0.3 * numbers((3, 37), torch.float32)
    for _ in range(K):
        x = x - 0.0625 * (4 * x * (x * x - 1))
    run = sampler(double_well, step_size=0.0625, noise_std=0, noise_order=noise_order)
    ends = [run(x0, seed=seed) for seed in (0, 1)]
    assert torch.equal(*ends)
    assert torch.allclose(ends[0], x, atol=1e-6)


def test_sampler_defaults_are_the_papers(net: nn.Module, x0: Tensor) -> None:
    run = fl.LangevinSampler(net)
    z = contract_noise(SHAPE, seed=3, steps=100)
    want = last(plain_chain(net, x0, z, step_size=1.0, noise_std=0.01))
    assert torch.allclose(run(x0, seed=3), want, atol=1e-11)
