"""Training runs: cut anywhere and resumed, refused, overwritten, diverged, short of disk."""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fastlangevin as fl
from fastlangevin.learn import (
    DivergedError,
    DivergenceGuard,
    Metrics,
    TrainConfig,
    checkpoint,
    resolve,
    train,
)
from fastlangevin.learn.checkpoint import CheckpointError, list_checkpoints, read_checkpoint
from fastlangevin.learn.config import FIELDS
from fastlangevin.learn.images import to_grid
from fastlangevin.learn.log import RunLog, read_records
from fastlangevin.learn.run_folder import FREE_SETTINGS, only_writer
from fastlangevin.learn.train import StopRequest, annealed

# On top of a config of the paper's. Everything that has a state is on: average, buffer, flips,
# annealing.
SETTINGS = {
    "size": None,
    "channels": None,
    "width": 2,
    "steps": 2,
    "batch_size": 4,
    "iterations": 12,
    "save_every": 3,
    "log_every": 2,
    "sample_every": 5,
    "samples": 4,
    "lr": 1e-2,
    "ema": 0.9,
    "buffer_size": 8,
    "reinit": 0.3,
    "flip": True,
    "anneal_start": 0.5,
    "lr_final": 1e-3,
    "data_noise_final": 0.01,
    "device": "cpu",
}
# Windows has no SIGHUP.
STOPPING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
FIND_SPEC = importlib.util.find_spec


class CutError(Exception):
    """What stops a run in these tests."""


@pytest.fixture(scope="module", autouse=True)
def _no_tensorboard() -> Iterator[None]:
    """Its import takes seconds; the tests that need it put it back."""

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "tensorboard" else FIND_SPEC(name, package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find_spec)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """SETTINGS on 40 random grey images of 8 x 8."""
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    return resolve("paper-cifar10", overrides=SETTINGS | {"data": str(path)})


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never cut."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config, out)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A finished run to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def cut_at(*iterations: int) -> Any:
    def report(iteration: int, record: Any) -> None:
        if iteration in iterations:
            raise CutError

    return report


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_end(run: Path, whole: Path) -> None:
    """Final tensors bit for bit, every record once, the same files with the same grids."""
    (got, got_info), (want, want_info) = read_checkpoint(run), read_checkpoint(whole)
    assert got_info == want_info
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name
    assert records(run) == records(whole)
    assert (run / "series.jsonl").read_bytes() == (whole / "series.jsonl").read_bytes()
    grids = [path for path in snapshot(whole) if path.endswith(".png")]
    for name in ("config.yaml", *grids):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


# An uninterrupted run ----------------------------------------------------------------------------


def test_what_a_run_leaves(whole: Path, config: TrainConfig) -> None:
    """Of the checkpoints the last two; no TensorBoard where it is not installed."""
    files = [name for name, content in snapshot(whole).items() if content is not None]
    assert sorted(files) == [
        "checkpoints/00000009.safetensors",
        "checkpoints/00000012.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "samples.png",
        "samples/00000005.png",
        "samples/00000010.png",
        "series.jsonl",
    ]
    assert resolve(whole / "config.yaml") == config
    names = {name.split(".")[0] for name in read_checkpoint(whole)[0]}
    assert names == {"model", "ema", "ema_updates", "adam", "buffer"}


def test_records(whole: Path, config: TrainConfig) -> None:
    found = records(whole)
    assert [record["iteration"] for record in found] == [2, 4, 6, 8, 10, 12]
    for record in found:
        lr, data_noise = annealed(config, record["iteration"] - 1)
        assert (record["lr"], record["data_noise"]) == (lr, data_noise)
        assert all(math.isfinite(value) for value in record.values())
        gap = record["energy_data"] - record["energy_samples"]
        assert record["gap"] == pytest.approx(gap, abs=1e-5)
        assert record["grad_norm"] > 0
        assert record["displacement"] > 0


def test_every_iteration_is_reported(config: TrainConfig, tmp_path: Path) -> None:
    """With the chain's own measurements where there is a record, and at the end."""
    seen = []
    shorter = dataclasses.replace(config, iterations=5)
    train(shorter, tmp_path / "run", report=lambda i, record: seen.append((i, dict(record))))
    assert [i for i, _ in seen] == [1, 2, 3, 4, 5]
    assert [record["iteration"] for _, record in seen] == [1, 2, 3, 4, 5]
    assert [record["grad_norm"] is not None for _, record in seen] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert all(record["seconds"] > 0 for _, record in seen)


def test_sample_grids_are_of_fresh_chains_of_the_model(whole: Path, config: TrainConfig) -> None:
    """samples.png is what the loaded sampler gives for the grid's seed: 2 x 2 tiles of 34, + 2."""
    samples = fl.load(whole)(n=4, seed=fl.noise.fold_in(config.seed, 2**32 + 2))
    for name in ("samples.png", "samples/00000005.png", "samples/00000010.png"):
        with Image.open(whole / name) as picture:
            assert (picture.format, picture.size, picture.mode) == ("PNG", (70, 70), "RGB")
            same = np.array_equal(np.asarray(picture), to_grid(samples))
            assert same == (name == "samples.png")


def test_a_seed_decides_everything(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    train(config, tmp_path / "same")
    assert_same_end(tmp_path / "same", whole)
    train(dataclasses.replace(config, seed=2), tmp_path / "other")
    weights = [
        read_checkpoint(run)[0]["model.layers.0.weight"] for run in (whole, tmp_path / "other")
    ]
    assert not torch.equal(*weights)


def test_a_run_leaves_torchs_generator_alone(config: TrainConfig, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(dataclasses.replace(config, iterations=1), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_outside_the_main_thread(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(config, tmp_path / "run"))
    thread.start()
    thread.join()
    assert_same_end(tmp_path / "run", whole)


OTHER = {
    "size": 16,
    "channels": 3,
    "limit": 5,
    "flip": False,
    "on_corrupt": "skip",
    "width": 3,
    "activation": "relu",
    "leak": 0.1,
    "steps": 3,
    "step_size": 0.5,
    "noise_std": 0.5,
    "clamp": (-0.5, 0.5),
    "grad_clip": 1e-4,
    "noise_order": "before",
    "precision": "bf16",
    "backend": "reference",
    "batch_size": 5,
    "data_noise": 0.5,
    "lr": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "anneal_start": 0.1,
    "lr_final": 0.5,
    "data_noise_final": 0.5,
    "ema": None,
    "buffer_size": 0,
    "buffer_kind": "fifo",
    "reinit": 0.9,
    "seed": 5,
}


@pytest.mark.parametrize("name", [k for k in OTHER if k not in ("on_corrupt", "backend")])
def test_every_setting_reaches_the_run(
    name: str, config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    """Changed alone, it changes the weights or their average; these two change only how."""
    train(dataclasses.replace(config, **{name: OTHER[name]}), tmp_path / "run")
    runs = [read_checkpoint(run)[0] for run in (whole, tmp_path / "run")]
    got, want = ({k: v.tolist() for k, v in run.items() if k[:3] in ("mod", "ema")} for run in runs)
    assert got != want


# Cut and resumed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, 13))
def test_cut_after_any_iteration(k: int, config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CutError):
        train(config, tmp_path / "run", report=cut_at(k))
    train(config, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", whole)


def test_cut_again_and_again(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for resume, k in enumerate((1, 2, 4, 5, 8, 11, 12)):
        with pytest.raises(CutError):
            train(config, out, resume=resume > 0, report=cut_at(k))
    last = train(config, out, resume=True)
    assert last == out / "checkpoints" / "00000012.safetensors"
    assert_same_end(out, whole)


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("k", [1, 6, 8])
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


VICTIM = """
import json, os, signal, sys, time
from pathlib import Path
from fastlangevin.learn import checkpoint, log, resolve, train

log._summary_writer = lambda *arguments: None
save_file, write_record = checkpoint.save_file, log.RunLog.record

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_checkpoint(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if json.loads(metadata["fastlangevin"])["iteration"] == 9:
        os.truncate(path, os.path.getsize(path) // 2)
        die()

def half_a_record(self, values):
    if values["iteration"] == 8:
        self._file.write(json.dumps(values)[:40])
        self._file.flush()
        die()
    write_record(self, values)

if sys.argv[1] == "half a checkpoint":
    checkpoint.save_file = half_a_checkpoint
elif sys.argv[1] == "half a record":
    log.RunLog.record = half_a_record
train(resolve(sys.argv[2]), sys.argv[3], report=lambda *arguments: time.sleep(0.05))
"""


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has SIGKILL")
@pytest.mark.parametrize("moment", ["half a checkpoint", "half a record", "whenever"])
def test_kill_9(moment: str, config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    """Another process, killed where it hurts, or from outside in the middle of the run."""
    out, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    arguments = [sys.executable, "-c", VICTIM, moment, str(whole / "config.yaml"), str(out)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as victim:
        if moment == "whenever":
            deadline = time.monotonic() + 60
            while not (log.exists() and len(log.read_text().splitlines()) >= 3):
                assert victim.poll() is None, victim.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.01)
            victim.kill()
        errors = victim.communicate(timeout=60)[1]
    assert victim.returncode == -signal.SIGKILL, errors
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
    config = dataclasses.replace(config, anneal_start=1.0)
    train(config, tmp_path / "whole")
    train(dataclasses.replace(config, iterations=7), tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    tensors = [read_checkpoint(tmp_path / name)[0] for name in ("whole", "run")]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert resolve(tmp_path / "run" / "config.yaml").iterations == 12


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


# Refused -----------------------------------------------------------------------------------------


def test_every_setting_is_free_or_fixed() -> None:
    assert OTHER.keys() | set(FREE_SETTINGS) == FIELDS.keys()


@pytest.mark.parametrize("name", OTHER)
def test_resume_with_another_setting(name: str, config: TrainConfig, copied: Path) -> None:
    before = snapshot(copied)
    change = rf"{name} \({getattr(config, name)} to .*\)$"
    with pytest.raises(
        ValueError, match=f"{copied} cannot be resumed with other settings: {change}"
    ):
        train(dataclasses.replace(config, **{name: OTHER[name]}), copied, resume=True)
    assert snapshot(copied) == before


def test_resume_an_annealed_run_with_another_length(config: TrainConfig, copied: Path) -> None:
    """Its learning rate would jump back, and no uncut run would have had its numbers."""
    before = snapshot(copied)
    with pytest.raises(ValueError, match=r"iterations \(12 to 20\); the annealing depends on it"):
        train(dataclasses.replace(config, iterations=20), copied, resume=True)
    assert snapshot(copied) == before


def test_resume_on_other_data(config: TrainConfig, copied: Path, tmp_path: Path) -> None:
    """The same images elsewhere are the same data; others under the old name are not."""
    images = np.load(str(config.data))
    np.save(tmp_path / "moved.npy", images)
    moved = dataclasses.replace(config, data=str(tmp_path / "moved.npy"))
    assert train(moved, copied, resume=True) == copied / "checkpoints" / "00000012.safetensors"
    np.save(tmp_path / "moved.npy", images[::-1])
    with pytest.raises(ValueError, match=r"was trained on other data than .*moved\.npy holds now"):
        train(moved, copied, resume=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "series.jsonl", "samples.png", "config.yaml"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_the_users_are_in_nobodys_way(
    name: str, overwrite: bool, config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text('{"iteration": 1, "loss": 0.5}\n')
    with pytest.raises(FileExistsError, match=f"mine already holds {name}, which a run would"):
        train(config, tmp_path / "mine", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]
    assert (tmp_path / "mine" / name).read_text() == '{"iteration": 1, "loss": 0.5}\n'


@pytest.mark.parametrize("lost", ["nothing", "samples.png", "metrics.jsonl", "checkpoints"])
def test_a_folder_that_holds_a_run(lost: str, config: TrainConfig, copied: Path) -> None:
    """Whole, or damaged: what is left of it stays. It is looked at before the data are."""
    if lost == "checkpoints":
        shutil.rmtree(copied / lost)
    elif lost != "nothing":
        (copied / lost).unlink()
    before = snapshot(copied)
    with pytest.raises(
        FileExistsError, match=f"{copied} already holds a run; resume it, overwrite"
    ):
        train(dataclasses.replace(config, data="nowhere"), copied)
    assert snapshot(copied) == before


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_two_processes_in_one_folder(config: TrainConfig, whole: Path, copied: Path) -> None:
    script = (
        "import pathlib, sys; from fastlangevin.learn.run_folder import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])): print('ready', flush=True); sys.stdin.read()"
    )
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(copied)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        for option in ("resume", "overwrite"):
            with pytest.raises(FileExistsError, match=f"another process is training in {copied}"):
                train(config, copied, **{option: True})
        assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
        other.kill()
        other.wait()
    train(config, copied, resume=True)  # the lock went with the process


def test_a_folder_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), only_writer(tmp_path / "new"):
        raise ValueError("no")
    (tmp_path / "old").mkdir()
    with only_writer(tmp_path / "old"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_checkpoints_without_a_config_are_a_run_too(config: TrainConfig, copied: Path) -> None:
    """`fl.load` takes them for one; a new run would count them as its own and prune them."""
    (copied / "config.yaml").unlink()
    before = snapshot(copied)
    fl.load(copied)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=f"{copied} already holds checkpoints/0000"):
            train(dataclasses.replace(config, iterations=3), copied, overwrite=overwrite)
    assert snapshot(copied) == before


@pytest.mark.parametrize("exists", [False, True])
def test_resume_without_a_run(exists: bool, config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if exists:
        out.mkdir()
    with pytest.raises(
        FileNotFoundError, match=rf"{out} holds no run to resume \(it has no config"
    ):
        train(config, out, resume=True)
    assert list(tmp_path.rglob("*")) == ([out] if exists else [])


def test_resume_and_overwrite(config: TrainConfig, copied: Path) -> None:
    before = snapshot(copied)
    with pytest.raises(ValueError, match="give resume or overwrite, not both"):
        train(config, copied, resume=True, overwrite=True)
    assert snapshot(copied) == before


@pytest.mark.parametrize("option", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_file_in_the_folders_place(option: dict, config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FileExistsError, match="run is a file, not a folder for a run"):
        train(config, tmp_path / "run", **option)
    assert (tmp_path / "run").read_text() == "mine"


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
    train(config, copied, overwrite=True)
    assert snapshot(copied).keys() == snapshot(whole).keys()


def test_a_run_without_a_whole_checkpoint_is_not_resumed(config: TrainConfig, copied: Path) -> None:
    for path in list_checkpoints(copied):
        os.truncate(path, 1000)
    before = snapshot(copied)
    match = r"00000012\.safetensors is truncated.*; no older checkpoint is whole"
    with pytest.raises(CheckpointError, match=match):
        train(config, copied, resume=True)
    assert snapshot(copied) == before


BAD = [
    {"data": "nowhere/at/all"},
    {"data": None},
    {"size": 12},
    {"size": 0},
    {"channels": 2},
    {"limit": 0},
    {"on_corrupt": "ignore"},
    {"width": 0},
    {"activation": "gelu"},
    {"leak": -0.1},
    {"steps": 0},
    {"steps": -3},
    {"step_size": -1.0},
    {"step_size": math.nan},
    {"noise_std": -0.1},
    {"clamp": (1.0, -1.0)},
    {"grad_clip": 0.0},
    {"noise_order": "never"},
    {"precision": "fp16"},
    {"precision": "fp7"},
    {"backend": "magic"},
    {"iterations": -1},
    {"batch_size": 0},
    {"batch_size": 9},
    {"data_noise": -0.1},
    {"data_noise_final": -0.1},
    {"lr": -1e-3},
    {"lr_final": -1e-3},
    {"beta1": 1.0},
    {"beta2": -0.1},
    {"ema": 1.0},
    {"buffer_size": -1},
    {"reinit": 1.5},
    {"seed": -1},
    {"seed": 2**64},
    {"log_every": 0},
    {"log_every": -1},
    {"sample_every": 0},
    {"save_every": 0},
    {"save_every": -1},
    {"samples": 0},
    {"samples": -1},
]


@pytest.mark.parametrize("wrong", BAD, ids=str)
def test_bad_settings_are_refused_before_anything_is_written(
    wrong: dict[str, Any], config: TrainConfig, copied: Path
) -> None:
    """An overwritten run would be gone by then."""
    before = snapshot(copied)
    for out in (copied, copied.parent / "new"):
        with pytest.raises((ValueError, FileNotFoundError)):
            train(dataclasses.replace(config, **wrong), out, overwrite=True)
    assert snapshot(copied) == before
    assert list(copied.parent.iterdir()) == [copied]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'cuda:0' was asked for, but torch sees no CUDA"):
        train(dataclasses.replace(config, device="cuda:0"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Overwritten -------------------------------------------------------------------------------------


def test_overwrite_starts_anew(config: TrainConfig, copied: Path, tmp_path: Path) -> None:
    """Nothing of the longer run is left, and nothing of it is in the numbers."""
    shorter = dataclasses.replace(config, iterations=4, seed=3)
    train(shorter, copied, overwrite=True)
    train(shorter, tmp_path / "fresh")
    assert snapshot(copied).keys() == snapshot(tmp_path / "fresh").keys()
    assert_same_end(copied, tmp_path / "fresh")


@pytest.mark.parametrize("holds_run", [True, False])
@pytest.mark.parametrize(
    "mine",
    ["notes.txt", "samples/mine.png", "checkpoints/best.safetensors", "tensorboard/mine", "a/b/c"],
)
def test_overwrite_leaves_what_is_not_the_runs(
    mine: str, holds_run: bool, config: TrainConfig, copied: Path, tmp_path: Path
) -> None:
    out = copied if holds_run else tmp_path / "project"
    (out / mine).parent.mkdir(parents=True, exist_ok=True)
    (out / mine).write_text("mine")
    train(dataclasses.replace(config, iterations=1), out, overwrite=True)
    assert (out / mine).read_text() == "mine"


def test_pruning_leaves_what_is_not_the_runs(config: TrainConfig, tmp_path: Path) -> None:
    mine = tmp_path / "run" / "checkpoints" / "00000003-best.safetensors"

    def report(iteration: int, record: Any) -> None:
        if iteration == 4:
            shutil.copy(mine.with_name("00000003.safetensors"), mine)

    last = train(config, tmp_path / "run", report=report)
    assert mine.exists()
    assert last.name == "00000012.safetensors"


# Diverged ----------------------------------------------------------------------------------------


def named_checkpoint(error: pytest.ExceptionInfo[DivergedError]) -> Path:
    return Path(str(error.value).split("the last good checkpoint is ")[1])


def runaway(config: TrainConfig) -> TrainConfig:
    """Calm for 7 iterations; in the 8th the learning rate passes 1000."""
    return dataclasses.replace(config, lr_final=1e4)


def test_energies_that_run_away(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="energies run away at iteration 9: ") as caught:
        train(runaway(config), tmp_path / "run")
    good = named_checkpoint(caught)
    assert good == tmp_path / "run" / "checkpoints" / "00000006.safetensors"
    assert fl.load(good)(n=4, seed=0).isfinite().all()
    assert all(
        math.isfinite(value) for record in records(tmp_path / "run") for value in record.values()
    )


def test_the_last_good_checkpoint_is_good(config: TrainConfig, tmp_path: Path) -> None:
    """Also where one is saved after every iteration, the one that broke the weights included."""
    config = dataclasses.replace(runaway(config), save_every=1)
    with pytest.raises(DivergedError, match="energies run away at iteration 9: ") as caught:
        train(config, tmp_path / "run")
    chain = fl.load(named_checkpoint(caught), averaged=False).diagnose(n=16, seed=0)
    assert chain.energy.abs().max() <= config.max_energy


def test_the_last_iteration_may_be_the_one_that_breaks_the_weights(
    config: TrainConfig, tmp_path: Path
) -> None:
    """Then the run has not ended well, and its last weights are not a good checkpoint."""
    config = dataclasses.replace(runaway(config), iterations=8, anneal_start=0.75)
    with pytest.raises(DivergedError) as caught:
        train(config, tmp_path / "run")
    assert named_checkpoint(caught).name == "00000006.safetensors"


def test_a_close_bound_on_the_energies_does_not_stop_the_checkpoints(
    config: TrainConfig, tmp_path: Path
) -> None:
    """A run within max_energy is saved as often as any other."""
    energies, saved = [], []

    def report(iteration: int, record: Any) -> None:
        energies.append(max(abs(record["energy_data"]), abs(record["energy_samples"])))
        saved.append([path.stem for path in list_checkpoints(tmp_path / "close")])

    train(config, tmp_path / "whole", report=report)
    close = dataclasses.replace(config, max_energy=1.001 * max(energies))
    saved.clear()
    train(close, tmp_path / "close", report=report)
    assert [names[-1:] for names in saved[2::3]] == [
        [f"{iteration:08d}"] for iteration in (3, 6, 9, 12)
    ]


def test_chains_that_stay_saturated(config: TrainConfig, tmp_path: Path) -> None:
    """A bound that real chains pass at every iteration; after 50 of them the run is stopped."""
    out = tmp_path / "run"
    constant = {"anneal_start": 1.0}  # else the length may not change
    train(dataclasses.replace(config, iterations=6, **constant), out)
    strict = dataclasses.replace(config, iterations=100, max_saturation=0.0, **constant)
    match = r"chains are saturated at iteration 56: \d+% .*, above max_saturation = 0% for 50"
    with pytest.raises(DivergedError, match=match) as caught:
        train(strict, out, resume=True)
    good = named_checkpoint(caught)
    assert good == out / "checkpoints" / "00000006.safetensors"
    assert fl.load(good)(n=4, seed=0).isfinite().all()


def test_chains_that_are_not_finite(config: TrainConfig, tmp_path: Path) -> None:
    """Noise of 3e38 passes the largest float32 in a quarter of the elements."""
    wild = dataclasses.replace(config, noise_std=3e38)
    with pytest.raises(DivergedError, match=r"not finite.*; no checkpoint was saved yet"):
        train(wild, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == []


def metrics(data: float = 0.0, samples: float = 0.0, saturation: float = 0.0) -> Metrics:
    return Metrics(7, data, samples, data - samples, saturation, reach=1.0)


@pytest.mark.parametrize("where", ["data", "samples"])
@pytest.mark.parametrize("energy", [10.1, -10.1, 1e30, math.inf, math.nan])
def test_the_guard_bounds_energies(energy: float, where: str) -> None:
    guard = DivergenceGuard(max_energy=10.0, max_saturation=0.5)
    guard.check(metrics(data=10.0, samples=-10.0))
    with pytest.raises(
        DivergedError, match=r"energies run away at iteration 7: .* max_energy is 10"
    ):
        guard.check(metrics(**{where: energy}))


def test_the_guard_has_patience_with_saturated_chains() -> None:
    """It counts iterations above the bound in a row, and is not calm meanwhile."""
    guard = DivergenceGuard(max_energy=10.0, max_saturation=0.5, patience=3)
    for saturation, calm in ((0.5, True), (0.6, False), (1.0, False), (0.2, True), (0.6, False)):
        guard.check(metrics(saturation=saturation))
        assert guard.calm == calm
    guard.check(metrics(saturation=0.6))
    with pytest.raises(DivergedError, match="chains are saturated at iteration 7: 60% "):
        guard.check(metrics(saturation=0.6))


# Short of disk -----------------------------------------------------------------------------------


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


# Annealing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "iteration", "part"),
    [
        (0.5, 0, 0.0),
        (0.5, 50, 0.0),
        (0.5, 75, 0.5),
        (0.5, 99, 0.98),
        (0.5, 100, 1.0),
        (0.0, 0, 0.0),
        (0.0, 25, 0.25),
        (0.0, 100, 1.0),
        (1.0, 99, 0.0),
        (1.0, 100, 0.0),
    ],
)
def test_annealing_is_constant_then_linear(start: float, iteration: int, part: float) -> None:
    changes = {"lr": 1.0, "lr_final": 0.5, "data_noise": 0.2, "data_noise_final": 0.6}
    config = resolve(overrides=changes | {"anneal_start": start, "iterations": 100})
    lr, data_noise = annealed(config, iteration)
    assert lr == pytest.approx(1.0 - 0.5 * part)
    assert data_noise == pytest.approx(0.2 + 0.4 * part)


def test_the_papers_configs_do_not_anneal() -> None:
    config = resolve("paper-cifar10")
    for iteration in (0, 50_000, 99_999):
        assert annealed(config, iteration) == (config.lr, config.data_noise)


# Records -----------------------------------------------------------------------------------------


def test_records_of_lost_iterations_and_half_records_are_taken_out(tmp_path: Path) -> None:
    lines = [json.dumps({"iteration": i, "gap": i / 3}) for i in (2, 4, 6, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 1')
    assert [record["iteration"] for record in read_records(tmp_path)] == [2, 4, 6, 8]
    log = RunLog(tmp_path, 5)
    log.record({"iteration": 6, "gap": 1.0})
    assert [record["gap"] for record in read_records(tmp_path)] == [2 / 3, 4 / 3, 1.0]
    log.close()


def test_a_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    assert read_records(tmp_path) == []
    log.record({"iteration": 1, "gap": 0.1, "grad_norm": None})
    assert read_records(tmp_path) == [{"iteration": 1, "gap": 0.1, "grad_norm": None}]
    log.close()


def test_tensorboard_holds_the_same_records(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that was cut after 7 and resumed from 6: nothing twice, nothing lost."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(importlib.util, "find_spec", FIND_SPEC)
    config = dataclasses.replace(config, log_every=1)
    with pytest.raises(CutError):
        train(config, tmp_path / "run", report=cut_at(8))
    train(config, tmp_path / "run", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = read_records(tmp_path / "run")
    for name in found[0].keys() - {"iteration"}:
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        want = [(record["iteration"], pytest.approx(record[name], rel=1e-6)) for record in found]
        assert scalars == want, name
    assert [image.step for image in events.Images("samples")] == [5, 10]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].height) == (70, 70)


# Real images -------------------------------------------------------------------------------------


def test_cifar10_by_path(tmp_path: Path) -> None:
    root = os.environ.get("FASTLANGEVIN_DATA")
    if root is None:
        pytest.skip("FASTLANGEVIN_DATA, the folder that holds cifar10/, is not set")
    pytest.importorskip("pyarrow")
    changes = {"data": f"{root}/cifar10", "limit": 300, "width": 4, "steps": 2, "iterations": 3}
    changes |= {"batch_size": 8, "log_every": 1, "samples": 4, "device": "cpu"}
    train(resolve("paper-cifar10", overrides=changes), tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"] == changes["data"]
    assert [record["iteration"] for record in records(tmp_path / "run")] == [1, 2, 3]
    assert all(math.isfinite(record["gap"]) for record in records(tmp_path / "run"))
    assert fl.load(tmp_path / "run")(n=2, seed=0).shape == (2, 3, 32, 32)
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size == (2 * 34 + 2, 2 * 34 + 2)
        assert np.ptp(np.asarray(picture)[2:34, 2:34], axis=-1).max() > 0  # in colour
