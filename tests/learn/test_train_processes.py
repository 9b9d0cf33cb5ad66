"""Training runs of several processes, here threads: one folder, one result, named failures."""

import contextlib
import dataclasses
import importlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastlangevin.learn.job as job
from fastlangevin.distributed import DistributedError, Group
from fastlangevin.learn import TrainConfig, resolve, train
from fastlangevin.learn.checkpoint import list_checkpoints
from fastlangevin.learn.log import RunLog
from fastlangevin.learn.stop import StopRequest
from tests.distributed.threads import ThreadGroup, run_ranks
from tests.learn.train_shared import SETTINGS, CutError, assert_same_end, cut_at, records

train_module = importlib.import_module("fastlangevin.learn.train")
SMALL = {"data": "digits", "limit": 64, "parts": 3, "iterations": 6}
learner_module = importlib.import_module("fastlangevin.learn.learner")


@pytest.fixture(autouse=True)
def _one_builds_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are drawn from torch's global generator, which the threads of a test share."""
    lock, build = threading.Lock(), train_module.build_learner

    def locked(*arguments: Any, **options: Any) -> Any:
        with lock:
            return build(*arguments, **options)

    monkeypatch.setattr(train_module, "build_learner", locked)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return resolve(overrides=SETTINGS | SMALL)


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config, out)
    return out


def assert_ends_as(run: Path, whole: Path) -> None:
    """The same checkpoint, grids and records, but for what the processes communicated."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith("commu")} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_same_end(run, whole)


def test_a_run_of_several_processes_is_that_of_one(
    config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    last = run_ranks(3, lambda group: train(config, out, group=group))
    assert last == [list_checkpoints(out)[-1]] * 3
    for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        assert record["communicated_bytes"] > 0
        assert record["communication_seconds"] > 0
    assert_ends_as(out, whole)


def test_what_one_process_does_alone_is_done_as_work_that_the_others_wait_for(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a grid, a checkpoint or the data take."""
    announced, working = threading.local(), ThreadGroup.working
    done: dict[str, list[bool]] = {}

    @contextlib.contextmanager
    def noted(group: Group) -> Iterator[None]:
        announced.now = True
        with working(group):
            yield
        announced.now = False

    def noting(name: str, call: Any) -> Any:
        def noted_call(*arguments: Any, **options: Any) -> Any:
            done.setdefault(name, []).append(getattr(announced, "now", False))
            return call(*arguments, **options)

        return noted_call

    monkeypatch.setattr(ThreadGroup, "working", noted)
    for owner, name in (
        (train_module, "build_learner"),
        (train_module, "draw_samples"),
        (train_module, "is_sound"),
        (train_module, "remove_old_checkpoints"),
        (train_module, "save_grid"),
        (learner_module, "save_checkpoint"),
        (learner_module.ShortRunLearner, "load"),
        (RunLog, "sync"),
        (RunLog, "grid"),
    ):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    short = dataclasses.replace(config, iterations=3, save_every=2, sample_every=2)
    for error in run_ranks(2, lambda g: train(short, tmp_path, report=cut_at(2), group=g)):
        assert isinstance(error, CutError)
    run_ranks(2, lambda group: train(short, tmp_path, resume=True, group=group))
    assert len(done) == 9
    assert all(all(times) for times in done.values()), done


def test_a_run_is_resumed_by_another_number_of_processes(
    config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    cut = cut_at(4)
    for error in run_ranks(3, lambda group: train(config, out, report=cut, group=group)):
        assert isinstance(error, CutError)
    run_ranks(2, lambda group: train(config, out, resume=True, group=group))
    assert_ends_as(out, whole)


def test_a_signal_to_one_process_stops_all_with_one_checkpoint(
    config: TrainConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def work(group: Group) -> tuple[int | None, Path]:
        stop = StopRequest()

        def report(iteration: int, record: Any) -> None:
            if group.rank == 1 and iteration == 4:
                stop.signal = 15

        return train(config, out, report=report, stop=stop, group=group) and stop.signal

    assert run_ranks(3, work) == [15] * 3
    (last, *_) = reversed(list_checkpoints(out))
    assert int(last.stem) == 5  # the iteration that told the others
    assert records(out)[-1]["iteration"] == 4


def test_processes_with_other_settings_are_named_before_anything_is_written(
    config: TrainConfig, tmp_path: Path
) -> None:
    def work(group: Group) -> Path:
        other = resolve(overrides=SETTINGS | SMALL | {"lr": 0.5})
        return train(other if group.rank == 2 else config, tmp_path / "run", group=group)

    for error in run_ranks(3, work):
        assert isinstance(error, DistributedError)
        assert str(error) == (
            "start: the processes differ in lr: 0.01 on ranks 0, 1, 0.5 on rank 2"
        )
    assert not (tmp_path / "run").exists()


def test_processes_with_other_data_or_code_are_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "images.npy", np.zeros((9, 1, 8, 8), np.uint8))
    other = dataclasses.replace(config, data=str(tmp_path / "images.npy"))

    def work(group: Group) -> Path:
        return train(other if group.rank else config, tmp_path / "run", group=group)

    for error in run_ranks(2, work):
        assert "start: the processes differ in the data: {" in str(error)
    digests = iter("ab")
    monkeypatch.setattr(job, "_digest", lambda: next(digests))
    for error in run_ranks(2, lambda group: train(config, tmp_path / "run", group=group)):
        assert "start: the processes differ in the code: " in str(error)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_a_rank_does_not_see_is_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_SEEN_WITHIN", 0.2)

    def work(group: Group) -> Path:
        return train(config, tmp_path / f"disk-{group.rank}" / "run", group=group)

    for error in run_ranks(2, work):
        assert "run of rank 0 is not the folder that ranks 1 see under this name" in str(error)


def test_the_reason_of_rank_0_reaches_the_others(
    config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    first, *others = run_ranks(3, lambda group: train(config, whole, group=group))
    assert isinstance(first, FileExistsError)
    for error in others:
        assert isinstance(error, DistributedError)
        assert "rank 0 failed: FileExistsError: train: " in str(error)
        assert "already holds a run" in str(error)


def test_a_restarted_job_continues_its_run_and_no_other(
    config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(config, out, report=cut_at(4), group=Group(job="job", start="first"))
    for group in (Group(job="other", start="first"), Group(), Group(job="job", start="first")):
        with pytest.raises(FileExistsError, match="already holds a run"):
            train(config, out, group=group)
    # Overwriting means what was there before the job began.
    train(config, out, overwrite=True, group=Group(job="job", start="second"))
    assert_same_end(out, whole)
    assert min(r["iteration"] for r in records(out)) == 2
    # Another restart, after the run has ended and before all processes have.
    train(config, out, overwrite=True, group=Group(job="job", start="third"))
    assert_same_end(out, whole)


@pytest.mark.parametrize("group", [Group(job="job", start="first"), Group(job="next", start="a")])
def test_a_finished_run_is_overwritten_by_the_same_processes_or_another_job(
    group: Group, config: TrainConfig, tmp_path: Path
) -> None:
    """And not taken for one that a restart continues."""
    out, short = tmp_path / "run", dataclasses.replace(config, iterations=2)
    train(short, out, group=Group(job="job", start="first"))
    other = dataclasses.replace(short, lr=0.02)
    seen: list[int] = []
    train(other, out, overwrite=True, report=lambda i, _: seen.append(i), group=group)
    assert seen == [1, 2]


def test_more_processes_than_chains_are_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path
) -> None:
    small = dataclasses.replace(config, batch_size=2, parts=1)
    out = tmp_path / "run"
    for error in run_ranks(3, lambda group: train(small, out, group=group)):
        assert isinstance(error, ValueError)
        assert "batch_size must be at least the number of processes = 3, got 2" in str(error)
    assert not out.exists()


def test_the_digest_of_the_code_depends_on_compiled_extensions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "__file__", str(tmp_path / "learn" / "job.py"))
    (tmp_path / "learn").mkdir()
    digests = []
    for name in ("learn/job.py", "_native.cpython-311.so", "_native.pyd"):
        for content in ("a", "b"):
            (tmp_path / name).write_text(content)
            digests.append(job._digest())
    assert len(set(digests)) == len(digests)
    (tmp_path / "notes.txt").write_text("no code")
    assert job._digest() == digests[-1]
