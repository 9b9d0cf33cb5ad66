"""diagnose_run returns what its command writes."""

import json
from pathlib import Path

import pytest

from fastlangevin.learn import resolve
from fastlangevin.learn.build import load_data
from fastlangevin.learn.checkpoint import read_checkpoint
from fastlangevin.learn.diagnosis import write_diagnosis
from fastlangevin.learn.diagnosis.diagnose_run import diagnose_run
from tests.command import run_command


def test_diagnose_run_has_the_figures_that_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_diagnosis, "_plot", lambda diagnosis, path, title: path.touch())
    config = resolve(overrides=read_checkpoint("digits")[1]["config"])
    data = load_data(config)
    found = diagnose_run("digits", config, data, n=16, long=1, starts=2, lags=2)
    options = ("--n", 16, "--long", 1, "--starts", 2, "--lags", 2, "--out", tmp_path)
    assert run_command("diagnose", "digits", *options).exit_code == 0
    written = json.loads((tmp_path / "diagnose.json").read_text())
    assert written["mixing"] == json.loads(json.dumps(found.diagnosis.mixing._asdict()))
