"""Samples in a folder of files: the same for any number of processes, resumed, and read again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastlangevin as fl
from fastlangevin.distributed import DistributedError, Group
from fastlangevin.learn import load_images
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.sample_shards import sample_shards
from tests.distributed.threads import run_ranks


def sampler(steps: int = 2, weight: float = 0.0) -> fl.LangevinSampler:
    torch.manual_seed(0)
    energy = fl.ConvEnergy(1, 8, 2)
    with torch.no_grad():
        next(energy.parameters()).add_(weight)
    return fl.LangevinSampler(energy, steps=steps, noise_std=0.1)


def whole(n: int) -> np.ndarray:
    return sampler()(n=n, seed=3).numpy()


def draw(out: Path, n: int = 11, **options: Any) -> list[Path]:
    return sample_shards(sampler(), n, out, **{"seed": 3, "per_file": 4} | options)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_files_hold_the_samples_of_one_call(world_size: int, tmp_path: Path) -> None:
    samplers = [sampler() for _ in range(world_size)]
    reports: list[tuple[int, int]] = []

    def work(group: Group) -> list[Path]:
        report = lambda *there: reports.append(there)  # noqa: E731
        return sample_shards(
            samplers[group.rank], 11, tmp_path, seed=3, per_file=4, group=group, report=report
        )

    results = run_ranks(world_size, work)
    names = ["00000000.npy", "00000004.npy", "00000008.npy"]
    assert results == [[tmp_path / name for name in names]] * world_size
    assert np.array_equal(np.concatenate([np.load(p) for p in results[0]]), whole(11))
    assert reports[-1] == (11, 11)
    data = load_images(tmp_path, bounded=False)
    assert np.array_equal(data.batch(range(11)).numpy(), whole(11))
    assert np.array_equal(load_images(tmp_path, bounded=False, limit=6).pixels, whole(11)[:6])


def test_a_stopped_call_continues_and_keeps_what_is_there(tmp_path: Path) -> None:
    first, second, third = draw(tmp_path)
    second.unlink()
    kept = first.stat().st_mtime_ns
    with pytest.raises(FileError, match=r"00000004\.npy is missing, as are 1 of 3 files"):
        load_images(tmp_path, bounded=False)
    assert draw(tmp_path) == [first, second, third]
    assert first.stat().st_mtime_ns == kept
    assert np.array_equal(np.load(second), whole(11)[4:8])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n": 12}, r"n \(11 there, 12 now\)"),
        ({"seed": 4}, r"seed \(3 there, 4 now\)"),
        ({"per_file": 5}, r"per_file \(4 there, 5 now\)"),
    ],
)
def test_a_folder_of_other_samples_is_refused(
    change: dict[str, int], match: str, tmp_path: Path
) -> None:
    draw(tmp_path)
    with pytest.raises(FileExistsError, match=f"holds other samples: {match}"):
        draw(tmp_path, **change)
    with pytest.raises(FileExistsError, match="holds other samples: weights"):
        sample_shards(sampler(weight=0.5), 11, tmp_path, seed=3, per_file=4)
    with pytest.raises(FileExistsError, match="holds other samples: sampler"):
        sample_shards(sampler(steps=3), 11, tmp_path, seed=3, per_file=4)


def test_a_folder_of_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt but no samples\.json"):
        draw(tmp_path)
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file, not a folder"):
        draw(tmp_path / "thesis.txt")


def test_processes_with_other_weights_are_named(tmp_path: Path) -> None:
    samplers = [sampler(), sampler(weight=0.5)]

    def work(group: Group) -> list[Path]:
        return sample_shards(samplers[group.rank], 8, tmp_path / "new", group=group)

    for error in run_ranks(2, work):
        assert isinstance(error, DistributedError)
        assert "the processes differ in weights" in str(error)
    assert not (tmp_path / "new").exists()


def test_files_that_never_come_are_an_error(tmp_path: Path) -> None:
    draw(tmp_path, n=8)
    (tmp_path / "00000004.npy").unlink()
    # The other process has made its files known, and none of them.
    absent = Group(0, 2, store=torch.distributed.HashStore(), timeout=0.3)
    absent.share = lambda value, what: [value, value]  # type: ignore[method-assign]
    absent.first = lambda call, what: call()  # type: ignore[method-assign]
    match = "4 of 8 samples of other processes are missing, and none came within 0.3 s"
    with pytest.raises(DistributedError, match=match):
        draw(tmp_path, n=8, group=absent)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "does not describe samples of this version"),
        ({"n": "many"}, "does not describe samples of this version"),
        ({"n": 10**12}, "does not describe samples of this version"),
        ({"per_file": 0}, "does not describe samples of this version"),
        ({"n": 10}, r"00000008\.npy must hold 2 samples, got shape \[3, 1, 8, 8\]"),
    ],
)
def test_a_damaged_description(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    draw(tmp_path)
    file = tmp_path / "samples.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FileError, match=match):
        load_images(tmp_path, bounded=False)
