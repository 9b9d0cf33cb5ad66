"""An engine is used once its gradient has been autograd's; what runs of an energy leave alone."""

import contextlib
import cProfile
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.gradients import engine_cache
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.fused_cpu import ConvNetGradient
from fastlangevin.gradients.graph.record import record
from fastlangevin.gradients.proof import prove_kernels
from fastlangevin.gradients.trace.replay_engine import ReplayGradient


class Own(nn.Module):
    """Code of other people around torch's modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.net(x).flatten()


def states(n: int) -> Tensor:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(n))


def sampler(energy: Any, **options: Any) -> fl.LangevinSampler:
    settings = {"steps": 3, "step_size": 0.5, "noise_std": 0.0}
    return fl.LangevinSampler(energy, **settings | options)


def factor(engine: type, size: float) -> Any:
    """The engine with a gradient that is wrong by a factor in its last chain."""
    run = engine.__call__

    def wrong(self: Any, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        energies, grad = run(self, x, want_energies)
        grad[-1] *= size
        return energies, grad

    return mock.patch.object(engine, "__call__", wrong)


ENGINES = {"explicit": ExplicitGradient, "fused": ConvNetGradient}


@pytest.mark.parametrize(
    ("size", "name", "code"),
    [
        (0.0, "fused", "torch's code"),
        (0.8, "explicit", "own code"),
        (1.2, "fused", "own code"),
        (-1.0, "explicit", "torch's code"),
        (float("nan"), "fused", "torch's code"),
    ],
)
def test_an_engine_with_another_gradient_is_not_used(size: float, name: str, code: str) -> None:
    energy: nn.Module = Own()
    if code == "torch's code":
        energy = energy.net
    x0 = states(3)
    if name == "explicit":
        energy = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), energy)  # no fused kernels have groups
    want = sampler(energy, gradient="autograd")(x0, seed=0)
    if sampler(energy).choose_engine(x0, {}).name != name:
        pytest.skip("the compiled extension is not here")
    with factor(ENGINES[name], size), factor(ReplayGradient, size):
        run = sampler(energy)
        torch.testing.assert_close(run(x0, seed=0), want, rtol=0, atol=0)
        assert "its gradient differs from autograd's by" in run.explain(x0)
        with pytest.raises(RuntimeError, match=r"differs from autograd's by .* in chain 2"):
            sampler(energy, gradient=name)(x0, seed=0)
    assert run.choose_engine(x0, {}).name == name  # a refusal is not remembered


@pytest.mark.parametrize(
    ("make", "precision"), [(Own, None), (lambda: Own().net, "fp32"), (Own, "bf16")]
)
def test_a_proof_is_made_once_for_a_graph_and_a_batch_size(
    make: Callable[[], nn.Module], precision: str | None
) -> None:
    run = sampler(make(), precision=precision)
    with mock.patch.object(engine_cache, "prove", side_effect=engine_cache.prove) as proofs:
        for n, made in ((2, 1), (2, 1), (3, 2), (2, 2), (3, 2)):
            run(states(n), seed=0)
            assert proofs.call_count == made


@pytest.mark.parametrize(
    ("size", "reason"),
    [(1.0, None), (1.2, None), (0.5, "differs from"), (float("nan"), "differs from"),
     (None, "its kernels raise TypeError")],
)  # fmt: skip
def test_kernels_of_lower_precision_may_be_off_by_rounding_alone(
    size: float | None, reason: str | None
) -> None:
    energy, x = Own().net, states(3)
    recording, results = record(energy, x, {})
    assert results is not None

    class Kernels(ExplicitGradient):
        def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
            energies, grad = super().__call__(x, want_energies)
            return energies, grad * size  # type: ignore[operator]

    verdict = prove_kernels(results, Kernels(recording.graph, x), x)
    assert (verdict.reason or "").find(reason or "") >= 0
    assert (verdict.reason is None) == (reason is None)


def test_states_without_a_gradient_prove_nothing() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.zeros_(net[1].weight)
    nn.init.constant_(net[1].bias, -1.0)
    run = sampler(net)
    with mock.patch.object(engine_cache, "prove", side_effect=engine_cache.prove) as proofs:
        for made in (2, 4):  # at the states of the call, and near them
            run(states(2), seed=0)
            assert proofs.call_count == made


def test_numbers_among_the_arguments_are_those_of_the_call() -> None:
    energy, x0 = Own(), states(2)
    run, general = sampler(energy), sampler(energy, gradient="autograd")
    for scale in (1.0, 3.0, 1.0, -2.0):
        assert run.choose_engine(x0, {"scale": scale}).name != "autograd"
        torch.testing.assert_close(run(x0, seed=0, scale=scale), general(x0, seed=0, scale=scale))
    scales = {"scale": [1.0, 2.0, 3.0]}
    torch.testing.assert_close(
        run(x0, seed=0, step_kwargs=scales), general(x0, seed=0, step_kwargs=scales),
        rtol=0, atol=0,
    )  # fmt: skip


def test_profilers_are_as_they_were() -> None:
    """One in Python gives way for a recording; beside one in C, on Python 3.11, autograd serves."""
    energy, x0 = Own(), states(2)
    want = sampler(energy)(x0, seed=0)
    seen: list[str] = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        seen.append(event)

    sys.setprofile(profile)
    got = sampler(energy)(x0, seed=0)
    after = sys.getprofile()
    sys.setprofile(None)
    assert after is profile
    assert torch.equal(got, want)
    assert seen
    with cProfile.Profile() as counts:
        got = sampler(energy)(x0, seed=0)
    torch.testing.assert_close(got, want)
    assert len(counts.getstats()) > 10


def test_an_energy_that_raises_leaves_nothing() -> None:
    class Raising(Own):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            raise ArithmeticError("no energy")

    energy = Raising()
    before = dict(vars(energy))
    assert (
        "it raises ArithmeticError: no energy"
        in sampler(energy).choose_engine(states(2), {}).why_not[0].reason
    )
    assert vars(energy) == before
    assert sys.getprofile() is None


def test_a_chain_that_is_lost_does_not_hide_the_others() -> None:
    x0 = states(3)
    x0[0] = float("nan")
    assert sampler(Own()).choose_engine(x0, {}).name != "autograd"


class Anchored(nn.Module):
    """An energy that also reads the states of a chain's start, as a constant."""

    def __init__(self, anchor: Tensor | None) -> None:
        super().__init__()
        self.net, self.anchor = nn.Linear(4, 4), anchor

    def forward(self, x: Tensor, anchor: Tensor | None = None) -> Tensor:
        anchor = self.anchor if anchor is None else anchor
        return (torch.tanh(self.net(x)) - torch.tanh(self.net(anchor))).square().sum(1)


@pytest.mark.parametrize("by_argument", [True, False])
def test_the_start_as_a_constant_is_not_the_state(by_argument: bool) -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    energy = Anchored(None if by_argument else x)
    kwargs = {"anchor": x} if by_argument else {}
    sampler = fl.LangevinSampler(energy, 4, 0.1, 0.1)
    assert sampler.choose_engine(x, kwargs).name != "autograd"
    end = sampler(x, seed=0, **kwargs)
    expected = fl.LangevinSampler(energy, 4, 0.1, 0.1, gradient="autograd")(x, seed=0, **kwargs)
    assert torch.allclose(end, expected, atol=1e-5)
    assert torch.equal(x, before)
    assert Anchored.forward(energy, x, **kwargs).abs().max() == 0


def test_no_energy_writes_to_the_start() -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    energies = (
        lambda x: x.mul_(2).square().sum(1),
        lambda x: x.detach().mul_(2).sum(1) + x.square().sum(1),
        lambda x: x.data.mul_(2).sum(1) + x.square().sum(1),
        lambda x: torch.relu_(x.view(-1)).view(x.shape).square().sum(1),
    )
    for energy in energies:
        with contextlib.suppress(RuntimeError):
            fl.LangevinSampler(energy, 2, 0.1, 0.1)(x, seed=0)
        assert torch.equal(x, before)
