"""What a training run refuses, overwrites and leaves alone in its folder."""

import dataclasses
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastlangevin as fl
from fastlangevin.learn import (
    TrainConfig,
    train,
)
from fastlangevin.learn.config import FIELDS
from fastlangevin.learn.run_folder import FREE_SETTINGS, only_writer
from tests.learn.train_shared import OTHER, assert_same_end, snapshot
from tests.processes import start


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
def test_other_files_in_the_folder_do_not_stop_a_run(
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
        FileExistsError, match=f"{copied} already holds a run; resume it .--resume., overw"
    ):
        train(dataclasses.replace(config, data="nowhere"), copied)
    assert snapshot(copied) == before


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def hold(run: Path) -> None:
    """Be the only writer in a run's folder, until killed."""
    with only_writer(run):
        run.with_name("held").touch()
        time.sleep(600)


def test_two_processes_in_one_folder(config: TrainConfig, whole: Path, copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    other = start(hold, copied)
    deadline = time.monotonic() + 60
    while not copied.with_name("held").exists():
        assert other.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for option in ("resume", "overwrite"):
        with pytest.raises(FileExistsError, match=f"another process is training in {copied}"):
            train(config, copied, **{option: True})
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    other.kill()
    other.join(60)
    train(config, copied, resume=True)  # the lock went with the process


def test_a_folder_made_by_a_failed_start_is_removed(tmp_path: Path) -> None:
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
    {"learn_precision": "fp16"},
    {"learn_precision": "bf"},
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


def test_overwrite_replaces_the_run(config: TrainConfig, copied: Path, tmp_path: Path) -> None:
    """Nothing of the longer run is left, and nothing of it is in the numbers."""
    shorter = dataclasses.replace(config, iterations=4, seed=3)
    train(shorter, copied, overwrite=True)
    train(shorter, tmp_path / "fresh")
    assert snapshot(copied).keys() == snapshot(tmp_path / "fresh").keys()
    assert_same_end(copied, tmp_path / "fresh")


@pytest.mark.parametrize("holds_run", [True, False])
def test_overwrite_leaves_what_is_not_the_runs(
    holds_run: bool, config: TrainConfig, copied: Path, tmp_path: Path
) -> None:
    out = copied if holds_run else tmp_path / "project"
    names = ["notes.txt", "samples/mine.png", "checkpoints/best.safetensors", "tensorboard/mine"]
    for mine in (*names, "a/b/c"):
        (out / mine).parent.mkdir(parents=True, exist_ok=True)
        (out / mine).write_text("mine")
    train(dataclasses.replace(config, iterations=1), out, overwrite=True)
    for mine in (*names, "a/b/c"):
        assert (out / mine).read_text() == "mine"


def test_pruning_leaves_what_is_not_the_runs(config: TrainConfig, tmp_path: Path) -> None:
    mine = tmp_path / "run" / "checkpoints" / "00000003-best.safetensors"

    def report(iteration: int, record: Any) -> None:
        if iteration == 4:
            shutil.copy(mine.with_name("00000003.safetensors"), mine)

    last = train(config, tmp_path / "run", report=report)
    assert mine.exists()
    assert last.name == "00000012.safetensors"
