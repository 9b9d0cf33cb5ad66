"""evaluate_run returns what its command writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastlangevin.learn.job as job
from fastlangevin.distributed import Group
from fastlangevin.learn import resolve
from fastlangevin.learn.build import load_data
from fastlangevin.learn.checkpoint import read_checkpoint, save_checkpoint
from fastlangevin.learn.evaluation.evaluate_run import evaluate_run
from tests.command import run_command
from tests.distributed.threads import run_ranks


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


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, str]]:
    """Two folders with files of the same names, whose contents differ."""
    tensors, info = read_checkpoint("digits")
    found = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        changed = {name: value + 1e-6 * rank for name, value in tensors.items()}
        rest = {name: value for name, value in info.items() if name not in ("format", "version")}
        save_checkpoint(folder / "model.safetensors", changed, rest)
        for name in ("samples", "images"):
            np.save(folder / f"{name}.npy", np.full((16, 1, 8, 8), 9 + rank, np.uint8))
        files = {"run": "model.safetensors", "samples": "samples.npy", "images": "images.npy"}
        found.append({name: str(folder / file) for name, file in files.items()})
    return found


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("run", "the checkpoint"),
        ("samples", "the samples"),
        ("images", "the held-out images"),
        ("code", "the code"),
        (None, None),
    ],
)
def test_processes_that_evaluate_other_contents_are_named(
    name: str | None, fact: str | None, sources: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = resolve(overrides=read_checkpoint("digits")[1]["config"])
    data = load_data(config)
    if name == "code":
        digests = iter("ab")
        monkeypatch.setattr(job, "_digest", lambda: next(digests))

    def work(group: Group) -> Any:
        own = sources[0] | ({name: sources[group.rank][name]} if name in sources[0] else {})
        return evaluate_run(
            own.pop("run"), config, data, n=8, features="pixels", reference=80, group=group, **own
        )

    for result in run_ranks(2, work):
        if fact is None:
            assert result.evaluation.figures["samples"].images == 8
        else:
            assert f"start: the processes differ in {fact}: " in str(result)
