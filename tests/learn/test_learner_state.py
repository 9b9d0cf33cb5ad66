"""The state of a Learner: what is saved, resumed and kept between steps."""

from typing import Any

import pytest
import torch
from torch import nn

import fastlangevin as fl
from fastlangevin.learn import ShortRunLearner
from fastlangevin.learn.checkpoint import CheckpointError
from tests.learn.learner_shared import (
    SHAPE,
    B,
    Linear,
    Normed,
    learner,
    net,
    same_state,
    sampler,
    state,
)


def test_chains_are_continued_and_written_back_to_their_slots() -> None:
    buffer = fl.ReplayBuffer(16, SHAPE, seed=2, reinit=0.3)
    learning = learner(buffer=buffer)
    for iteration in range(3):
        before = buffer.states.clone()
        slots, x0 = buffer.draw(B, iteration)
        want = learning.sampler(x0, seed=fl.noise.fold_in(5, iteration))
        learning.step()
        others = [slot for slot in range(16) if slot not in slots.tolist()]
        assert torch.equal(buffer.states[slots], want)
        assert torch.equal(buffer.states[others], before[others])


def complete(energy: nn.Module | None = None) -> ShortRunLearner:
    buffer = fl.ReplayBuffer(8, SHAPE, seed=2, reinit=0.3)
    return learner(sampler(energy), ema=0.9, flip=True, buffer=buffer)


@pytest.mark.parametrize("iteration", [0, 1, 3])
@pytest.mark.parametrize("make", [net, Normed])
def test_tensors_and_the_iteration_are_the_whole_state(make: Any, iteration: int) -> None:
    learning = complete(make())
    for _ in range(iteration):
        learning.step()
    other = complete(make())
    other.step()
    other.load_tensors(state(learning), iteration)
    assert other.iteration == iteration
    assert same_state(state(other), state(learning))
    fresh = complete(make())
    fresh.load_tensors(state(learning), iteration)
    for _ in range(2):
        assert learning.step() == fresh.step()
    assert same_state(state(learning), state(fresh))


def test_loaded_tensors_are_copied() -> None:
    learning, other = complete(), complete()
    learning.step()
    held = learning.tensors()
    other.load_tensors(held, 1)
    before = state(learning)
    other.step()
    assert same_state(state(learning), before)


def test_an_energy_with_a_parameter_that_is_not_used_resumes() -> None:
    class Spare(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(2))

    learning, other = (learner(sampler(Spare(), steps=1), torch.zeros(3, 4)) for _ in range(2))
    learning.step()
    other.load_tensors(state(learning), 1)
    assert learning.step() == other.step()
    assert same_state(state(learning), state(other))


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        ("model.layers.0.weight", r"ConvEnergy\.layers\.0\.weight needs .* the file has nothing"),
        ("ema.layers.0.weight", r"ConvEnergy\.layers\.0\.weight needs .* the file has nothing"),
        ("ema_updates", "the checkpoint has no ema_updates"),
        ("buffer", "the checkpoint has no buffer"),
        ("adam.step.layers.0.bias", r"the checkpoint has no adam\.step\.layers\.0\.bias"),
    ],
)
def test_a_tensor_that_is_missing_is_named(lost: str, match: str) -> None:
    learning = complete()
    learning.step()
    held = state(learning)
    del held[lost]
    with pytest.raises(CheckpointError, match=match):
        complete().load_tensors(held, 1)


@pytest.mark.parametrize("capacity", [1, 6, 12])
def test_a_buffer_of_another_capacity(capacity: int) -> None:
    learning = complete()
    learning.step()
    held = state(learning) | {"buffer": torch.zeros(capacity, *SHAPE)}
    with pytest.raises(CheckpointError, match="buffer"):
        complete().load_tensors(held, 1)
