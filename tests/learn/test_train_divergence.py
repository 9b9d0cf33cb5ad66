"""Training runs that diverge stop, and keep their last good checkpoint."""

import dataclasses
import functools
import importlib
import math
from pathlib import Path
from typing import Any

import pytest

import fastlangevin as fl
from fastlangevin.learn import (
    DivergedError,
    DivergenceGuard,
    Metrics,
    TrainConfig,
    train,
)
from fastlangevin.learn.checkpoint import list_checkpoints
from tests.command import run_command
from tests.learn.train_shared import records


def named_checkpoint(error: pytest.ExceptionInfo[DivergedError]) -> Path:
    return Path(str(error.value).split("the last good checkpoint is ")[1])


def runaway(config: TrainConfig) -> TrainConfig:
    """Calm for 7 iterations; in the 8th the learning rate passes 1000."""
    return dataclasses.replace(config, lr_final=1e4)


def test_a_run_whose_energies_diverge_stops(config: TrainConfig, tmp_path: Path) -> None:
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


def test_chains_that_stay_saturated(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound that real chains pass at every iteration; after 5 of them the run is stopped."""
    patient = functools.partial(DivergenceGuard, patience=5)
    train_module = importlib.import_module("fastlangevin.learn.train")
    monkeypatch.setattr(train_module, "DivergenceGuard", patient)
    out = tmp_path / "run"
    constant = {"anneal_start": 1.0}  # else the length may not change
    train(dataclasses.replace(config, iterations=6, **constant), out)
    strict = dataclasses.replace(config, iterations=100, max_saturation=0.0, **constant)
    match = r"chains are saturated at iteration 11: \d+% .*, above max_saturation = 0% for 5"
    with pytest.raises(DivergedError, match=match) as caught:
        train(strict, out, resume=True)
    good = named_checkpoint(caught)
    assert good == out / "checkpoints" / "00000006.safetensors"
    assert fl.load(good)(n=4, seed=0).isfinite().all()


def test_chains_that_are_not_finite(config: TrainConfig, tmp_path: Path) -> None:
    """Noise of 3e38 passes the largest float32 in a quarter of the elements."""
    wild = dataclasses.replace(config, noise_std=3e38)
    match = r"not finite.*; no checkpoint was saved yet; .* a tenth of lr, .*docs/divergence\.md"
    with pytest.raises(DivergedError, match=match):
        train(wild, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == []


def test_a_run_without_a_checkpoint_says_where_it_diverged(
    config: TrainConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    early = dataclasses.replace(runaway(config), save_every=100)
    with pytest.raises(DivergedError, match="energies run away at iteration 9"):
        train(early, out)
    said = "diverged at iteration 9: energies run away at iteration 9"
    with pytest.raises(FileNotFoundError, match=f"holds no checkpoint: the run {said}.*tenth of"):
        fl.load(out)
    result = run_command("diagnose", out)
    assert result.exit_code == 1
    assert said in result.stderr
    assert run_command("report", out).exit_code == 0
    assert f"The run {said}" in (out / "report.html").read_text()
    train(dataclasses.replace(config, iterations=1), out, overwrite=True)
    assert not (out / "diverged.txt").exists()


def test_the_iteration_of_chains_that_are_not_finite(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        train(dataclasses.replace(config, noise_std=3e38), tmp_path / "run")
    assert (tmp_path / "run" / "diverged.txt").read_text().startswith("diverged at iteration 1: ")


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
