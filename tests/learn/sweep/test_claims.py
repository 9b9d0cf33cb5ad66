"""Processes that share a sweep through its folder, and take over what lost ones left."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastlangevin.learn import sweep, train
from fastlangevin.learn.run_folder import only_writer
from fastlangevin.learn.sweep import claims
from fastlangevin.learn.sweep.claims import claimed
from fastlangevin.learn.sweep.plan import Sweep
from fastlangevin.learn.sweep.run import CLAIMS, run_sweep


def never() -> None:
    raise AssertionError("the claim was lost")


def age(path: Path) -> None:
    """Make a claim one of a process that was lost long ago."""
    old = time.time() - 2 * claims.EXPIRES
    os.utime(path, (old, old))


def test_one_of_many_claims_and_the_next_one_after_it(tmp_path: Path) -> None:
    path, taken = tmp_path / "claims" / "run", []
    everyone = threading.Barrier(8)

    def take(_: int) -> None:
        with claimed(path, never) as free:
            everyone.wait()
            taken.append(free)
            everyone.wait()

    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(take, range(8)))
        assert sorted(taken) == [False] * 7 + [True]
        assert list(path.parent.iterdir()) == []
        taken.clear()


def test_one_of_many_takes_over_an_expired_claim(tmp_path: Path) -> None:
    path, everyone = tmp_path / "run", threading.Barrier(8)
    for _ in range(5):
        for number in (0, 1):
            lost = path.with_name(f"run.{number}")
            lost.write_text("a lost process")
            age(lost)
        taken = []

        def take(_: int, taken: list[bool] = taken) -> None:
            everyone.wait()
            with claimed(path, never) as free:
                everyone.wait()
                taken.append(free)
                everyone.wait()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(take, range(8)))
        assert sum(taken) == 1
        assert list(tmp_path.iterdir()) == []


def test_a_claim_does_not_expire_while_its_owner_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EXPIRES", 0.3)
    path = tmp_path / "run"
    with claimed(path, never):
        time.sleep(0.6)
        with claimed(path, never) as free:
            assert not free


def test_an_owner_whose_claim_was_taken_over_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EXPIRES", 0.1)
    path, told = tmp_path / "run", threading.Event()
    with claimed(path, told.set):
        (tmp_path / "run.1").write_text("another process")
        assert told.wait(10)
    assert (tmp_path / "run.1").read_text() == "another process"


@pytest.mark.parametrize("failing", ["read_bytes", "glob"])
def test_a_claim_is_kept_when_the_file_system_fails_for_a_while(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EXPIRES", 0.5)
    works, failures, twice = getattr(Path, failing), itertools.count(1), threading.Event()

    def fails(self: Path, *arguments: Any) -> Any:
        if threading.current_thread() is threading.main_thread() or twice.is_set():
            return works(self, *arguments)
        if next(failures) == 2:
            twice.set()
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "run"
    with claimed(path, never):
        monkeypatch.setattr(Path, failing, fails)
        assert twice.wait(10)
        time.sleep(1)
        with claimed(path, never) as free:
            assert not free  # its owner still touches it
        monkeypatch.setattr(Path, failing, works)
    assert list(tmp_path.iterdir()) == []


def test_work_that_is_done_counts_although_its_claim_cannot_be_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with claimed(tmp_path / "run", never) as free:
        assert free
        monkeypatch.setattr(Path, "unlink", fails)
    assert (tmp_path / "run.0").exists()


def test_a_claim_in_a_folder_that_has_gone_is_left_alone(tmp_path: Path) -> None:
    """The process that finished the sweep has removed it."""
    assert not claims._is_expired(tmp_path / "gone" / "run.0")


def patched(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    def made(config: Any, out: Path, **options: Any) -> Path:
        before(out.name)
        return train(config, out, **options)

    monkeypatch.setattr(sweep.run, "train", made)
    monkeypatch.setattr(sweep.run, "_POLL", 0.05)


def test_processes_share_the_runs_and_all_return_all_results(
    plan: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    started, both = threading.Event(), threading.Barrier(2)

    def before(name: str) -> None:
        made.append(name)
        started.set()
        if len(made) <= 2:  # each works on a run of its own
            both.wait(300)

    def second(_: int) -> Any:
        assert started.wait(300)
        return run_sweep(plan, tmp_path / "sweep")

    patched(monkeypatch, before)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second, 0)
        results = run_sweep(plan, tmp_path / "sweep")
    assert sorted(made) == sorted(run.name for run in plan.runs())
    assert results is not None
    assert other.result() == results
    assert not (tmp_path / "sweep" / CLAIMS).exists()


def test_a_lost_process_s_run_is_taken_over_and_a_live_one_s_is_left(
    plan: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "sweep", [run.name for run in plan.runs()]
    made: list[str] = []
    claim = out / CLAIMS / f"{names[0]}.0"

    def before(name: str) -> None:
        made.append(name)
        if len(made) == len(names) - 1:
            age(claim)  # the owner of the first run is lost only now

    patched(monkeypatch, before)
    claim.parent.mkdir(parents=True)
    claim.write_text("another process")
    assert run_sweep(plan, out) is not None
    assert made == [*names[1:], names[0]]


def test_a_folder_that_is_locked_is_left_until_it_is_free(
    plan: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose claim has expired may still be training."""
    out, names = tmp_path / "sweep", [run.name for run in plan.runs()]
    made: list[str] = []
    held = only_writer(out / names[1])

    def before(name: str) -> None:
        made.append(name)
        if len(made) == 1:
            held.__enter__()
        elif name == names[2]:  # names[1] was tried before it
            held.__exit__(None, None, None)

    patched(monkeypatch, before)
    assert run_sweep(plan, out) is not None
    assert made == [*names, names[1]]
