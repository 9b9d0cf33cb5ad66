"""Training runs that are cut anywhere and resumed end as the run that was never cut."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlangevin as fl
from fastlangevin.learn import (
    TrainConfig,
    checkpoint,
    resolve,
    train,
)
from fastlangevin.learn.checkpoint import CheckpointError, list_checkpoints, read_checkpoint
from fastlangevin.learn.log import RunLog
from fastlangevin.learn.run_folder import FREE_SETTINGS
from fastlangevin.learn.stop import StopRequest
from tests.learn.train_shared import CutError, assert_same_end, cut_at, snapshot
from tests.processes import start

# Windows has no SIGHUP.
STOPPING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def test_a_run_that_is_cut_again_and_again_ends_as_one_that_is_not(
    config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    """Also after a checkpoint alone (3) or with a record (6), between two (7), at a grid (10)."""
    out = tmp_path / "run"
    for resume, k in enumerate((2, 3, 6, 7, 10, 12)):
        with pytest.raises(CutError):
            train(config, out, resume=resume > 0, report=cut_at(k))
    last = train(config, out, resume=True)
    assert last == out / "checkpoints" / "00000012.safetensors"
    assert_same_end(out, whole)


@pytest.mark.parametrize(("k", "number"), list(zip([8, 1, 2], STOPPING, strict=False)), ids=str)
def test_a_signal_ends_the_run_with_a_checkpoint(
    k: int, number: signal.Signals, config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    def report(iteration: int, record: Any) -> None:
        if iteration == k:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    stop = StopRequest()
    last = train(config, tmp_path / "run", report=report, stop=stop)
    assert stop.signal == number
    assert signal.getsignal(number) == before
    assert last == tmp_path / "run" / "checkpoints" / f"{k:08d}.safetensors"
    assert read_checkpoint(last)[1]["iteration"] == k
    if number != STOPPING[0]:
        return
    train(config, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", whole)


def test_a_second_signal_acts_at_once(config: TrainConfig, whole: Path, tmp_path: Path) -> None:

    def report(iteration: int, record: Any) -> None:
        if iteration == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", report=report)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    train(config, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", whole)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def victim(moment: str, config: TrainConfig, out: Path) -> None:
    """A run that kills itself in the middle of a file, or is slow enough to be killed."""
    save_file, write_record = checkpoint.save_file, RunLog.record

    def half_a_checkpoint(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        if json.loads(metadata["fastlangevin"])["iteration"] == 9:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def half_a_record(self: RunLog, values: Any) -> None:
        if values["iteration"] == 8:
            self._file.write(json.dumps(values)[:40])
            self._file.flush()
            die()
        write_record(self, values)

    if moment == "half a checkpoint":
        checkpoint.save_file = half_a_checkpoint
    elif moment == "half a record":
        RunLog.record = half_a_record  # type: ignore[method-assign]
    train(config, out, report=lambda *arguments: time.sleep(0.05))


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has SIGKILL")
@pytest.mark.parametrize(
    "moment",
    ["half a checkpoint", "half a record", pytest.param("whenever", marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_goes_on_to_the_same_end(
    moment: str, config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    """Another process, killed where it hurts, or from outside in the middle of the run."""
    out, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    process = start(victim, moment, config, out)
    if moment == "whenever":
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "samples.png").exists()
    fl.load(out)
    train(config, out, resume=True)
    assert_same_end(out, whole)


def test_a_finished_run_is_resumed_to_the_same_end(
    config: TrainConfig, whole: Path, copied: Path
) -> None:
    before = snapshot(copied)
    last = train(config, copied, resume=True, report=cut_at(*range(100)))
    assert last == copied / "checkpoints" / "00000012.safetensors"
    assert snapshot(copied) == before
    assert_same_end(copied, whole)


def test_a_resumed_run_may_go_on_for_longer(config: TrainConfig, tmp_path: Path) -> None:
    """Without annealing, whose schedule depends on the number of iterations."""
    config = dataclasses.replace(config, anneal_start=1.0, iterations=6)
    train(config, tmp_path / "whole")
    train(dataclasses.replace(config, iterations=4), tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    tensors = [read_checkpoint(tmp_path / name)[0] for name in ("whole", "run")]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert resolve(tmp_path / "run" / "config.yaml").iterations == 6


def test_cadence_and_bounds_may_change_and_change_no_number(
    config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(CutError):
        train(config, tmp_path / "run", report=cut_at(7))
    free = {"log_every": 1, "sample_every": 2, "save_every": 5, "samples": 2, "device": "auto"}
    if torch.cuda.is_available():
        del free["device"]
    free |= {"max_energy": 1e9, "max_saturation": 0.99}
    assert free.keys() | {"iterations", "device", "data"} == set(FREE_SETTINGS)
    train(dataclasses.replace(config, **free), tmp_path / "run", resume=True)
    tensors = [read_checkpoint(run)[0] for run in (whole, tmp_path / "run")]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_resume_falls_back_to_the_checkpoint_before_a_damaged_one(
    config: TrainConfig, whole: Path, copied: Path
) -> None:
    """It says so, and keeps the damaged file under another name."""
    newest = copied / "checkpoints" / "00000012.safetensors"
    os.truncate(newest, 1000)
    with pytest.warns(UserWarning, match=rf"{newest} is truncated.* continues from .*09\.safet"):
        train(config, copied, resume=True)
    assert_same_end(copied, whole)
    assert newest.with_suffix(".damaged").stat().st_size == 1000
    train(dataclasses.replace(config, iterations=1), copied, overwrite=True)
    assert not newest.with_suffix(".damaged").exists()


def test_a_run_without_a_whole_checkpoint_is_not_resumed(config: TrainConfig, copied: Path) -> None:
    for path in list_checkpoints(copied):
        os.truncate(path, 1000)
    before = snapshot(copied)
    match = r"00000012\.safetensors is truncated.*; no older checkpoint is whole"
    with pytest.raises(CheckpointError, match=match):
        train(config, copied, resume=True)
    assert snapshot(copied) == before


def test_a_full_disk_loses_no_checkpoint(
    config: TrainConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills half way through the checkpoint of iteration 9; the run continues from 6."""
    out, save_file = tmp_path / "run", checkpoint.save_file

    def fill_the_disk(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        if json.loads(metadata["fastlangevin"])["iteration"] == 9:
            os.truncate(path, 1000)
            raise OSError(28, "No space left on device")

    kept = {}

    def report(iteration: int, record: Any) -> None:
        kept.update(snapshot(out / "checkpoints"))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fill_the_disk)
        with pytest.raises(OSError, match="No space left on device"):
            train(config, out, report=report)
    assert list(kept) == ["00000003.safetensors", "00000006.safetensors"]
    assert snapshot(out / "checkpoints") == kept
    train(config, out, resume=True)
    assert_same_end(out, whole)
