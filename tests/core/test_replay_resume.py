"""Replay buffers that are saved, resumed and moved between ranks and devices."""

import io
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.learn import resolve, train
from fastlangevin.learn.checkpoint import CheckpointError, list_checkpoints, read_checkpoint
from tests.core.replay_shared import KINDS, SHAPE, buffer


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


def walk(chains: fl.ReplayBuffer, steps: range) -> list[Tensor]:
    """What is drawn in a loop that moves each chain by 0.01."""
    found = []
    for step in steps:
        slots, x = chains.draw(5, step)
        found += [slots, x]
        chains.put(slots, (x + 0.01).clamp(-1, 1))
    return found


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("index", torch.float32, {"rank": 1, "world_size": 2}),
        ("index", torch.uint8, {}),
        ("fifo", torch.float32, {}),
        ("reservoir", torch.uint8, {"rank": 1, "world_size": 2}),
    ],
)
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


@pytest.mark.parametrize(
    ("kind", "dtype"), [("index", torch.uint8), ("fifo", torch.float32), ("reservoir", torch.uint8)]
)
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
    with pytest.raises(CheckpointError, match=r"of torch.float32, this run.s is of torch.uint8"):
        learner(dtype=torch.uint8).load(tmp_path / "saved.safetensors")


@pytest.mark.slow
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
