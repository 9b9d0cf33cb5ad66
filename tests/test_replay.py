"""ReplayBuffer: which slots are drawn, which start anew, and what is written back."""

import math
from typing import Any

import pytest
import torch
from scipy import stats

import fastlangevin as fl

SHAPE = (1, 3, 5)


def buffer(capacity: int = 16, shape: tuple[int, ...] = SHAPE, **options: Any) -> fl.ReplayBuffer:
    return fl.ReplayBuffer(capacity, shape, **{"seed": 7, "reinit": 0.0} | options)


def test_slots_start_uniform() -> None:
    """N = 256 x 1023 states: Kolmogorov-Smirnov against U(-1, 1)."""
    states = buffer(256, (1023,)).states
    assert states.shape == (256, 1023)
    assert stats.kstest(states.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue >= 1e-5


@pytest.mark.parametrize("shape", [(), (5,), SHAPE], ids=str)
@pytest.mark.parametrize("n", [1, 4, 5, 16])
def test_draw_gives_the_states_of_distinct_slots(n: int, shape: tuple[int, ...]) -> None:
    chains = buffer(shape=shape)
    for step in range(20):
        slots, x = chains.draw(n, step)
        assert len(set(slots.tolist())) == n
        assert torch.equal(x, chains.states[slots])


def test_every_slot_is_drawn_equally_often() -> None:
    """N = 1,000 draws of 4 of 16 slots: each slot's count is binomial(1000, 1/4), |z| <= 5."""
    chains = buffer(shape=(1,))
    draws = torch.stack([chains.draw(4, step)[0] for step in range(1000)])
    counts = torch.bincount(draws.flatten(), minlength=16).double()
    assert ((counts - 250) / math.sqrt(1000 * 0.25 * 0.75)).abs().max() <= 5


def test_draws_are_a_function_of_seed_and_step() -> None:
    chains = buffer(reinit=0.5)
    slots, x = chains.draw(8, 3)
    chains.draw(8, 4)
    torch.manual_seed(0)
    again = buffer(reinit=0.5)
    assert torch.equal(again.states, chains.states)
    for now, then in zip(again.draw(8, 3), (slots, x), strict=True):
        assert torch.equal(now, then)
    for other, step in ((chains, 4), (buffer(reinit=0.5, seed=8), 3)):
        assert not torch.equal(other.draw(8, step)[1], x)


def test_drawing_changes_no_state_and_no_generator() -> None:
    chains = buffer(reinit=0.5)
    before, rng = chains.states.clone(), torch.get_rng_state()
    chains.draw(16, 0)[1].zero_()
    assert torch.equal(chains.states, before)
    assert torch.equal(torch.get_rng_state(), rng)


def test_reinit_1_starts_every_chain_from_fresh_uniforms() -> None:
    """N = 200 steps x 16 chains x 15 elements: uniform, and none of them a kept state."""
    chains = buffer(reinit=1.0)
    chains.states.fill_(3.0)
    x = torch.stack([chains.draw(16, step)[1] for step in range(200)])
    assert stats.kstest(x.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue >= 1e-5
    assert x.flatten(2).unique(dim=0).shape[0] == 200


@pytest.mark.parametrize("reinit", [0.05, 0.5])
def test_reinit_is_the_rate_of_fresh_chains(reinit: float) -> None:
    """N = 400 x 16 chains, each whole and fresh with probability ``reinit``: |z| <= 5."""
    chains = buffer(reinit=reinit)
    chains.states.fill_(3.0)
    kept = torch.stack([(chains.draw(16, step)[1] == 3.0).flatten(1) for step in range(400)])
    assert torch.equal(kept.all(-1), kept.any(-1))
    fresh = (~kept.all(-1)).sum().item()
    assert abs(fresh - 6_400 * reinit) / math.sqrt(6_400 * reinit * (1 - reinit)) <= 5


def test_put_writes_to_its_slots_alone() -> None:
    chains = buffer()
    before = chains.states.clone()
    slots, x = chains.draw(5, 0)
    chains.put(slots, (x + 10).double().requires_grad_())
    others = [slot for slot in range(16) if slot not in slots.tolist()]
    assert torch.equal(chains.states[slots], x + 10)
    assert torch.equal(chains.states[others], before[others])
    assert chains.states.dtype == torch.float32
    assert not chains.states.requires_grad


def test_what_is_put_is_drawn_again() -> None:
    chains = buffer()
    for step in range(8):
        slots, x = chains.draw(16, step)
        chains.put(slots, x + 1)
    assert torch.equal(chains.states, sum([1.0] * 8, start=buffer().states))


ERRORS = [
    ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
    ({"capacity": -4}, ValueError, "capacity must be at least 1, got -4"),
    ({"capacity": 2.5}, TypeError, "capacity must be an integer, got 2.5"),
    ({"reinit": 2}, ValueError, r"reinit must be in \[0, 1\], got 2"),
    ({"reinit": -0.1}, ValueError, r"reinit must be in \[0, 1\], got -0.1"),
    ({"reinit": math.nan}, ValueError, r"reinit must be in \[0, 1\], got nan"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), ERRORS, ids=[str(case[0]) for case in ERRORS])
def test_wrong_arguments(wrong: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        buffer(**wrong)


@pytest.mark.parametrize("n", [0, -1, 17])
def test_more_chains_than_slots(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n must be in 1\.\.capacity=16, got {n}"):
        buffer().draw(n, 0)


@pytest.mark.parametrize("shape", [(4, 1, 3, 6), (4, 3, 5), (3, 1, 3, 5), (1, 1, 3, 5)], ids=str)
def test_states_of_another_shape(shape: tuple[int, ...]) -> None:
    chains = buffer()
    slots, before = chains.draw(4, 0)[0], chains.states.clone()
    with pytest.raises(ValueError, match=r"x must have shape \[4, 1, 3, 5\], got \[") as caught:
        chains.put(slots, torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)
    assert torch.equal(chains.states, before)
