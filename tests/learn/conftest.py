"""Fixtures of the tests of training, data, tasks and sweeps."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlangevin.learn import TrainConfig, resolve, train
from fastlangevin.learn.data import arrays, collect
from fastlangevin.learn.sweep.plan import Sweep
from tests.learn.sweep_shared import CENTRE
from tests.learn.tasks_shared import OPERATORS
from tests.learn.train_shared import SETTINGS


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """SETTINGS on 40 random grey images of 8 x 8."""
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    return resolve("paper-cifar10", overrides=SETTINGS | {"data": str(path)})


@pytest.fixture(scope="session")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never cut."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config, out)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A finished run to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


@pytest.fixture(params=OPERATORS, ids=str)
def operator(request: pytest.FixtureRequest) -> Any:
    return OPERATORS[request.param]


@pytest.fixture(scope="module")
def plan() -> Sweep:
    return Sweep(resolve(overrides=CENTRE), {"steps": [1, 2]}, seeds=2)


@pytest.fixture
def spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put even small arrays in a temporary file."""
    monkeypatch.setattr(collect, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 0)
