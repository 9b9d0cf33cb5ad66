"""train: what a user types, reads and gets back."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastlangevin.learn import resolve
from fastlangevin.learn.checkpoint import read_checkpoint
from tests.cli.shared import TINY, Command, assert_refused, options


def test_train_writes_a_run(command: Command, tmp_path: Path) -> None:
    result = command("train", "--out", "run", *options())
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["checkpoint", "run/checkpoints/00000004.safetensors"],
        ["samples", "run/samples.png"],
        ["settings", "run/config.yaml"],
    ]
    for line in result.stdout.splitlines():
        assert (tmp_path / line.split()[1]).is_file()
    assert resolve(tmp_path / "run" / "config.yaml") == resolve(overrides=TINY)


def test_without_a_terminal_progress_is_lines(command: Command) -> None:
    """One for every twentieth of the run, with the gap and, where measured, the gradient norm."""
    changes = {"iterations": 40, "log_every": 4, "sample_every": 40, "save_every": 40}
    result = command("train", "--out", "run", *options(**changes))
    first, *lines = result.stderr.splitlines()
    assert re.fullmatch(
        r"digits, 1797 x 1x8x8; 40 iterations of \d+ chains: \d+ steps on 1x8x8, cpu with "
        r"(?:1 thread|up to \d+ threads), engine fused, precision fp32, to run",
        first,
    )
    found = [
        re.match(r"iteration (\d+)/40  gap [+-]\d+\.\d{3}(  \|grad\| \d+\.\d{3})?$", line)
        for line in lines
    ]
    assert all(found), lines
    assert [int(match[1]) for match in found if match] == list(range(2, 41, 2))
    assert [bool(match[2]) for match in found if match] == [i % 4 == 0 for i in range(2, 41, 2)]


def test_options_win_over_the_file_and_the_file_over_the_config_it_names(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(
        'config = "paper-64"\nleak = 0.3\nwidth = 5\nbeta1 = 0.5\ndata = "digits"\n'
    )
    changes = {"size": 8, "channels": 1, "beta1": 0.25}
    arguments = ("--config", "mine.toml", *options(**changes))
    result = command("train", "--out", "run", *arguments)
    assert result.exit_code == 0, result.output
    want = TINY | changes | {"leak": 0.3, "data": "digits"}
    assert resolve(tmp_path / "run" / "config.yaml") == resolve("paper-64", overrides=want)


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (
            "--flip --clamp -1 1 --lr 1e-3 --ema 0.5 --buffer-size 8 --reinit 0.5",
            {"flip": True, "clamp": [-1.0, 1.0], "lr": 1e-3, "ema": 0.5, "reinit": 0.5},
        ),
        (
            f"--no-flip --ema none --limit none --precision none --seed {2**64 - 1}",
            {"flip": False, "ema": None, "limit": None, "precision": None, "seed": 2**64 - 1},
        ),
    ],
)
def test_options_of_each_kind(
    arguments: str, settings: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    result = command("train", "--out", "run", *options(iterations=1), *arguments.split())
    assert result.exit_code == 0, result.output
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {name: saved[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("arguments", "name"),
    [([], "digits"), (["--config", "paper-64"], "paper-64"), (["--config", "mine.yaml"], "mine")],
    ids=["default", "name", "file"],
)
def test_a_folder_is_chosen_where_none_is_named(
    arguments: list[str], name: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 1e-3")
    others = [f"runs/{name}-2", f"runs/{name}-3"] if name == "digits" else []
    for folder in (f"runs/{name}", *others):
        changes = {"iterations": 1, "data": "digits", "size": 8, "channels": 1}
        result = command("train", *arguments, *options(**changes))
        assert f"{folder}/checkpoints" in result.stdout
        assert (tmp_path / folder / "config.yaml").exists()


def test_resume_continues_a_run(command: Command, copied: Path, tmp_path: Path) -> None:
    """The run's own settings, and what it may change."""
    result = command("train", "--out", copied, "--resume", "--log-every", "1")
    assert result.exit_code == 0, result.output
    config = resolve(copied / "config.yaml")
    assert config == resolve(overrides=TINY | {"ema": 0.9, "log_every": 1})
    assert read_checkpoint(copied)[1]["iteration"] == 4


def test_overwrite_replaces_a_run(command: Command, copied: Path) -> None:
    result = command("train", "--out", copied, "--overwrite", *options(iterations=1, seed=5))
    assert result.exit_code == 0, result.output
    assert read_checkpoint(copied)[1]["iteration"] == 1
    assert resolve(copied / "config.yaml").seed == 5


def test_a_diverging_run_is_a_one_line_error(command: Command, tmp_path: Path) -> None:
    result = command("train", "--out", "run", *options(noise_std=3e38))
    assert_refused(result, "not finite.*no checkpoint was saved yet")
