"""Chains that the extension runs many steps at a time: the same bits as one step at a time."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.gradients import fused_cpu
from fastlangevin.gradients.fused_cpu import ConvNetGradient
from fastlangevin.kernels import extension
from fastlangevin.kernels.native import Update

pytestmark = pytest.mark.skipif(extension.library is None, reason="the extension is not built")
K, N = 6, 7


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 20), nn.SiLU(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 1))


def conv() -> nn.Module:
    torch.manual_seed(0)
    return fl.ConvEnergy(size=8, width=4)


NETWORKS = {"mlp": (mlp, (3,)), "conv": (conv, (3, 8, 8))}
SETTINGS: dict[str, dict[str, Any]] = {
    "numbers": {"step_size": 0.1, "noise_std": 0.01},
    "schedules": {"step_size": [0.1 * k for k in range(K)], "noise_std": [0.1, 0, 0.2, 0, 0, 0.1]},
    "a tensor per chain": {"step_size": numbers(N), "noise_std": numbers(N, seed=1).double()},
    "a tensor per step and chain": {"step_size": numbers(K, N), "noise_std": numbers(K, 1)},
    "no noise": {"noise_std": 0.0, "maximize": True},
    "noise first": {"noise_order": "before", "noise_std": [0.1 * (k % 2) for k in range(K)]},
    "noise last": {"noise_order": "last", "clamp": (-0.5, 0.5)},
    "bounds": {"clamp": (-0.5, 0.5), "grad_clip": 1e-3},
    "bf16": {"precision": "bf16"},
}  # fmt: skip


def counted(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result, and how many calls of the extension took several steps."""
    with mock.patch.object(
        ConvNetGradient, "advance_", autospec=True, side_effect=ConvNetGradient.advance_
    ) as advance:
        return run(), advance.call_count


@pytest.mark.parametrize(
    ("network", "name"),
    [
        *(("mlp", name) for name in SETTINGS),
        *(("conv", name) for name in ("a tensor per chain", "noise last", "bf16")),
    ],
)
def test_blocks_are_steps_one_by_one(network: str, name: str) -> None:
    make, shape = NETWORKS[network]
    x = numbers(N, *shape)
    sampler = fl.LangevinSampler(make(), K, **SETTINGS[name], gradient="fused")
    call = {"seed": 3, "first_chain": 5, "first_step": 2}
    states, count = counted(lambda: sampler.trajectory(x, every=1, **call))
    assert count == 0
    end, count = counted(lambda: sampler(x, **call))
    assert count > 0
    assert not torch.equal(end, x)
    assert torch.equal(end, states[-1])
    some, count = counted(lambda: sampler.trajectory(x, every=4, **call))
    assert count > 0
    assert torch.equal(some, states[[0, 4]])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("chunk", [1, 5])
def test_no_split_changes_bits(
    network: str, chunk: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = NETWORKS[network]
    x, energy = numbers(N, *shape), make()

    def run(x: Tensor, first_chain: int) -> Tensor:
        sampler = fl.LangevinSampler(energy, K, 0.1, 0.1, gradient="fused")
        return sampler(x, seed=1, first_chain=first_chain)

    expected = run(x, 0)
    chunks = dict.fromkeys(fused_cpu._CHUNKS, ((chunk, 2**21),))
    monkeypatch.setattr(fused_cpu, "_CHUNKS", chunks)
    for count in (1, 3):
        threads(count)
        for cut in (0, 4):
            assert torch.equal(torch.cat([run(x[:cut], 0), run(x[cut:], cut)]), expected)


def test_states_in_any_layout() -> None:
    x = numbers(N, 3, 8, 8)
    wide = torch.zeros(N, 3, 8, 16)[..., ::2].copy_(x)
    across = torch.zeros(3, 8, 8, N).permute(3, 0, 1, 2).copy_(x)
    sampler = fl.LangevinSampler(conv(), K, 0.1, 0.1, gradient="fused")
    expected = sampler(x, seed=0)
    for other in (x.contiguous(memory_format=torch.channels_last), wide, across):
        end, count = counted(lambda other=other: sampler(other, seed=0))
        assert count > 0
        assert torch.equal(end, expected)


def test_a_state_that_the_network_sees_only_in_a_copy() -> None:
    energy = nn.Sequential(nn.Flatten(), nn.Linear(24, 9), nn.SiLU(), nn.Linear(9, 1))
    x = numbers(N, 2, 3, 4)
    sampler = fl.LangevinSampler(energy, K, 0.1, 0.1, gradient="fused")
    end, count = counted(lambda: sampler(x.contiguous(memory_format=torch.channels_last), seed=0))
    assert count == 0
    assert torch.equal(end, sampler(x, seed=0))


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"grad_clip": ("chain_norm", 0.1)}, {}),
        ({"backend": "reference"}, {}),
        ({}, {"noise": torch.zeros(K, N, 3)}),
        ({"metropolis": True}, {}),
    ],
)
def test_calls_that_need_each_gradient_run_step_by_step(
    settings: dict[str, Any], call: dict[str, Any]
) -> None:
    sampler = fl.LangevinSampler(mlp(), K, 0.1, 0.1, **settings)
    end, count = counted(lambda: sampler(numbers(N, 3), seed=0, **call))
    assert count == 0
    assert bool(end.isfinite().all())


def test_the_energies_are_those_at_the_last_gradient(threads: Callable[[int], None]) -> None:
    energy, x = mlp(), numbers(N, 3)
    sampler = fl.LangevinSampler(energy, K, 0.1, 0.1, noise_order="before")
    for count in (1, 3):
        threads(count)
        engine = sampler.choose_engine(x, {}).engine
        assert isinstance(engine, ConvNetGradient)
        engine.begin()
        end = x.clone()
        options = {"seed": 0, "first_chain": 0, "clamp": None, "grad_clip": None}
        updates = [Update(True, 0.1, 0.0, 0), Update(True, 0.1, 0.0, 1), Update(False, 0.0, 0.1, 1)]
        energies = engine.advance_(end, updates, True, **options, maximize=False, noise_last=False)
        middle = x - 0.1 * engine(x, False)[1]
        assert energies is not None
        assert torch.allclose(energies, energy(middle).flatten(), rtol=1e-5)


def test_a_long_call_returns_to_python_often(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(N, 3)
    sampler = fl.LangevinSampler(mlp(), K, 0.1, 0.1)
    expected = sampler(x, seed=0)
    monkeypatch.setattr(fused_cpu, "_BLOCK_SECONDS", 0.0)
    end, count = counted(lambda: sampler(x, seed=0))
    assert count == K
    assert torch.equal(end, expected)


def test_weights_that_change_between_calls_are_read() -> None:
    energy, x = mlp(), numbers(N, 3)
    sampler = fl.LangevinSampler(energy, K, 0.1, 0.1)
    before = sampler(x, seed=0)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(2)
    after, count = counted(lambda: sampler(x, seed=0))
    assert count > 0
    assert not torch.equal(after, before)
    assert torch.equal(after, fl.LangevinSampler(energy, K, 0.1, 0.1)(x, seed=0))


def test_a_chain_that_is_not_finite_is_reported() -> None:
    x = numbers(N, 3)
    x[2] = float("nan")
    with pytest.raises(FloatingPointError, match="1 of 7 chains"):
        fl.LangevinSampler(mlp(), K, 0.1, 0.1)(x, seed=0)
