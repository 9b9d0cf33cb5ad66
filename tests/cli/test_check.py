"""check: whether a classifier recognises the samples."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import fastlangevin as fl
from fastlangevin.learn import load_images
from tests.cli.shared import Command, assert_refused, options


def test_check_fails_noise(command: Command, run: Path) -> None:
    """After 4 iterations the samples are noise."""
    result = command("check", run, "--n", 32)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "fail"
    found = re.findall(
        r"^(real images|samples|uniform noise) +sure of +(\d+)%", result.stdout, re.M
    )
    assert [name for name, _ in found] == ["real images", "samples", "uniform noise"]
    assert int(found[0][1]) > 80
    assert int(found[1][1]) < 50


@pytest.mark.parametrize(
    ("classes", "sure", "passes"), [(10, 0.5, True), (10, 0.99, False), (1, 0.5, False)]
)
def test_check_passes_what_is_sure_and_has_every_class(
    classes: int,
    sure: float,
    passes: bool,
    command: Command,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With real digits in the samples' place: sure of 88 %, but for zeros alone of one class."""
    digits = load_images("digits")
    assert digits.labels is not None
    images = digits.batch(np.flatnonzero(digits.labels < classes))
    monkeypatch.setattr(fl.LangevinSampler, "__call__", lambda sampler, **options: images)
    result = command("check", run, "--sure", sure)
    (percent,) = re.findall(r"^samples +sure of +(\d+)%", result.stdout, re.MULTILINE)
    assert (int(percent) > 50, result.exit_code) == (True, 0 if passes else 1), result.output
    assert result.stdout.splitlines()[-1] == ("pass" if passes else "fail")


def test_check_judges_the_samples_asked_for(command: Command, run: Path) -> None:
    """n of them, other ones for another seed."""
    lines = [
        command("check", run, "--n", n, "--seed", seed).stdout.splitlines()[1]
        for n, seed in ((64, 1), (64, 2), (65, 1))
    ]
    counts = [json.loads(line.split("per class ")[1]) for line in lines]
    assert [sum(count) for count in counts] == [64, 64, 65]
    assert counts[0] != counts[1]


def test_check_needs_labels(command: Command, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((9, 8, 8), np.uint8))
    result = command("train", "--out", "run", *options(data="x.npy", iterations=1))
    assert result.exit_code == 0, result.output
    assert_refused(command("check", "run"), "check: x.*has no labels")


def test_check_without_a_run(command: Command) -> None:
    assert_refused(command("check", "absent"), "absent does not exist")
