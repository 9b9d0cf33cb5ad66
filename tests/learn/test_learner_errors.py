"""The errors of Learner, before any weight changes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.learn import ShortRunLearner
from fastlangevin.learn.checkpoint import CheckpointError
from tests.learn.learner_shared import (
    SHAPE,
    B,
    Linear,
    Normed,
    Recorder,
    images,
    learner,
    same_state,
    sampler,
    state,
)


class Overflow(Linear):
    """Infinite where x passes 100, NaN where the weights are told so."""

    nan = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.where(x.amax(1) > 100, math.inf, 0.0) + self.nan


FAULTS = ["infinite on the data", "NaN everywhere", "chains run away"]


def faulty(fault: str, **options: Any) -> tuple[ShortRunLearner, dict[str, Tensor]]:
    """A learner whose second step goes wrong, and its state before that."""
    energy, data = Overflow(), torch.linspace(-1, 1, 28).view(7, 4)
    learning = learner(sampler(energy, steps=30), data, ema=0.9, **options)
    learning.step()
    before = state(learning)
    if fault == "infinite on the data":
        data.fill_(1000.0)
    elif fault == "NaN everywhere":
        energy.nan = math.nan
    else:
        learning.sampler.step_size = 1e6
    return learning, before


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_energies_that_are_not_finite_change_no_weight(fault: str, measure: bool) -> None:
    learning, before = faulty(fault)
    with pytest.raises(FloatingPointError, match="not finite"):
        learning.step(measure=measure)
    assert learning.iteration == 1
    assert same_state(state(learning), before)
    assert all(parameter.grad is None for parameter in learning.energy.parameters())


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_energies_that_are_not_finite_change_no_kept_chain(fault: str, measure: bool) -> None:
    """Else the step could not be taken again, with a smaller lr say, as if nothing had been."""
    learning, before = faulty(fault, buffer=fl.ReplayBuffer(8, (4,), seed=2))
    with pytest.raises(FloatingPointError, match="not finite"):
        learning.step(measure=measure)
    assert torch.equal(state(learning)["buffer"], before["buffer"])


ERRORS = [
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"batch_size": -2}, ValueError, "batch_size must be at least 1, got -2"),
    ({"batch_size": 1.5}, TypeError, "batch_size must be an integer, got 1.5"),
    ({"lr": -1e-4}, ValueError, "Invalid learning rate: -0.0001"),
    ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"data_noise": -0.1}, ValueError, "data_noise must be >= 0, got -0.1"),
    ({"data_noise": math.nan}, ValueError, "data_noise must be >= 0, got nan"),
    ({"ema": 0.0}, ValueError, r"ema must be in \(0, 1\) or None, got 0.0"),
    ({"ema": 1}, ValueError, r"ema must be in \(0, 1\) or None, got 1"),
    ({"ema": math.nan}, ValueError, r"ema must be in \(0, 1\) or None, got nan"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\*\*64\)"),
    ({"data": torch.zeros(0, *SHAPE)}, ValueError, "data is empty"),
    ({"data": Recorder(torch.zeros(0, *SHAPE))}, ValueError, "data is empty"),
    ({"data": torch.zeros(3, *SHAPE, dtype=torch.uint8)}, TypeError, "data must be of floating"),
    (
        {"chain": fl.LangevinSampler(lambda x: x.flatten(1).sum(1))},
        TypeError,
        "sampler.energy must be an nn.Module, got function",
    ),
    (
        {"chain": fl.LangevinSampler(fl.GaussianEnergy())},
        ValueError,
        "sampler.energy has no parameter that requires grad",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "error", "match"), ERRORS, ids=[f"{next(iter(e[0]))}-{e[2]}" for e in ERRORS]
)
def test_wrong_arguments(wrong: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        learner(**wrong)


def test_images_that_do_not_fit_the_energy() -> None:
    match = r"data must have the energy's shape \[1, 8, 8\], got \[3, 8, 8\]"
    with pytest.raises(ValueError, match=match):
        learner(data=torch.zeros(3, 3, 8, 8))


def test_data_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="data must be finite"):
        learner(data=torch.full((3, *SHAPE), math.nan))


def test_save_and_load(tmp_path: Path) -> None:
    """With step sizes per step, which are a tensor, an energy of one's own, and some words."""
    sizes = torch.rand(3, 1)

    def made() -> ShortRunLearner:
        chain = fl.LangevinSampler(Normed(), steps=3, step_size=sizes)
        return ShortRunLearner(chain, images(), batch_size=B, ema=0.9)

    learning, other = made(), made()
    learning.step()
    learning.save(tmp_path / "a.safetensors", note="mine")
    assert other.load(tmp_path / "a.safetensors")["note"] == "mine"
    assert other.step() == learning.step()
    assert same_state(state(other), state(learning))
    loaded = fl.load(tmp_path / "a.safetensors", energy=Normed())
    assert torch.equal(loaded.step_size, sizes)
    with pytest.raises(CheckpointError, match=r"of the class .*:Normed: pass it as energy="):
        fl.load(tmp_path / "a.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 serves where CUDA is")
def test_a_precision_that_does_not_serve_here(tmp_path: Path) -> None:
    """A run from a GPU is sampled from on a CPU: with a warning, or as the user says."""
    path = tmp_path / "a.safetensors"
    learner(sampler(precision="fp16")).save(path)
    with pytest.warns(UserWarning, match='"fp16" needs a CUDA device.*; using None instead'):
        assert fl.load(path)(n=2, seed=0).isfinite().all()
    assert fl.load(path, precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match='precision "fp16" needs a CUDA device'):
        fl.load(path, precision="fp16")


def test_dropout_is_a_function_of_seed_and_iteration() -> None:
    results = []
    for number in range(2):
        torch.manual_seed(number)
        energy = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 1))
        nn.init.constant_(energy[2].weight, 0.1)
        nn.init.zeros_(energy[2].bias)
        before = torch.get_rng_state()
        chain = fl.LangevinSampler(energy, steps=2)
        results.append(ShortRunLearner(chain, -torch.ones(5, 1, 8, 8), data_noise=0.0).step())
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    assert results[0].energy_data != pytest.approx(6.4, rel=1e-4)  # what it is without dropout


def test_a_batch_larger_than_the_buffer() -> None:
    learning = learner(buffer=fl.ReplayBuffer(B - 1, SHAPE, seed=0))
    with pytest.raises(ValueError, match=rf"n must be in 1\.\.capacity={B - 1}, got {B}"):
        learning.step()
