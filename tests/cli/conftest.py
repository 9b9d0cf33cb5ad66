"""What the tests of the command share: a tiny run, and the command in an empty folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlangevin.learn import resolve, train
from fastlangevin.learn.diagnosis import write_diagnosis
from tests.cli.shared import TINY
from tests.command import run_command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return run_command


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the picture of a diagnosis, which takes longer than all else of it.

    tests/learn/diagnosis/test_diagnose.py looks at it.
    """
    monkeypatch.setattr(write_diagnosis, "_plot", lambda diagnosis, path, title: path.touch())


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on real digits."""
    out = tmp_path_factory.mktemp("cli") / "run"
    train(resolve(overrides=TINY | {"ema": 0.9}), out)
    return out


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))
