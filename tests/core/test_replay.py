"""ReplayBuffer: which slots are drawn, which start anew, and what is written back."""

import io
import math
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import fastlangevin as fl
from fastlangevin.learn import resolve, train
from fastlangevin.learn.checkpoint import CheckpointError, list_checkpoints, read_checkpoint

SHAPE = (1, 3, 5)
KINDS = ("index", "fifo", "reservoir")
DTYPES = (torch.float32, torch.uint8)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reinit", [0.05, 0.5])
def test_reinit_is_the_rate_of_fresh_chains(reinit: float, kind: str) -> None:
    """N = 400 x 16 chains, each whole and fresh with probability ``reinit``: |z| <= 5."""
    chains = buffer(kind=kind, reinit=reinit)
    chains.put(torch.arange(16), torch.full((16, *SHAPE), 3.0))
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


# One chain per datum ------------------------------------------------------------------------------


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


# Classes ------------------------------------------------------------------------------------------


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
    """N = 1,000 draws of 2 of a class's 8 slots: binomial(1000, 1/4), |z| <= 5."""
    chains = buffer(n_classes=2)
    draws = [chains.draw(2, step, y=torch.tensor([1, 1]))[0] for step in range(1000)]
    counts = torch.bincount(torch.cat(draws), minlength=16).double()
    assert counts[:8].sum() == 0
    assert ((counts[8:] - 250) / math.sqrt(1000 * 0.25 * 0.75)).abs().max() <= 5


def test_without_labels_classes_are_not_looked_at() -> None:
    for now, then in zip(buffer(n_classes=4).draw(8, 3), buffer().draw(8, 3), strict=True):
        assert torch.equal(now, then)


# Fifo ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["fifo", "reservoir"])
def test_every_chain_is_new_until_the_first_put(kind: str, dtype: torch.dtype) -> None:
    """N = 16 x 1023 elements: Kolmogorov-Smirnov against U(-1, 1)."""
    chains = buffer(shape=(1023,), kind=kind, dtype=dtype)
    x = chains.draw(16, 0)[1]
    assert stats.kstest(x.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue >= 1e-5
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
    """N = 800 x 4 draws: each filled slot binomial(3200, 1 / filled), |z| <= 5; repeats occur."""
    chains = buffer(shape=(), kind="fifo")
    chains.put(None, torch.zeros(filled))
    draws = torch.stack([chains.draw(4, step)[0] for step in range(800)])
    counts, p = torch.bincount(draws.flatten(), minlength=16).double(), 1 / filled
    assert counts[filled:].sum() == 0
    assert ((counts[:filled] - 3200 * p) / math.sqrt(3200 * p * (1 - p))).abs().max() <= 5
    assert sum(len(set(draw.tolist())) < 4 for draw in draws) > 150  # 0.33 x 800 or more expected


# Reservoir ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_reservoir_is_algorithm_r_however_states_come(batch: int) -> None:
    """Batches in which two states fall to one slot are among these."""
    chains = buffer(6, (), kind="reservoir")
    values = torch.arange(240.0)
    for x in values.split(batch):
        chains.put(None, x)
    assert chains.states.tolist() == vitter(values.tolist(), 6, seed=7)


def test_a_reservoir_keeps_every_state_equally_often() -> None:
    """N = 500 reservoirs of 4 of 20 states: each kept binomial(500, 1/5) times, |z| <= 5."""
    kept = torch.zeros(20)
    for seed in range(500):
        chains = buffer(4, (), kind="reservoir", seed=seed)
        for x in torch.arange(20.0).split(4):
            chains.put(None, x)
        kept[chains.states.long()] += 1
    assert ((kept - 100) / math.sqrt(500 * 0.2 * 0.8)).abs().max() <= 5


def test_numbers_of_a_reservoir_stay_exact_to_the_last() -> None:
    """Of 2**32 - 2 states each next one is kept with probability 1e-7 alone; then it is full."""
    chains = buffer(400, (), kind="reservoir")
    chains.put(None, torch.zeros(400))
    chains.added = 2**32 - 401
    chains.put(None, torch.ones(400))
    assert chains.states.sum() == 0
    with pytest.raises(ValueError, match="chain must be in"):
        chains.put(None, torch.ones(400))


# Storage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 252.0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
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
    """N = 200 x 16 x 15 values in cell 77 of [-1, 1]: Kolmogorov-Smirnov, new at every step."""
    chains = buffer(dtype=torch.uint8)
    chains.states.fill_(77)
    x = torch.stack([chains.draw(16, step)[1] for step in range(200)])
    cell = stats.uniform(-1 + 77 / 128, 1 / 128)
    assert stats.kstest(x.flatten().numpy(), cell.cdf).pvalue >= 1e-5
    assert x.flatten(2).unique(dim=0).shape[0] == 200


def test_uint8_starts_uniform_and_clips() -> None:
    """N = 256 x 1023 bytes: chi-square against equal counts; states outside go to the ends."""
    chains = buffer(256, (1023,), dtype=torch.uint8)
    counts = torch.bincount(chains.states.flatten().long(), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue >= 1e-5
    chains.put(torch.tensor([0, 1]), torch.tensor([[-7.0], [7.0]]).expand(2, 1023))
    assert (chains.states[0] == 0).all()
    assert (chains.states[1] == 255).all()


@pytest.mark.parametrize("kind", KINDS)
def test_new_chains_are_uniform_on_the_value_range(kind: str) -> None:
    chains = buffer(kind=kind, shape=(1023,), reinit=1.0, value_range=(0.0, 255.0))
    x = chains.draw(16, 0)[1]
    assert stats.kstest(x.flatten().numpy(), stats.uniform(0, 255).cdf).pvalue >= 1e-5


# Ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_ranks_have_a_chain_in_common(kind: str) -> None:
    """Three ranks of 8 slots each; no element of any of their chains is another's."""
    ranks = [buffer(24, kind=kind, reinit=0.5, rank=rank, world_size=3) for rank in range(3)]
    seen = []
    for rank, chains in enumerate(ranks):
        drawn = []
        for step in range(3):
            slots, x = chains.draw(6, step)
            drawn.append(x)
            chains.put(slots, x + rank)
        assert chains.states.shape == (8, *SHAPE)
        seen.append(torch.cat(drawn).unique(dim=0))
    everyone = torch.cat(seen)
    assert everyone.unique(dim=0).shape == everyone.shape
    orders = [[chains.draw(6, step)[0].tolist() for step in range(9)] for chains in ranks]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_world_of_one_is_no_world() -> None:
    for now, then in zip(buffer(rank=0, world_size=1).draw(9, 2), buffer().draw(9, 2), strict=True):
        assert torch.equal(now, then)


# Saved and resumed --------------------------------------------------------------------------------


def walk(chains: fl.ReplayBuffer, steps: range) -> list[Tensor]:
    """What is drawn in a loop that moves each chain by 0.01."""
    found = []
    for step in steps:
        slots, x = chains.draw(5, step)
        found += [slots, x]
        chains.put(slots, (x + 0.01).clamp(-1, 1))
    return found


@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 2}], ids=["alone", "rank 1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_is_cut_goes_on(kind: str, dtype: torch.dtype, options: dict) -> None:
    options = {"kind": kind, "dtype": dtype, "reinit": 0.2} | options
    chains, file = buffer(**options), io.BytesIO()
    walk(chains, range(9))
    torch.save(chains.state_dict(), file)
    held = chains.state_dict()
    want = walk(chains, range(9, 20))
    file.seek(0)
    for state in (torch.load(file, weights_only=True), held):
        fresh = buffer(**options)
        fresh.load_state_dict(state)
        got = walk(fresh, range(9, 20))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(fresh.states, chains.states)


WITHOUT = ["version", "kind", "capacity", "shape", "dtype", "states", "added", "seed", "n_classes"]


@pytest.mark.parametrize("name", WITHOUT)
def test_a_state_dict_that_lacks_something(name: str) -> None:
    state = buffer().state_dict()
    del state[name]
    with pytest.raises(ValueError, match=f"state_dict has no {name}$"):
        buffer().load_state_dict(state)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"capacity": 32}, "capacity=16, as this buffer, got 32"),
    ({"shape": (15,)}, r"shape=\(1, 3, 5\), as this buffer, got \(15,\)"),
    ({"dtype": torch.uint8}, "dtype='torch.float32', as this buffer, got 'torch.uint8'"),
    ({"kind": "fifo"}, "kind='index', as this buffer, got 'fifo'"),
    ({"n_classes": 4}, "n_classes=None, as this buffer, got 4"),
    ({"reinit": 0.5}, "reinit=0.0, as this buffer, got 0.5"),
    ({"value_range": (0, 1)}, r"value_range=\(-1.0, 1.0\), as this buffer, got \(0.0, 1.0\)"),
    ({"seed": 8}, "seed=7, as this buffer, got 8"),
    ({"world_size": 2}, "world_size=1, as this buffer, got 2"),
]


@pytest.mark.parametrize(("options", "match"), OTHERS, ids=[str(case[0]) for case in OTHERS])
def test_the_state_of_another_buffer(options: dict, match: str) -> None:
    chains, other = buffer(), buffer(**options)
    walk(other, range(2))
    before = chains.states.clone()
    with pytest.raises(ValueError, match=f"state_dict must have {match}"):
        chains.load_state_dict(other.state_dict())
    assert torch.equal(chains.states, before)


def test_the_state_of_another_rank_or_version() -> None:
    ranks = [buffer(rank=rank, world_size=2) for rank in range(2)]
    with pytest.raises(ValueError, match="must have rank=0, as this buffer, got 1"):
        ranks[0].load_state_dict(ranks[1].state_dict())
    with pytest.raises(ValueError, match="must have version=1, as this buffer, got 2"):
        buffer().load_state_dict(buffer().state_dict() | {"version": 2})


@pytest.mark.parametrize(
    "states", [torch.zeros(15, *SHAPE), torch.zeros(16, *SHAPE, dtype=torch.float64)]
)
def test_states_that_are_not_what_their_state_dict_says(states: Tensor) -> None:
    chains = buffer()
    with pytest.raises(ValueError, match=r"states \[16, 1, 3, 5\] of torch.float32, got \["):
        chains.load_state_dict(chains.state_dict() | {"states": states})


def learner(**options: Any) -> fl.learn.ShortRunLearner:
    torch.manual_seed(0)
    energy = fl.ConvEnergy(1, 8, 2)
    images = torch.rand(20, 1, 8, 8) * 2 - 1
    sampler = fl.LangevinSampler(energy, 2)
    chains = fl.ReplayBuffer(12, (1, 8, 8), seed=3, reinit=0.3, **options)
    return fl.learn.ShortRunLearner(sampler, images, batch_size=6, buffer=chains, seed=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_is_resumed_with_its_buffer(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    learning = learner(kind=kind, dtype=dtype)
    for _ in range(3):
        learning.step()
    learning.save(tmp_path / "saved.safetensors")
    resumed = learner(kind=kind, dtype=dtype)
    resumed.load(tmp_path / "saved.safetensors")
    for _ in range(3):
        assert resumed.step() == learning.step()
    assert torch.equal(resumed.buffer.states, learning.buffer.states)


def test_a_learner_refuses_another_kind_of_buffer(tmp_path: Path) -> None:
    learner().save(tmp_path / "saved.safetensors")
    with pytest.raises(CheckpointError, match="has no buffer_added"):
        learner(kind="fifo").load(tmp_path / "saved.safetensors")
    with pytest.raises(CheckpointError, match=r"of torch.float32, this one .* of torch.uint8"):
        learner(dtype=torch.uint8).load(tmp_path / "saved.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has SIGKILL")
def test_a_run_of_the_command_that_is_killed_is_resumed_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fastlangevin train`` with persistent chains, SIGKILL, and the run that was never cut."""
    script = shutil.which("fastlangevin", path=sysconfig.get_path("scripts"))
    if script is None:
        pytest.skip("the script fastlangevin is not installed here")
    settings = {"width": 2, "steps": 2, "batch_size": 8, "anneal_start": 1.0, "save_every": 3,
                "sample_every": 1000, "samples": 4, "device": "cpu", "buffer_size": 24,
                "buffer_kind": "reservoir", "reinit": 0.2, "iterations": 100_000}  # fmt: skip
    monkeypatch.setattr("fastlangevin.learn.log._summary_writer", lambda *arguments: None)
    run = tmp_path / "run"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    with subprocess.Popen(
        [script, "train", "--out", str(run), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as victim:
        deadline = time.monotonic() + 60
        while len(list_checkpoints(run)) < 2:
            assert victim.poll() is None, victim.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        victim.kill()
        errors = victim.communicate(timeout=60)[1]
    assert victim.returncode == -signal.SIGKILL, errors
    reached = read_checkpoint(run)[1]["iteration"]
    config = resolve(overrides=settings | {"iterations": reached + 5})
    train(config, run, resume=True)
    train(config, tmp_path / "whole")
    (got, got_info), (want, want_info) = (
        read_checkpoint(folder) for folder in (run, tmp_path / "whole")
    )
    assert got_info == want_info
    assert got_info["iteration"] == reached + 5
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


# Devices ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_on_a_gpu_draws_the_same(kind: str) -> None:
    here, there = buffer(kind=kind, reinit=0.3), buffer(kind=kind, reinit=0.3, device="cuda")
    assert here.to("cpu") is here
    for chains in (there, buffer(kind=kind, reinit=0.3).to("cuda")):
        chains.load_state_dict(here.state_dict())
        with pytest.raises(ValueError, match="x must be on the buffer's device cuda:0, got cpu"):
            chains.put(chains.draw(4, 0)[0], torch.zeros(4, *SHAPE))
    for step in range(9):
        (slots, x), (others, y) = here.draw(9, step), there.draw(9, step)
        assert torch.equal(others.cpu(), slots)
        assert torch.equal(y.cpu(), x)
        here.put(slots, x + 1)
        there.put(others, y + 1)
    assert torch.equal(there.states.cpu(), here.states)


# Errors -------------------------------------------------------------------------------------------


ERRORS = [
    ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
    ({"capacity": -4}, ValueError, "capacity must be at least 1, got -4"),
    ({"capacity": 2.5}, TypeError, "capacity must be an integer, got 2.5"),
    ({"reinit": "a"}, TypeError, "reinit must be a number, got 'a'"),
    ({"reinit": 2}, ValueError, r"reinit must be in \[0, 1\], got 2"),
    ({"reinit": -0.1}, ValueError, r"reinit must be in \[0, 1\], got -0.1"),
    ({"reinit": math.nan}, ValueError, r"reinit must be in \[0, 1\], got nan"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"kind": "lifo"}, ValueError, "kind must be one of index, fifo, reservoir, got 'lifo'"),
    ({"dtype": torch.float16}, TypeError, "must be torch.float32 or torch.uint8, got torch.float1"),
    ({"value_range": (1, 0)}, ValueError, r"value_range must be .* lo < hi, got \(1.0, 0.0\)"),
    ({"value_range": (0, math.inf)}, ValueError, r"value_range must be finite .*\(0.0, inf\)"),
    ({"value_range": 1.0}, TypeError, r"value_range must be a pair \(lo, hi\), got 1.0"),
    ({"shape": 5}, TypeError, "shape must be a tuple of integers, got 5"),
    ({"shape": (3, -1)}, ValueError, "shape must be at least 1, got -1"),
    ({"shape": (3, 0.5)}, TypeError, "shape must be an integer, got 0.5"),
    ({"n_classes": 0}, ValueError, "n_classes must be at least 1, got 0"),
    ({"n_classes": 3}, ValueError, "multiple of world_size x n_classes = 3, got 16"),
    ({"n_classes": 2, "kind": "fifo"}, ValueError, "n_classes needs kind='index', got kind='fifo'"),
    ({"world_size": 3}, ValueError, "multiple of world_size x n_classes = 3, got 16"),
    ({"n_classes": 4, "world_size": 8}, ValueError, "world_size x n_classes = 32, got 16"),
    ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
    ({"rank": 2, "world_size": 2}, ValueError, r"rank must be in 0\.\.1, got 2"),
    ({"rank": -1, "world_size": 2}, ValueError, r"rank must be in 0\.\.1, got -1"),
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


def ask(y: Any = None, index: Any = None, n: int = 3, **options: Any) -> Callable[[], object]:
    return lambda: buffer(**options).draw(n, 0, y=y, index=index)


def write(slots: Any, x: Tensor, **options: Any) -> Callable[[], object]:
    def call() -> None:
        chains = buffer(**options)
        before = chains.state_dict()
        try:
            chains.put(slots, x)
        finally:
            after = chains.state_dict()
            assert torch.equal(after["states"], before["states"])
            assert after["added"] == before["added"]

    return call


T, NAN = torch.tensor, torch.full((3, *SHAPE), math.nan)
THREE = torch.zeros(3, *SHAPE)
CALLS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (ask(n=9, world_size=2), ValueError, r"n must be in 1\.\.capacity=8, got 9"),
    (ask(n=17, kind="fifo"), ValueError, r"n must be in 1\.\.capacity=16, got 17"),
    (ask(n=2.5), TypeError, "n must be an integer, got 2.5"),
    (ask(T([0, 4, 1]), n_classes=4), ValueError, r"y must be in 0\.\.3, got 4"),
    (ask(T([0, -1, 1]), n_classes=4), ValueError, r"y must be in 0\.\.3, got -1"),
    (ask(T([0, 1]), n_classes=4), ValueError, r"y must have shape \[3\], got \[2\]"),
    (ask(T([[0, 1, 2]]), n_classes=4), ValueError, r"y must have shape \[3\], got \[1, 3\]"),
    (ask(T([0.0, 1.0, 1.0]), n_classes=4), TypeError, "tensor of integers, got torch.float32"),
    (ask([0, 1, 1], n_classes=4), TypeError, "y must be a tensor of integers, got list"),
    (ask(T([1] * 5), n=5, n_classes=4), ValueError, "at most 4 times, .* got one 5 times"),
    (ask(T([0, 1, 1])), ValueError, "y needs a buffer with n_classes, got one without"),
    (ask(index=T([0, 16, 1])), ValueError, r"index must be in 0\.\.15, got 16"),
    (ask(index=T([0, 1])), ValueError, r"index must have shape \[3\], got \[2\]"),
    (ask(index=T([True] * 3)), TypeError, "index must be a tensor of integers, got torch.bool"),
    (ask(index=T([0, 1, 2]), kind="fifo"), ValueError, "needs kind='index' .* got kind='fifo'"),
    (ask(T([0] * 3), T([0] * 3), n_classes=4), ValueError, "index needs .* no y, got y too"),
    (write(None, THREE), TypeError, "slots must be a tensor of integers, got NoneType"),
    (write(T([0, 1, 16]), THREE), ValueError, r"slots must be in 0\.\.15, got 16"),
    (write(T([0, 1, -1]), THREE), ValueError, r"slots must be in 0\.\.15, got -1"),
    (write(T([[0, 1, 2]]), THREE), ValueError, r"slots must have shape \[n\], got \[1, 3\]"),
    (write(T([0, 1, 2]), THREE.long()), TypeError, "x must be of floating dtype, got torch.int64"),
    (write(None, THREE[0], kind="fifo"), ValueError, r"x must have shape \[1, 1, 3, 5\], got "),
    (write(None, T(0.0), kind="fifo"), ValueError, r"x must have shape \[0, 1, 3, 5\], got \[\]"),
    (write(None, torch.zeros(17, *SHAPE), kind="fifo"), ValueError, "at most capacity=16 .* 17"),
    (
        write(T([0, 1, 2]), THREE.to("meta")),
        ValueError,
        "the buffer's device cpu, got meta",
    ),
    (write(None, [1], kind="fifo"), TypeError, "x must be a tensor, got list"),
    (lambda: buffer().load_state_dict(None), TypeError, "state_dict must be a dict, got NoneType"),
    (lambda: buffer().draw("a", 0), TypeError, "n must be an integer, got 'a'"),
    (write(T([0, 1, 2]), NAN, dtype=torch.uint8), ValueError, "must not be NaN, which uint8"),
]


@pytest.mark.parametrize(("call", "error", "match"), CALLS, ids=[case[2] for case in CALLS])
def test_wrong_calls(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"ReplayBuffer: .*{match}" if match[0] != "R" else match):
        call()
