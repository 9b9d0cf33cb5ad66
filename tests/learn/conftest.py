"""Fixtures of the tests of training, data, tasks and sweeps."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastlangevin.learn import TrainConfig, resolve, train
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
