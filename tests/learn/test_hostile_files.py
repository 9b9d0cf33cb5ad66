"""Damaged files and values of a wrong type: one error that names the file."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlangevin.energies import ConvEnergy
from fastlangevin.learn import html_report, reading
from fastlangevin.learn.checkpoint import save_checkpoint
from fastlangevin.learn.config import resolve
from fastlangevin.learn.data.load import load_images
from fastlangevin.learn.evaluation import features
from fastlangevin.learn.sweep.plan import read_sweep
from tests.learn.hostile import (
    EVALUATION,
    KINDS,
    PIXELS,
    POSTSCRIPT,
    encoded,
    every_kind,
    no_waiting,  # noqa: F401  (used by every test)
    outcome,
    page,
    write_run,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="named pipes, /proc")


@every_kind
def test_valid_files_are_read(name: str, tmp_path: Path) -> None:
    """Without this the other tests would show nothing."""
    write, read = KINDS[name]
    write(tmp_path / name)
    assert outcome(read, tmp_path / name) is None


# Damage -------------------------------------------------------------------------------------------


@every_kind
def test_damaged_files_end_in_one_error(name: str, tmp_path: Path) -> None:
    """Cut, with other bytes, of another kind; what can still be read may be."""
    write, read = KINDS[name]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    size = len(whole)
    cuts = [whole[:n] for n in {0, 1, 7, size // 3, size // 2, size - 9, size - 1}]
    places = {*range(0, min(size, 32), 3), *range(size // 20, size, max(1, size // 12))}
    flips = [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in places]
    others = [POSTSCRIPT, b"\xff\xfe" * 50, b"\x00" * 300, b"[" * 60_000, b"a: " * 9000, b"\n" * 9]
    others += [encoded("PNG"), b"PK\x03\x04" + bytes(99), b"PAR1" + bytes(40) + b"PAR1"]
    found = []
    for content in [*cuts, *flips, *others]:
        path.write_bytes(content)
        found.append(outcome(read, path))
    if name != "metrics.jsonl":  # of which whole lines count
        assert any(found[: len(cuts)])
        assert found[len(cuts + flips)] is not None, "PostScript"


@every_kind
def test_what_is_no_regular_file_is_refused(name: str, tmp_path: Path) -> None:
    """Neither waited for nor read: a folder, a pipe, a device, a file that the kernel denies."""
    write, read = KINDS[name]
    path = tmp_path / name
    write(path)
    for place in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/proc/self/mem"),
        lambda: path.symlink_to(path),
        lambda: path.mkdir(),
    ):
        path.unlink()
        place()
        assert outcome(read, path) is not None


@every_kind
@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_named(name: str, tmp_path: Path) -> None:
    write, read = KINDS[name]
    write(tmp_path / name)
    (tmp_path / name).chmod(0)
    assert outcome(read, tmp_path / name) is not None


# Values of a wrong type ---------------------------------------------------------------------------

LARGE = 10**400
WRONG = (None, {}, "x", -1, float("nan"), [[1]], LARGE)


def mutations(value: Any, wrong: tuple[Any, ...] = WRONG) -> Iterator[Any]:
    """A JSON value with every part replaced, once by each wrong one, and once left out."""
    yield from wrong
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts if isinstance(value, dict | list) else ():
        for other in mutations(part) if isinstance(part, dict | list) else wrong:
            changed = value.copy()
            changed[key] = other
            yield changed
        changed = value.copy()
        del changed[key]
        yield changed


def test_settings_of_a_wrong_type_name_their_file(tmp_path: Path) -> None:
    path, count = tmp_path / "config.json", 0
    for name, value in json.loads(json.dumps(vars(resolve("digits")))).items():
        for changed in mutations({name: value}, wrong=(None, [], {}, "x", LARGE)):
            path.write_text(json.dumps(changed))
            count += outcome(lambda path: resolve(path), path) is not None
    assert count > 100


def test_sweeps_of_wrong_types_name_their_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = {"axes": {"steps": [1, 2]}, "seeds": 2, "grid": True, "config": "digits", "width": 4}
    found = []
    for changed in mutations(plan):
        path.write_text(json.dumps(changed))
        found.append(outcome(lambda path: read_sweep(path), path))
    assert sum(error is not None for error in found) > len(found) / 2
    plan["axes"] = {name: list(range(1, 200)) for name in ("steps", "width", "samples", "limit")}
    path.write_text(json.dumps(plan))
    assert "at most 10000 runs" in str(outcome(lambda path: read_sweep(path), path))


@pytest.mark.parametrize("name", ["evaluate.json", "metrics.jsonl"])
def test_results_of_wrong_types_name_their_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_run(path)
    value = EVALUATION if name == "evaluate.json" else {"iteration": 5, "gap": 0.1, "lr": 0.2}
    before = path.read_text() if name == "metrics.jsonl" else ""
    for changed in mutations(value, wrong=(None, {}, "x", [[1]], LARGE)):
        path.write_text(before + json.dumps(changed) + "\n")
        outcome(page, path)
    path.write_text(before + '{"iteration": 5, "gap": ' + "[" * 90_000 + "\n")
    assert outcome(page, path) is not None


def test_headers_of_models_of_wrong_types_name_their_file(tmp_path: Path) -> None:
    """Those that commands and reports read: the run's settings, the sampler's, the energy's."""
    from fastlangevin.learn.run_data import run_config

    path, energy = tmp_path / "m.safetensors", ConvEnergy(1, 8, 1)
    tensors = {f"model.{name}": value for name, value in energy.state_dict().items()}
    info = {
        "config": {"steps": 5, "clamp": [-1, 1], "data": "digits"},
        "energy": energy.settings(),
        "sampler": {"steps": 5, "step_size": 0.1},
        "iteration": 3,
    }
    errors = []
    for changed in mutations(info):
        if not isinstance(changed, dict) or "version" in changed:
            continue
        save_checkpoint(path, tensors, changed)
        errors.append(outcome(html_report.to_html, path))
        if changed.get("config") is not None and isinstance(changed.get("iteration"), int):
            errors.append(outcome(run_config, path))
    assert sum(error is not None for error in errors) > len(errors) / 4


def test_weights_of_features_that_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    monkeypatch.setattr(features, "_weights", lambda *_: path)
    np.save(tmp_path / "a.npy", PIXELS)
    data = load_images(tmp_path / "a.npy")
    torch.save({"_fc.weight": torch.zeros(3)}, path)
    whole = path.read_bytes()
    for content in (whole, whole[:300], b"", b"[1", POSTSCRIPT):
        path.write_bytes(content)
        read = lambda _: features.make_features("efficientnet-lite0", data)  # noqa: E731
        assert outcome(read, path) is not None


# What errors show ---------------------------------------------------------------------------------


def test_values_in_errors_are_short() -> None:
    nested: list[Any] = []
    for _ in range(10_000):
        nested = [nested]
    own: list[Any] = []
    own.append(own)
    many = {str(i): [i] * 50 for i in range(10_000)}
    for value in (nested, own, many, "x" * 10**6, LARGE, 10**9000, b"y" * 10**6, {1: {2: {3: {}}}}):
        assert len(reading.brief(value)) < 250
    for value in (None, 5, -0.1, "text", [1, 2], {"lo": -1.0, "hi": 1.0}, (1, "a")):
        assert reading.brief(value) == repr(value)
