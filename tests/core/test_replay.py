"""ReplayBuffer: what each kind of buffer draws and keeps."""

import math

import pytest
import torch

import fastlangevin as fl
from tests.core.replay_shared import DTYPES, KINDS, SHAPE, buffer
from tests.laws import equal_counts_p, uniform_p


def test_slots_start_uniform() -> None:
    """N = 256 x 1023 states: Kolmogorov-Smirnov against U(-1, 1)."""
    states = buffer(256, (1023,)).states
    assert states.shape == (256, 1023)
    assert uniform_p(states, -1, 1) >= 1e-5


@pytest.mark.parametrize(("n", "shape"), [(1, (5,)), (5, ()), (16, SHAPE)], ids=str)
def test_draw_gives_the_states_of_distinct_slots(n: int, shape: tuple[int, ...]) -> None:
    chains = buffer(shape=shape)
    for step in range(10):
        slots, x = chains.draw(n, step)
        assert len(set(slots.tolist())) == n
        assert torch.equal(x, chains.states[slots])


def test_every_slot_is_drawn_equally_often() -> None:
    """N = 200 draws of 4 of 16 slots: each slot's count is binomial(200, 1/4), |z| <= 5."""
    chains = buffer(shape=(1,))
    draws = torch.stack([chains.draw(4, step)[0] for step in range(200)])
    counts = torch.bincount(draws.flatten(), minlength=16).double()
    assert ((counts - 50) / math.sqrt(200 * 0.25 * 0.75)).abs().max() <= 5


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
    """N = 50 steps x 16 chains x 15 elements: uniform, and none of them a kept state."""
    chains = buffer(reinit=1.0)
    chains.states.fill_(3.0)
    x = torch.stack([chains.draw(16, step)[1] for step in range(50)])
    assert uniform_p(x, -1, 1) >= 1e-5
    assert x.flatten(2).unique(dim=0).shape[0] == 50


@pytest.mark.parametrize(("reinit", "kind"), [(0.05, "index"), (0.5, "fifo"), (0.05, "reservoir")])
def test_reinit_is_the_rate_of_fresh_chains(reinit: float, kind: str) -> None:
    """N = 50 x 128 chains, each whole and fresh with probability ``reinit``: |z| <= 5."""
    chains = buffer(128, kind=kind, reinit=reinit)
    chains.put(torch.arange(128), torch.full((128, *SHAPE), 3.0))
    kept = torch.stack([(chains.draw(128, step)[1] == 3.0).flatten(1) for step in range(50)])
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


def test_states_that_were_put_are_drawn_again() -> None:
    chains = buffer()
    for step in range(8):
        slots, x = chains.draw(16, step)
        chains.put(slots, x + 1)
    assert torch.equal(chains.states, sum([1.0] * 8, start=buffer().states))


def test_the_specification_of_a_draw() -> None:
    """The slots with the smallest words, the noise contract's numbers at (seed, step)."""
    chains = buffer(reinit=0.4)
    slots, x = chains.draw(9, 6)
    words = fl.noise.words((1, 16), seed=7, step=6, stream=4)[0].tolist()
    assert slots.tolist() == sorted(range(16), key=lambda slot: words[slot])[:9]
    fresh = 2 * fl.noise.uniform((9, *SHAPE), seed=7, step=7, stream=1) - 1
    first = 2 * fl.noise.uniform((16, *SHAPE), seed=7, step=0, stream=1) - 1
    coin = fl.noise.uniform((9, 1), seed=7, step=6, stream=5)[:, 0] < 0.4
    assert 0 < coin.sum() < 9
    for i in range(9):
        assert torch.equal(x[i], fresh[i] if coin[i] else first[slots[i]])


def test_a_chain_is_drawn_by_its_datum() -> None:
    chains = buffer()
    index = torch.tensor([3, 0, 15, 7], dtype=torch.int32)
    slots, x = chains.draw(4, 0, index=index)
    assert slots.dtype == torch.int64
    assert slots.tolist() == [3, 0, 15, 7]
    assert torch.equal(x, chains.states[[3, 0, 15, 7]])


def test_of_a_datum_that_is_there_twice_the_last_chain_is_kept() -> None:
    chains = buffer(64, (1023,))
    index = torch.arange(64) % 3
    slots, x = chains.draw(64, 0, index=index)
    x = x + torch.arange(64.0)[:, None]
    before = chains.states.clone()
    chains.put(slots, x)
    assert torch.equal(chains.states[:3], x[[63, 61, 62]])
    assert torch.equal(chains.states[3:], before[3:])


def test_a_class_draws_from_its_own_slots() -> None:
    """Class c owns 4c..4c + 3; of them those with the smallest words, in the batch's order."""
    chains = buffer(n_classes=4)
    for step in range(20):
        y = torch.tensor([2, 0, 2, 3, 0, 2, 2, 0])
        slots, x = chains.draw(8, step, y=y)
        words = fl.noise.words((1, 16), seed=7, step=step, stream=4)[0].tolist()
        for label in range(4):
            block = sorted(range(4 * label, 4 * label + 4), key=lambda slot: words[slot])
            own = slots[y == label].tolist()
            assert own == block[: len(own)]
        assert torch.equal(x, chains.states[slots])


def test_every_slot_of_a_class_is_drawn_equally_often() -> None:
    """N = 200 draws of 2 of a class's 8 slots: binomial(200, 1/4), |z| <= 5."""
    chains = buffer(n_classes=2)
    draws = [chains.draw(2, step, y=torch.tensor([1, 1]))[0] for step in range(200)]
    counts = torch.bincount(torch.cat(draws), minlength=16).double()
    assert counts[:8].sum() == 0
    assert ((counts[8:] - 50) / math.sqrt(200 * 0.25 * 0.75)).abs().max() <= 5


def test_without_labels_classes_are_not_looked_at() -> None:
    for now, then in zip(buffer(n_classes=4).draw(8, 3), buffer().draw(8, 3), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["fifo", "reservoir"])
def test_every_chain_is_new_until_the_first_put(kind: str, dtype: torch.dtype) -> None:
    """N = 16 x 1023 elements: Kolmogorov-Smirnov against U(-1, 1)."""
    chains = buffer(shape=(1023,), kind=kind, dtype=dtype)
    x = chains.draw(16, 0)[1]
    assert uniform_p(x, -1, 1) >= 1e-5
    chains.put(None, torch.full((1, 1023), 0.5))
    assert (chains.draw(16, 0)[1] - 0.5).abs().max() <= 1 / 128


def test_a_fifo_keeps_the_newest() -> None:
    chains, newest = buffer(7, (), kind="fifo"), []
    for step, n in enumerate([3, 1, 7, 2, 5, 5, 6]):
        x = 100.0 * step + torch.arange(float(n))
        chains.put(None, x)
        newest = (newest + x.tolist())[-7:]
        slots, drawn = chains.draw(7, step)
        assert torch.equal(drawn, chains.states[slots])
        assert set(drawn.tolist()) <= set(newest)
        assert sorted(chains.states[: len(newest)].tolist()) == sorted(newest)


@pytest.mark.parametrize("filled", [5, 16])
def test_a_fifo_is_drawn_from_with_repetition(filled: int) -> None:
    """N = 50 x 64 draws: each filled slot binomial(3200, 1 / filled), |z| <= 5."""
    chains = buffer(64, (), kind="fifo")
    chains.put(None, torch.zeros(filled))
    draws = torch.stack([chains.draw(64, step)[0] for step in range(50)])
    counts, p = torch.bincount(draws.flatten(), minlength=64).double(), 1 / filled
    assert counts[filled:].sum() == 0
    assert ((counts[:filled] - 3200 * p) / math.sqrt(3200 * p * (1 - p))).abs().max() <= 5


def vitter(values: list[float], capacity: int, seed: int) -> list[float]:
    """Algorithm R, one state at a time."""
    kept: list[float] = []
    for number, value in enumerate(values):
        word = fl.noise.words((1, 1), seed=seed, step=0, stream=4, first_chain=1 + number)
        slot = (int(word) >> 1) * (number + 1) >> 31
        if number < capacity:
            kept.append(value)
        elif slot < capacity:
            kept[slot] = value
    return kept


@pytest.mark.parametrize("batch", [1, 6])
def test_a_reservoir_is_algorithm_r_however_states_come(batch: int) -> None:
    """Batches in which two states fall to one slot are among these."""
    chains = buffer(6, (), kind="reservoir")
    values = torch.arange(120.0)
    for x in values.split(batch):
        chains.put(None, x)
    assert chains.states.tolist() == vitter(values.tolist(), 6, seed=7)


def test_a_reservoir_keeps_every_state_equally_often() -> None:
    """N = 100 reservoirs of 4 of 20 states: each kept binomial(100, 1/5) times, |z| <= 5."""
    kept = torch.zeros(20)
    for seed in range(100):
        chains = buffer(4, (), kind="reservoir", seed=seed)
        for x in torch.arange(20.0).split(4):
            chains.put(None, x)
        kept[chains.states.long()] += 1
    assert ((kept - 20) / math.sqrt(100 * 0.2 * 0.8)).abs().max() <= 5


def test_numbers_of_a_reservoir_stay_exact_to_the_last() -> None:
    """Of 2**32 - 2 states each next one is kept with probability 1e-7 alone; then it is full."""
    chains = buffer(400, (), kind="reservoir")
    chains.put(None, torch.zeros(400))
    chains.added = 2**32 - 401
    chains.put(None, torch.ones(400))
    assert chains.states.sum() == 0
    with pytest.raises(ValueError, match="chain must be in"):
        chains.put(None, torch.ones(400))


@pytest.mark.parametrize(
    ("kind", "value_range"),
    [("index", (-1.0, 1.0)), ("fifo", (0.0, 1.0)), ("reservoir", (-3.0, 252.0))],
)
def test_uint8_keeps_a_state_to_1_256(kind: str, value_range: tuple[float, float]) -> None:
    lo, hi = value_range
    chains = buffer(kind=kind, shape=(255,), dtype=torch.uint8, value_range=value_range)
    x = lo + (hi - lo) * torch.rand(16, 255, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[0, 1] = lo, hi
    chains.put(torch.arange(16), x)
    assert chains.states.dtype == torch.uint8
    assert chains.states.nbytes == 16 * 255
    slots, drawn = chains.draw(16, 0)
    cell = (hi - lo) / 256
    assert ((drawn - x[slots]).abs() < cell * 1.001).all()
    cells = torch.floor((x - lo).double() / cell).clamp(max=255)
    assert torch.equal(chains.states.double(), cells)


def test_uint8_is_read_as_a_uniform_point_of_its_cell() -> None:
    """N = 50 x 16 x 15 values in cell 77 of [-1, 1]: Kolmogorov-Smirnov, new at every step."""
    chains = buffer(dtype=torch.uint8)
    chains.states.fill_(77)
    x = torch.stack([chains.draw(16, step)[1] for step in range(50)])
    assert uniform_p(x, -1 + 77 / 128, -1 + 78 / 128) >= 1e-5
    assert x.flatten(2).unique(dim=0).shape[0] == 50


def test_uint8_starts_uniform_and_clips() -> None:
    """N = 256 x 1023 bytes: chi-square against equal counts; states outside go to the ends."""
    chains = buffer(256, (1023,), dtype=torch.uint8)
    counts = torch.bincount(chains.states.flatten().long(), minlength=256)
    assert equal_counts_p(counts) >= 1e-5
    chains.put(torch.tensor([0, 1]), torch.tensor([[-7.0], [7.0]]).expand(2, 1023))
    assert (chains.states[0] == 0).all()
    assert (chains.states[1] == 255).all()


@pytest.mark.parametrize("kind", KINDS)
def test_new_chains_are_uniform_on_the_value_range(kind: str) -> None:
    chains = buffer(kind=kind, shape=(1023,), reinit=1.0, value_range=(0.0, 255.0))
    x = chains.draw(16, 0)[1]
    assert uniform_p(x, 0, 255) >= 1e-5
