"""Samples in a folder of files: the same for any number of processes, resumed, and read again."""

import contextlib
import importlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastlangevin as fl
import fastlangevin.learn.job as job
from fastlangevin.distributed import DistributedError, Group
from fastlangevin.learn import load_images
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.job import VERSIONS
from fastlangevin.learn.sample_shards import sample_shards
from tests.distributed.threads import run_ranks

sample_shards_module = importlib.import_module("fastlangevin.learn.sample_shards")


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


@pytest.mark.parametrize("name", ["device", "torch", "fastlangevin"])
def test_samples_of_another_device_or_version_are_not_continued(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second, _ = draw(tmp_path)
    second.unlink()
    if name == "device":
        monkeypatch.setattr(sample_shards_module, "_device", lambda _: "another")
    else:
        monkeypatch.setitem(VERSIONS, name, "another")
    with pytest.raises(FileExistsError, match=rf"holds other samples: {name} \(.* another now\)"):
        draw(tmp_path)
    assert not second.exists()


def test_processes_with_other_code_do_not_share_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter("ab")
    monkeypatch.setattr(job, "_digest", lambda: next(digests))
    samplers = [sampler(), sampler()]

    def work(group: Group) -> list[Path]:
        return sample_shards(samplers[group.rank], 8, tmp_path / "new", group=group)

    for error in run_ranks(2, work):
        assert "start: the processes differ in the code: " in str(error)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_samples_that_a_rank_does_not_see_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_SEEN_WITHIN", 0.2)
    samplers = [sampler(), sampler()]

    def work(group: Group) -> list[Path]:
        folder = tmp_path / f"disk-{group.rank}" / "samples"
        return sample_shards(samplers[group.rank], 8, folder, group=group)

    for error in run_ranks(2, work):
        assert str(error).startswith("sample: ")
        assert "samples of rank 0 is not the folder that ranks 1 see" in str(error)


class Slow(fl.LangevinSampler):
    """A sampler that does something else before every call."""

    before: Callable[[], Any] = staticmethod(lambda: None)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.before()
        return super().__call__(*arguments, **options)


def slow(before: Callable[[], Any]) -> Slow:
    made = Slow(sampler().energy, steps=2, noise_std=0.1)
    made.before = before
    return made


def test_files_left_by_a_killed_job_are_shared_out_evenly(tmp_path: Path) -> None:
    """Here those that one of two processes would have made if their numbers decided."""
    together = threading.Barrier(2)  # broken unless both processes draw at the same time
    samplers = [slow(lambda: together.wait(30)) for _ in range(2)]
    for path in draw(tmp_path, n=32)[::2]:
        path.unlink()

    def work(group: Group) -> list[Path]:
        return sample_shards(samplers[group.rank], 32, tmp_path, seed=3, per_file=4, group=group)

    paths, _ = run_ranks(2, work)
    assert np.array_equal(np.concatenate([np.load(p) for p in paths]), whole(32))


def test_idle_ranks_wait_for_a_file_that_takes_longer_than_the_time_limit(tmp_path: Path) -> None:
    samplers = [slow(lambda: time.sleep(2)) for _ in range(3)]

    def work(group: Group) -> list[Path]:
        return sample_shards(samplers[group.rank], 4, tmp_path, seed=3, per_file=4, group=group)

    assert run_ranks(3, work, timeout=0.8) == [[tmp_path / "00000000.npy"]] * 3


def test_a_rank_that_makes_no_files_any_more_is_named(tmp_path: Path) -> None:
    samplers = [sampler(), sampler()]

    def work(group: Group) -> list[Path]:
        if group.rank == 1:  # it hangs without a sign, as if it were stopped
            group.working = contextlib.nullcontext  # type: ignore[method-assign]
            group.deal = lambda *_: time.sleep(2) or iter(())  # type: ignore[method-assign]
        return sample_shards(samplers[group.rank], 8, tmp_path, per_file=4, group=group)

    match = "samples: no answer from rank 1 within 0.5 s; the same command continues"
    assert str(run_ranks(2, work, timeout=0.5)[0]) == match


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
