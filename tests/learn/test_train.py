"""An uninterrupted training run: its files, records, annealing and what a seed decides."""

import dataclasses
import importlib.util
import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fastlangevin as fl
from fastlangevin.learn import (
    TrainConfig,
    resolve,
    train,
)
from fastlangevin.learn.build import build_learner
from fastlangevin.learn.checkpoint import read_checkpoint
from fastlangevin.learn.images import to_grid
from fastlangevin.learn.log import RunLog, read_records
from fastlangevin.learn.train import annealed
from tests.learn.train_shared import (
    FIND_SPEC,
    OTHER,
    CutError,
    assert_same_end,
    cut_at,
    records,
    snapshot,
)


def test_a_run_leaves_these_files(whole: Path, config: TrainConfig) -> None:
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


def test_records_have_the_annealed_settings_and_finite_figures(
    whole: Path, config: TrainConfig
) -> None:
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


def test_a_run_leaves_torchs_generator_alone(config: TrainConfig, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(dataclasses.replace(config, iterations=1), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_outside_the_main_thread(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(config, tmp_path / "run"))
    thread.start()
    thread.join()
    assert_same_end(tmp_path / "run", whole)


def learned(config: TrainConfig) -> dict[str, list[float]]:
    """Weights and their average; three iterations show annealing, buffer and average."""
    learner = build_learner(config)
    for i in range(config.iterations):
        learner.lr, learner.data_noise = annealed(config, i)
        learner.step()
    return {k: v.tolist() for k, v in learner.tensors().items() if k[:3] in ("mod", "ema")}


@pytest.fixture(scope="module")
def short(config: TrainConfig) -> dict[str, list[float]]:
    return learned(dataclasses.replace(config, iterations=3))


@pytest.mark.parametrize(
    "name", [k for k in OTHER if k not in ("on_corrupt", "backend", "energy", "start")]
)
def test_every_setting_reaches_the_run(
    name: str, config: TrainConfig, short: dict[str, list[float]]
) -> None:
    """Changed alone, it changes the weights or their average; the first two change only how.

    tests/cli/test_train_energy.py is about the energy, test_coarse_to_fine.py about the start.
    """
    assert learned(dataclasses.replace(config, **{"iterations": 3, name: OTHER[name]})) != short


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
