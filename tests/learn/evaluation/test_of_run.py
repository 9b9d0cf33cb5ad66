"""evaluate_run returns what its command writes."""

import json
from pathlib import Path

import pytest

from fastlangevin.learn import resolve
from fastlangevin.learn.build import load_data
from fastlangevin.learn.checkpoint import read_checkpoint
from fastlangevin.learn.evaluation.of_run import evaluate_run
from tests.command import run_command


def test_evaluate_run_has_the_figures_that_the_command_writes(tmp_path: Path) -> None:
    config = resolve(overrides=read_checkpoint("digits")[1]["config"])
    found = evaluate_run("digits", config, load_data(config), n=16, features="pixels", reference=80)
    out = tmp_path / "a.json"
    options = ("--n", 16, "--features", "pixels", "--reference", 80, "--out", out)
    done = run_command("evaluate", "digits", *options)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert written["figures"] == {n: f._asdict() for n, f in found.evaluation.figures.items()}
    assert {name: written[name] for name in found.facts} == found.facts
    assert done.stdout == f"{found.text()}\n{out}\n"


def test_evaluate_run_warns_if_nothing_is_held_out() -> None:
    config = resolve(overrides=read_checkpoint("digits")[1]["config"] | {"limit": None})
    data = load_data(config)
    with pytest.warns(UserWarning, match="no held-out images: "):
        found = evaluate_run("digits", config, data, n=8, features="pixels", reference=80)
    assert "other training images" in found.evaluation.figures
    assert found.facts["held_out"] is None
