"""What sweeps refuse, and the command."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastlangevin.distributed import own_device
from fastlangevin.learn import resolve, sweep
from fastlangevin.learn.sweep import write_sweep
from fastlangevin.learn.sweep.plan import Sweep, read_sweep
from fastlangevin.learn.sweep.run import run_sweep
from tests.command import run_command
from tests.learn.sweep.shared import CENTRE, interrupted, options


def test_a_sweep_that_another_process_begins_meanwhile_is_joined(
    plan: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes its plan and a run between any two looks at the folder."""
    look = Path.exists

    def begin_after_a_look(path: Path) -> bool:
        found = look(path)
        if path == tmp_path / "sweep.yaml" and not found:
            path.write_text(sweep.run.MARK + yaml.safe_dump(plan.plan()))
            (tmp_path / plan.runs()[0].name).mkdir()
        return found

    monkeypatch.setattr(Path, "exists", begin_after_a_look)
    sweep.run._check_folder(plan, tmp_path)
    assert (tmp_path / "sweep.yaml").is_file()
    sweep.run._check_folder(plan, tmp_path)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "no field is swept"),
        ({"zzz": [1]}, "no setting is called zzz; the settings are data, "),
        ({"stpes": [1, 2]}, r"no setting is called stpes; did you mean steps\?$"),
        ({"seed": [1, 2]}, "seed cannot be an axis"),
        ({"steps": []}, "steps must have one value or more"),
        ({"steps": 5}, "steps must have a list of values, got 5"),
        ({"steps": [1, 2.5]}, r"at steps=2.5: steps must be int, got 2.5"),
        ({"steps": [1, 1.0]}, "steps must have distinct values, got 1 twice"),
        ({"data_noise": [0.1, -0.1]}, "at data_noise=-0.1: train: data_noise must be >= 0"),
    ],
)
def test_wrong_plans_are_refused_by_name(axes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep(resolve(overrides=CENTRE), axes)


@pytest.mark.parametrize(
    ("together", "message"),
    [
        ([1], r"together must hold lists by field by axis, got \[1\]"),
        ({"width": {"lr": [1]}}, "together has width, which is not swept"),
        ({"steps": [1]}, r"together.steps must hold lists by field, got \[1\]"),
        ({"steps": {"lrr": [1, 2]}}, "no setting is called lrr; did you mean lr"),
        ({"steps": {"seed": [1, 2]}}, "seed cannot be an axis"),
        ({"steps": {"steps": [1, 2]}}, "steps is swept, and cannot change with steps"),
        ({"steps": {"lr": [1]}}, "lr must have a value for each of the 2 values of steps, got 1"),
        ({"steps": {"lr": [1, -1]}}, "at lr=-1: train: lr must be"),
        (
            {"steps": {"lr": [1, 2]}, "leak": {"lr": [1, 2]}},
            "lr cannot change with both steps and leak",
        ),
    ],
)
def test_wrong_fields_that_change_together_are_refused_by_name(together: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep(resolve(overrides=CENTRE), {"steps": [1, 2], "leak": [0, 1]}, together=together)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"steps": [1, 0]}, "at steps=0: .*steps must be at least 1"),
        ({"width": [2, -1]}, "at width=-1: .*width"),
        ({"activation": ["silu", "step"]}, "at activation=step: .*activation"),
        ({"noise_std": [0.1, -1]}, "at noise_std=-1.0: .*noise_std"),
        ({"size": [8, 12]}, "at size=12: .*power of two"),
    ],
)
def test_every_point_is_checked_before_any_work(axes: Any, message: str, tmp_path: Path) -> None:
    plan = Sweep(resolve(overrides=CENTRE), axes)
    with pytest.raises(ValueError, match=message):
        run_sweep(plan, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zzz": 5}, "plan.yaml: no setting is called zzz; the settings are data, "),
        ({"sedes": 5}, r"plan.yaml: no setting is called sedes; did you mean seeds\?$"),
        ({"axes": [1, 2]}, "plan.yaml: axes must hold lists"),
        ({"together": [1, 2]}, "plan.yaml: together must hold lists"),
        ({"axes": {"steps": [1, 2]}, "seeds": 0}, "seeds must be at least 1"),
        ({"axes": {"steps": [1, 2]}, "grid": "yes please"}, "grid must be true or false"),
    ],
)
def test_wrong_plan_files_are_refused_by_name(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_sweep(tmp_path / "plan.yaml")


def test_the_sweep_command_runs_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_sweep, "plot", lambda content, path: path.touch())
    out = tmp_path / "sweep"
    command = ["sweep", *options(steps="1,2", clamp="none,[-1, 1]"), "--seeds=1", f"--out={out}"]
    done = run_command(*command)
    assert done.exit_code == 0, done.output
    assert str(out / "sweep.json") in done.output
    plan = yaml.safe_load((out / "sweep.yaml").read_text())
    assert plan["axes"] == {"steps": [1, 2], "clamp": [None, [-1.0, 1.0]]}
    points = json.loads((out / "sweep.json").read_text())["points"]
    centre = resolve().steps
    assert [p["settings"]["steps"] for p in points] == [1, 2, centre, centre]


def test_the_sweep_command_stops_on_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", *options(steps="1,2"), "--seeds=1", f"--out={out}"]
    stop = interrupted(1, 1, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(sweep.run, "train", stop)
    stopped = run_command(*command)
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert "the same command continues the sweep" in stopped.output
    assert not (out / "sweep.json").exists()


@pytest.mark.parametrize(
    ("device", "local", "want"),
    [
        ("auto", "5", "cuda:1"),
        ("auto", None, "auto"),
        ("cuda:3", "1", "cuda:3"),
        ("cpu", "1", "cpu"),
    ],
)
def test_a_process_of_torchruns_takes_its_own_gpu(
    device: str, local: str | None, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are four, the sixth shares the second's; a device by name is the user's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert own_device(device) == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps=1,["], "steps must be values separated by commas, got '1,['"),
        (["--steps="], "steps must have one value or more, got none"),
        (["--steps=5"], "no field is swept"),
        (["--steps=5,ten"], "at steps=ten: steps must be int, got 'ten'"),
    ],
)
def test_the_sweep_command_refuses_wrong_options(
    given: list[str], message: str, tmp_path: Path
) -> None:
    done = run_command("sweep", *given, f"--out={tmp_path / 'sweep'}")
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "sweep").exists()
