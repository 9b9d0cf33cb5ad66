"""Energies whose modules keep tensors that each run computes, such as weights and activations."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlangevin import LangevinSampler
from fastlangevin.gradients import engine_cache, fused_cpu, onednn

N, SHAPE, STEPS = 3, (2, 5, 5), 4


class KeepsItsWeight(nn.Module):
    """A convolution that keeps the weight that each forward computes as an attribute."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.conv, self.reads = nn.Conv2d(2, 4, 3, padding=1), reads
        self.kept = torch.ones_like(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight / self.conv.weight.detach().norm()
        before, self.kept = self.kept, weight
        out = F.conv2d(x, weight, padding=1).tanh().flatten(1).sum(1)
        return out * before.mean() if self.reads else out


@pytest.mark.parametrize("reads", [False, True])
def test_a_weight_kept_as_an_attribute_is_recorded_unless_it_is_read(reads: bool) -> None:
    torch.manual_seed(0)
    energy = KeepsItsWeight(reads)
    kept, x0 = energy.kept, torch.randn(N, *SHAPE)
    choice = LangevinSampler(energy, 2).choose_engine(x0, {})
    assert (choice.name == "autograd") == reads
    assert energy.kept is kept
    if not reads:
        run = LangevinSampler(energy, 2)
        with mock.patch.object(engine_cache, "record", side_effect=engine_cache.record) as runs:
            for _ in range(3):
                run(x0, seed=0)
                energy(x0)  # as training does, between two calls
            assert runs.call_count == 1
    ends = []
    for gradient in ("auto", "autograd"):
        energy.kept = kept
        ends.append(LangevinSampler(energy, 3, 0.05, gradient=gradient)(x0, seed=0))
    torch.testing.assert_close(*ends)


class Keeps(nn.Module):
    """An energy that keeps its hidden layer; ``factor`` may read what the last run kept."""

    def __init__(self, factor: Callable[["Keeps"], Any] = lambda module: 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.factor, self.count = factor, 0
        self.hidden: Tensor | None = None
        self.older: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor(self)
        self.hidden = self.first(x)
        if self.hidden.requires_grad:
            self.hidden.retain_grad()
        return (self.second(F.silu(self.hidden)) * factor).flatten(1).sum(1)


def sampler(energy: nn.Module, **options: Any) -> LangevinSampler:
    return LangevinSampler(energy, STEPS, 0.1, 0.05, **options)


def of_value(module: Keeps) -> Any:
    return 1.0 if module.hidden is None else module.hidden.detach().mean().tanh()


def of_data(module: Keeps) -> Any:
    return 1.0 if module.hidden is None else module.hidden.data.mean().tanh()


def of_gradient(module: Keeps) -> Any:
    hidden = module.hidden
    return 1.0 if hidden is None or hidden.grad is None else hidden.grad.mean().tanh() + 2


def of_shape(module: Keeps) -> Any:
    return 1.0 if module.hidden is None else len(module.hidden)


def of_whether_it_has_a_gradient(module: Keeps) -> Any:
    return 1.0 if module.hidden is None or module.hidden.grad is None else 2.0


def of_one_before(module: Keeps) -> Any:
    module.older = module.hidden
    return 1.0


def of_count(module: Keeps) -> Any:
    module.count += 1
    return 1.0 + module.count


STATEFUL = [
    of_value, of_data, of_gradient, of_shape, of_whether_it_has_a_gradient, of_one_before, of_count,
]  # fmt: skip


def test_an_energy_that_keeps_its_activations_is_not_left_to_autograd() -> None:
    x0 = torch.randn(N, *SHAPE)
    energy, plain = Keeps(), Keeps()
    run, loop = sampler(energy), sampler(plain, gradient="autograd")
    with mock.patch.object(engine_cache, "record", side_effect=engine_cache.record) as runs:
        for seed in range(8):
            torch.testing.assert_close(run(x0, seed=seed), loop(x0, seed=seed))
            # The activations of the last step, as the energy's own code leaves them.
            assert energy.hidden is not None
            assert energy.hidden.requires_grad
            torch.testing.assert_close(energy.hidden, plain.hidden)
        assert runs.call_count == 2  # the first found no earlier activations
    assert run.choose_engine(x0, {}).name != "autograd"
    assert "the last step runs the energy itself" in str(run.explain(x0))
    with torch.no_grad():
        for parameter in (*energy.parameters(), *plain.parameters()):
            parameter.mul_(0.9)
    torch.testing.assert_close(run(x0, seed=0), loop(x0, seed=0))


@pytest.mark.parametrize("factor", STATEFUL, ids=lambda factor: factor.__name__)
def test_an_energy_that_reads_what_it_kept_stays_with_autograd(
    factor: Callable[[Keeps], Any],
) -> None:
    x0 = torch.randn(N, *SHAPE)
    energy, plain = Keeps(factor), Keeps(factor)
    run, loop = sampler(energy), sampler(plain, gradient="autograd")
    for seed in range(4):
        for module in (energy, plain):
            module(x0[:2])  # as training does, with a batch of another size
        torch.testing.assert_close(run(x0, seed=seed), loop(x0, seed=seed))
    assert run.choose_engine(x0, {}).name == "autograd"


def test_energies_of_all_steps_come_from_the_energy_that_keeps_its_activations() -> None:
    x0 = torch.randn(N, *SHAPE)
    energy = Keeps()
    energy(x0)
    found = sampler(energy).diagnose(x0, seed=0)
    want = sampler(Keeps(), gradient="autograd").diagnose(x0, seed=0)
    torch.testing.assert_close(found.energy, want.energy)


@pytest.mark.parametrize("activation", [F.silu, torch.cos], ids=["fused", "replayed"])
def test_the_last_step_is_in_float32_if_the_others_are_for_lack_of_bfloat16(
    activation: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cpu, "why_float32", lambda: "bfloat16 is not faster")
    monkeypatch.setattr(onednn, "runs", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(F, "silu", activation)
    x0 = torch.randn(N, *SHAPE)
    ends = []
    for precision in ("bf16", "fp32"):
        energy = Keeps()
        energy(x0)  # an activation to replace
        ends.append(sampler(energy, precision=precision).diagnose(x0, seed=0))
        ends.append(sampler(energy, precision=precision)(x0, seed=0))
        assert energy.hidden is not None
        assert energy.hidden.dtype == torch.float32
    torch.testing.assert_close(ends[0].energy, ends[2].energy)
    torch.testing.assert_close(ends[1], ends[3])


def test_chains_of_energies_that_keep_activations_can_be_differentiated() -> None:
    x0 = torch.randn(N, *SHAPE, dtype=torch.float64)
    energy = Keeps().double()
    energy(x0)  # an activation to replace
    gradients = []
    for gradient in ("auto", "autograd"):
        run = sampler(energy, gradient=gradient)
        run(x0, seed=0, differentiable=True).pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in energy.parameters()])
        energy.zero_grad(set_to_none=True)
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
