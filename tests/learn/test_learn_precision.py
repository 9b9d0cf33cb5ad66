"""The precision of the learning step: what torch's autocast computes, with float32 weights."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.distributed import Group
from fastlangevin.learn import TrainConfig, resolve, train
from fastlangevin.learn.build import build_learner
from fastlangevin.learn.config import MARK
from tests.distributed.threads import run_ranks
from tests.learn.learner_shared import (
    Normed,
    Recorder,
    images,
    learner,
    net,
    same_state,
    sampler,
    state,
)
from tests.learn.train_shared import CutError, assert_same_end, cut_at

SEED = 5  # of learner_shared's learners


class Watched(nn.Module):
    """A network that remembers the dtypes of its hidden layer, for states with a graph or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 1)
        self.seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        self.seen[x.requires_grad].add(hidden.dtype)
        return self.last(hidden.tanh()).flatten()


def learned(energy: nn.Module | None = None, iterations: int = 3, **options: Any) -> dict:
    """The state of a learner after some iterations on a network, by default a fresh one."""
    learning = learner(sampler(energy, precision="fp32"), **options)
    for _ in range(iterations):
        learning.step()
    return state(learning)


def learned_by_hand(energy: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Algorithm 1 with torch's autocast: every batch casts the weights for itself."""
    adam, chain = torch.optim.Adam(energy.parameters(), lr=1e-2), sampler(energy)
    for iteration, rows in enumerate(batches):
        data = images()[rows]
        data = data + 0.1 * fl.noise.normal(data.shape, seed=SEED, step=iteration, stream=2)
        samples = chain(n=len(rows), seed=fl.noise.fold_in(SEED, iteration))
        energies = []
        for x in (data, samples):
            with torch.autocast("cpu", torch.bfloat16):
                energies.append(energy(x))
            assert energies[-1].dtype == torch.bfloat16
        adam.zero_grad()
        ((energies[0].float().sum() - energies[1].float().sum()) / len(rows)).backward()
        adam.step()
    return [p.detach() for p in energy.parameters()]


def test_bf16_learns_the_weights_of_a_plain_loop_under_autocast() -> None:
    energy, data = net(), Recorder(images())
    by_hand = copy.deepcopy(energy)
    learning = learner(sampler(energy), data, precision="bf16")
    for _ in range(3):
        learning.step()
    wanted = learned_by_hand(by_hand, data.indices)
    assert all(torch.equal(p, w) for p, w in zip(energy.parameters(), wanted, strict=True))
    assert not same_state(state(learning), learned())


def test_weights_their_average_and_moments_stay_float32() -> None:
    tensors = learned(Normed(), precision="bf16", ema=0.9)
    kinds = {name: t.dtype for name, t in tensors.items() if t.is_floating_point()}
    assert set(kinds.values()) == {torch.float32}
    assert any(name.startswith("adam.exp_avg_sq") for name in kinds)


@pytest.mark.parametrize("chain", ["fp32", "bf16"])
@pytest.mark.parametrize("learning", ["fp32", "bf16"])
def test_the_chain_and_the_learning_step_have_precisions_of_their_own(
    chain: str, learning: str
) -> None:
    energy = Watched()
    options = {"precision": chain, "gradient": "autograd"}
    made = learner(sampler(energy, **options), precision=learning)
    made.step()
    of = {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    assert energy.seen == {True: of[chain], False: of[learning]}


def test_the_sum_of_energies_is_not_rounded_to_bf16() -> None:
    """The mean of n energies of 1 and 1 + 2^-7 has more digits than bfloat16."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 1))

        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, :1]
            return ((torch.where(first > 0, 1 + 2**-7, 1.0) + 0 * first) @ self.scale).flatten()

    data = images(64)
    metrics = learner(
        sampler(Steps(), gradient="autograd"), data, batch_size=64, data_noise=0.0, precision="bf16"
    ).step()
    ups = (metrics.energy_data - 1) * 2**7 * 64
    assert ups == pytest.approx(round(ups), abs=1e-4)
    assert 0 < round(ups) < 64


def test_every_number_of_processes_learns_the_same_bits() -> None:
    def work(group: Group) -> dict[str, Tensor]:
        return learned(net(), group=group, parts=2, precision="bf16")

    torch.manual_seed(0)
    (alone,) = run_ranks(1, work)
    energies = [net(), net()]  # made here, since torch's generator is shared by the threads

    def shared(group: Group) -> dict[str, Tensor]:
        return learned(energies[group.rank], group=group, parts=2, precision="bf16")

    assert all(same_state(tensors, alone) for tensors in run_ranks(2, shared))


def test_autocast_around_the_call_changes_only_a_learner_without_a_precision() -> None:
    plain = {precision: learned(precision=precision) for precision in (None, "fp32", "bf16")}
    assert same_state(plain[None], plain["fp32"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = {precision: learned(precision=precision) for precision in plain}
    assert same_state(inside["fp32"], plain["fp32"])
    assert same_state(inside["bf16"], plain["bf16"])  # no weight is cast only once
    assert not same_state(inside[None], plain[None])


def test_a_float64_network_stays_float64() -> None:
    assert same_state(learned(net().double(), precision="bf16"), learned(net().double()))


def test_a_loaded_learner_continues_in_bf16_with_the_same_bits(tmp_path: Path) -> None:
    first = learner(precision="bf16")
    first.step()
    first.save(tmp_path / "learner.safetensors")
    second = learner(precision="bf16")
    second.load(tmp_path / "learner.safetensors")
    assert first.step() == second.step()
    assert same_state(state(first), state(second))


def test_energies_that_are_not_finite_leave_the_weights() -> None:
    energy = net()
    with torch.no_grad():
        list(energy.parameters())[-1].fill_(float("inf"))
    before = copy.deepcopy(energy.state_dict())
    with pytest.raises(FloatingPointError, match="not finite"):
        learner(sampler(energy), precision="bf16").step()
    assert all(torch.equal(v, before[k]) for k, v in energy.state_dict().items())


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp16", 'ShortRunLearner: precision "fp16" is not supported, .* a loss scale; use "bf16"'),
        ("bf61", "precision must be None, .*, got 'bf61'; did you mean bf16?"),
    ],
)
def test_a_precision_that_is_not_supported(precision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(precision=precision)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, None),
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "fp32"}, None),
        ({"precision": "bf16", "learn_precision": None}, None),
        ({"precision": "bf16", "learn_precision": "fp32"}, "fp32"),
        ({"learn_precision": "bf16"}, "bf16"),
    ],
    ids=str,
)
def test_a_run_learns_in_bf16_if_its_chain_is_in_bf16(
    settings: dict[str, Any], precision: str | None, config: TrainConfig
) -> None:
    assert build_learner(dataclasses.replace(config, **settings)).precision == precision


@pytest.mark.parametrize(
    ("precision", "message"),
    [("fp16", "got 'fp16': the gradients .* need a loss scale"), ("bf61", "did you mean bf16?")],
)
def test_a_setting_that_is_not_supported(precision: str, message: str, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=f"learn_precision must be .*{message}"):
        build_learner(dataclasses.replace(config, learn_precision=precision))


@pytest.fixture
def half(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, precision="bf16", iterations=6, anneal_start=1.0)


def test_a_run_of_an_earlier_version_continues_with_its_own_learning_step(
    half: TrainConfig, tmp_path: Path
) -> None:
    """Its config.yaml has no learn_precision, and its chain is in bf16."""
    before = dataclasses.replace(half, learn_precision=None)
    train(before, tmp_path / "whole")
    with pytest.raises(CutError):
        train(before, tmp_path / "cut", report=cut_at(4))
    file = tmp_path / "cut" / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    del settings["learn_precision"]
    file.write_text(MARK + yaml.safe_dump(settings))
    train(resolve(file), tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(ValueError, match=r"other settings: learn_precision \(None to auto\)$"):
        train(half, tmp_path / "cut", resume=True)


def test_a_file_of_ones_own_without_the_setting_learns_in_bf16(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("precision: bf16")
    assert resolve(tmp_path / "mine.yaml").learn_precision == "auto"
