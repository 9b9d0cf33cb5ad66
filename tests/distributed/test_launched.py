"""The command and the examples in real processes, as torchrun starts them."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from benchmarks.processes import free_port, send
from fastlangevin.cli import main
from fastlangevin.distributed import join
from fastlangevin.learn import resolve, train
from fastlangevin.learn.checkpoint import list_checkpoints, read_checkpoint
from tests.cli.shared import TINY, options
from tests.distributed.launch import launch
from tests.learn.learner_shared import learner, same_state, sampler, state

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SETTINGS = TINY | {"batch_size": 5, "parts": 3, "buffer_size": 9, "ema": 0.9}


def run_line(*words: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 0


def train_with_settings_of_its_own(run: Path) -> None:
    changes = SETTINGS | {"lr": 0.5 if os.environ["RANK"] == "1" else 0.1}
    main(["train", "--out", str(run), *options(**changes)])


def stop_rank_0() -> None:
    with join("cpu", timeout=3) as group:
        if group.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        group.all_gather(torch.zeros(1), "the gradients")


def run_example(name: str, folder: Path) -> None:
    results = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](n=6)
    torch.save(results, folder / f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.pt")


def run_lightning_example(folder: Path) -> None:
    name = f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.pt"  # Lightning removes these
    chains, call = [], fl.LangevinSampler.__call__

    def record(sampler: fl.LangevinSampler, **options: Any) -> torch.Tensor:
        chains.append(call(sampler, **options))
        return chains[-1]

    fl.LangevinSampler.__call__ = record
    module = runpy.run_path(str(EXAMPLES / "lightning_module.py"))["main"](n=16, batch_size=8)
    torch.save((module.energy.state_dict(), chains[0]), folder / name)


class Dropping(nn.Module):
    """An energy with dropout, an unused parameter and a buffer that counts forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 1))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.layers(x)


def learn_with_dropout(folder: Path) -> None:
    with join() as group:
        learning = learner(sampler(Dropping(), gradient="autograd"), group=group, parts=3)
        for _ in range(2):
            learning.step()
        torch.save(state(learning), folder / f"{group.world_size}-{group.rank}.pt")


def same_weights(run: Path, other: Path) -> bool:
    these, those = read_checkpoint(run)[0], read_checkpoint(other)[0]
    return all(torch.equal(value, those[name]) for name, value in these.items())


def test_train_sample_and_evaluate_in_two_processes(tmp_path: Path) -> None:
    """As in one, bit for bit; and every result is printed once.

    Each command is a job of its own, with its own store, as torchrun makes it.
    """
    run, folder, log = tmp_path / "run", tmp_path / "samples", tmp_path / "log"
    judge = ["--features", "pixels", "--n", 40, "--reference", 99, "--device", "cpu"]
    text = ""
    for line in (
        ["train", "--out", run, *options(**SETTINGS)],
        ["sample", run, "--n", 23, "--per-file", 5, "--out", folder, "--device", "cpu"],
        ["evaluate", run, *judge, "--out", tmp_path / "figures.json"],
    ):
        assert launch(2, log, run_line, *line) == [0, 0], log.read_text()
        text += log.read_text()
    train(resolve(overrides=SETTINGS), tmp_path / "alone")
    assert same_weights(run, tmp_path / "alone")
    assert text.count(f"checkpoint  {list_checkpoints(run)[-1]}") == 1
    assert text.splitlines().count(str(folder)) == 1
    for line in (
        ["sample", run, "--n", "23", "--out", tmp_path / "all.npy"],
        ["evaluate", run, "--features", "pixels", "--n", "40", "--reference", "99"],
    ):
        with pytest.raises(SystemExit):
            main([*map(str, line), "--device", "cpu"])
    shards = [np.load(path) for path in sorted(folder.glob("*.npy"))]
    assert [len(shard) for shard in shards] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate(shards), np.load(tmp_path / "all.npy"))
    alone = json.loads((run / "evaluate.json").read_text())
    assert json.loads((tmp_path / "figures.json").read_text())["figures"] == alone["figures"]


def test_ranks_with_dropout_learn_the_same_and_buffers_come_from_rank_0(tmp_path: Path) -> None:
    """The dropout of a chain depends on the chains of its process, so one process differs."""
    log = tmp_path / "log.txt"
    assert launch(2, log, learn_with_dropout, tmp_path) == [0, 0], log.read_text()
    first, second = (torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1))
    assert same_state(first, second)
    assert not any("unused" in name for name in first if name.startswith("adam"))
    assert first["model.passes"] > 0


def test_a_rank_with_other_settings_ends_all_with_its_name(tmp_path: Path) -> None:
    log = tmp_path / "log"
    outcome = launch(2, log, train_with_settings_of_its_own, tmp_path / "run")
    assert outcome == [1, 1], log.read_text()
    match = "start: the processes differ in lr: 0.1 on rank 0, 0.5 on rank 1"
    assert [f"error: rank {rank}: {match}" in log.read_text() for rank in (0, 1)] == [True, True]
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says which process has been stopped")
def test_a_stopped_rank_that_holds_the_store_ends_the_others_and_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch(2, log, stop_rank_0) == [-signal.SIGKILL, 1], log.read_text()
    match = "the gradients: no answer from rank 0, which holds the store of the job within 3 s"
    assert f"DistributedError: {match}" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "accelerate_loop"])
def test_an_example_learns_the_same_in_two_processes(name: str, tmp_path: Path) -> None:
    if name == "accelerate_loop":
        pytest.importorskip("accelerate", reason="accelerate is not installed")

    for world_size in (1, 2):
        log = tmp_path / "log"
        outcome = launch(world_size, log, run_example, name, tmp_path)
        assert outcome == [0] * world_size, log.read_text()
    (alone, whole), first, second = (
        torch.load(tmp_path / f"{rank}.pt") for rank in ("1-0", "2-0", "2-1")
    )
    for key, value in alone.items():
        assert torch.equal(first[0][key], second[0][key])
        torch.testing.assert_close(first[0][key], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_lightning_module_runs_the_same_chains_in_two_processes(tmp_path: Path) -> None:
    """DDP makes the weights equal, whatever the chains; one process shows which are right.

    Their weights are not those of one process, because Lightning deals the data in another order.
    """
    pytest.importorskip("lightning", reason="lightning is not installed")

    log = tmp_path / "log"
    for world_size in (1, 2):
        outcome = launch(world_size, log, run_lightning_example, tmp_path)
        assert outcome == [0] * world_size, log.read_text()
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(value, second[0][key]) for key, value in first[0].items())
    torch.testing.assert_close(torch.cat([first[1], second[1]]), alone[1], rtol=1e-3, atol=1e-3)


def torchrun(processes: int, restarts: int, *arguments: Any, **own: Any) -> list[str]:
    """The command line of torchrun, whose other options are ``own``."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    given = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", **own}
    given |= {"nproc_per_node": processes, "max_restarts": restarts}
    for name, value in given.items():
        launcher += [f"--{name.replace('_', '-')}", str(value)]
    return [*launcher, "-m", "--", "fastlangevin", *map(str, arguments)]


def wait_for(condition: Any, job: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the workers")
def test_torchrun_restarts_a_killed_job_from_its_checkpoint(tmp_path: Path) -> None:
    """And another torchrun with the same id does not take the finished run for its own.

    Also when it restarts; it has one process, as each takes seconds to start.
    """
    settings = SETTINGS | {"iterations": 150, "save_every": 10}
    run, log = tmp_path / "run", tmp_path / "log"
    own = {"rdzv_id": "mine", "rdzv_endpoint": f"localhost:{free_port()}"}
    train_line = ("train", "--out", run, *options(**settings))
    line = torchrun(2, 3, *train_line, **own)
    with log.open("wb") as file, subprocess.Popen(line, stdout=file, stderr=file) as job:
        wait_for(lambda: list_checkpoints(run), job)
        assert send(job, lambda ranks: ranks[-1], signal.SIGKILL)
        assert job.wait(300) == 0, log.read_text()
    train(resolve(overrides=settings), tmp_path / "alone")
    assert same_weights(run, tmp_path / "alone")
    line = torchrun(1, 1, *train_line, **own)
    again = subprocess.run(line, capture_output=True, text=True)
    assert again.returncode == 1
    refusal = "already holds a run; resume it (--resume), overwrite it (--overw"
    assert again.stderr.count(refusal) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the workers")
def test_two_launchers_without_an_id_continue_after_one_loses_a_process(tmp_path: Path) -> None:
    """The one that holds the store."""
    settings = SETTINGS | {"iterations": 150, "save_every": 10}
    run, log = tmp_path / "run", tmp_path / "log"
    train_line = ("train", "--out", run, *options(**settings))
    line = torchrun(1, 3, *train_line, rdzv_endpoint=f"localhost:{free_port()}", nnodes=2)
    with log.open("wb") as file:
        jobs = [subprocess.Popen(line, stdout=file, stderr=file) for _ in range(2)]
        wait_for(lambda: list_checkpoints(run), jobs[0])
        assert send(jobs[0], lambda ranks: ranks[0], signal.SIGKILL)
        assert [job.wait(300) for job in jobs] == [0, 0], log.read_text()
    train(resolve(overrides=settings), tmp_path / "alone")
    assert same_weights(run, tmp_path / "alone")
