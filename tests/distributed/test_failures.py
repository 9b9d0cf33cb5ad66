"""Processes that are lost, stopped, slow or wrong, here threads; every wait ends and says why."""

import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastlangevin.distributed import DistributedError, Group, Launch, join, own_device, rendezvous
from fastlangevin.distributed.rendezvous import check_devices, meet
from fastlangevin.distributed.store import TimedStore
from fastlangevin.distributed.time_limits import TimedWaits
from tests.distributed.threads import ThreadGroup, run_ranks


class Endless:
    """A collective that does not end and has no limit of its own, as NCCL's."""

    def is_completed(self) -> bool:
        return False


class Stopped:
    """A store whose process has been stopped: its calls do not return."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: self.goes_on.wait() and b""


class Mortal:
    """A store that cannot be reached any more once ``dead`` is set."""

    def __init__(self) -> None:
        self.store, self.dead = dist.HashStore(), threading.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self.dead.is_set():
                raise RuntimeError("Connection reset by peer")
            return getattr(self.store, name)(*arguments)

        return call


@pytest.fixture
def stopped() -> Iterator[Stopped]:
    store = Stopped()
    yield store
    store.goes_on.set()


CALLS: dict[str, Callable[[Group], Any]] = {
    "barrier": lambda group: group.barrier("a call"),
    "share": lambda group: group.share(1, "a call"),
    "first": lambda group: group.first(int, "a call"),
    "compare": lambda group: group.compare({"a": 1}, "a call"),
    "check": lambda group: group.check("a call"),
    "deal": lambda group: list(group.deal(3, "a call")),
    "all_gather": lambda group: group.all_gather(torch.zeros(1), "a call"),
    "broadcast": lambda group: group.broadcast_([torch.zeros(1)], "a call"),
    "all_to_all": lambda group: group.all_to_all(torch.zeros(2), [1, 1], [1, 1], "a call"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_every_call_ends_when_the_process_with_the_store_has_been_stopped(
    call: Callable[[Group], Any], stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    for collective in ("_all_gather", "_broadcast", "_all_to_all"):
        monkeypatch.setattr(Group, collective, lambda *_: Endless())
    group = Group(1, 2, store=stopped, timeout=0.1, holder=True)
    match = "a call: no answer from rank 0, which holds the store of the job within 0.1 s"
    started = time.monotonic()
    with pytest.raises(DistributedError, match=match), group.membership():
        call(group)
    assert time.monotonic() - started < 20


def test_processes_do_not_meet_in_a_store_that_has_been_stopped(stopped: Stopped) -> None:
    store = TimedStore(stopped, 0.2, holder=False)
    with pytest.raises(DistributedError, match="start: no answer from the store of the job"):
        meet(store, Launch(1, 2, 1), timeout=20)


def test_the_limit_of_a_collective_is_the_group_s_and_not_the_backend_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastlangevin.distributed.time_limits.GRACE", 0.5)
    monkeypatch.setattr(ThreadGroup, "_all_gather", lambda *_: Endless())

    def work(group: Group) -> None:
        if group.rank == 1:
            time.sleep(1.2)
        else:
            group.all_gather(torch.zeros(3), "the gradients")

    first, _, last = run_ranks(3, work, timeout=0.4)
    for error in (first, last):
        assert isinstance(error, DistributedError)
        assert str(error).startswith("the gradients: ")
        assert str(error).endswith("no answer from rank 1 within 0.4 s")


def test_a_rank_in_a_collective_learns_at_once_why_another_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ThreadGroup, "_all_gather", lambda *_: Endless())

    def work(group: Group) -> None:
        if group.rank == 1:
            raise OSError("the disk is full")
        group.all_gather(torch.zeros(3), "the gradients")

    started = time.monotonic()
    first, _, last = run_ranks(3, work)
    assert time.monotonic() - started < 30  # half of the time limit
    for error in (first, last):
        assert isinstance(error, DistributedError)
        assert str(error) == "the gradients: rank 1 failed: OSError: the disk is full"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_busy_rank_still_learns_why_another_failed_before_the_store_ends(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store ends with rank 0, which must not leave before the others have read the reason."""
    monkeypatch.setattr("fastlangevin.distributed.time_limits.GRACE", 0.1)
    mortal, leave = Mortal(), TimedWaits.leave

    def leave_and_die(watch: TimedWaits, failed: bool = False) -> None:
        leave(watch, failed)
        if watch.rank == 0:
            mortal.dead.set()

    monkeypatch.setattr(TimedWaits, "leave", leave_and_die)

    def work(group: Group) -> None:
        if group.rank == failing:
            raise OSError("the disk is full")
        time.sleep(group.rank == 2)  # far longer than the grace
        group.barrier("the end")

    def run(rank: int) -> Any:
        group = Group(rank, 3, store=mortal, timeout=60, holder=True)
        try:
            with group.membership():
                work(group)
        except BaseException as error:
            return error

    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: run(rank)}))
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(results.pop(failing), OSError)
    for error in results.values():
        assert str(error) == f"the end: rank {failing} failed: OSError: the disk is full"


def test_after_a_failure_no_rank_leaves_before_all_know_the_reason() -> None:
    """A launcher ends all processes with the first one. Here no rank holds the store."""
    store, events = dist.HashStore(), []

    def work(group: Group) -> None:
        if group.rank == 0:
            raise OSError("the disk is full")
        time.sleep(0.5 * group.rank)
        group.barrier("the end")

    def run(rank: int) -> None:
        group = Group(rank, 3, store=store, timeout=60)
        with contextlib.suppress(OSError, DistributedError), group.membership():
            try:
                work(group)
            finally:
                events.append("knows the reason")
        events.append("has left")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert events == ["knows the reason"] * 3 + ["has left"] * 3


def test_ranks_wait_for_one_that_works_longer_than_the_time_limit() -> None:
    def work(group: Group) -> list[int]:
        if group.rank == 1:
            with group.working():
                time.sleep(2)
        return group.share(group.rank, "the samples")

    assert run_ranks(3, work, timeout=0.8) == [[0, 1, 2]] * 3


def test_ranks_do_not_wait_for_one_that_has_stopped_working() -> None:
    def work(group: Group) -> None:
        if group.rank == 1:
            with group.working():
                time.sleep(0.4)
            time.sleep(1)
        else:
            group.barrier("the samples")

    first, _, last = run_ranks(3, work, timeout=0.4)
    for error in (first, last):
        assert str(error).startswith("the samples: ")
        assert str(error).endswith("no answer from rank 1 within 0.4 s")


def test_a_slow_rank_learns_that_the_others_gave_up_on_it() -> None:
    """And does not wait for them in turn, and then blame one of them."""

    def work(group: Group) -> None:
        if group.rank == 1:
            time.sleep(1.2)
        try:
            group.barrier("the samples")
            group.barrier("the end")
        except DistributedError as error:
            raise DistributedError(f"{error}; the same command continues") from error

    for error in run_ranks(3, work, timeout=0.4):
        assert isinstance(error, DistributedError)
        assert str(error).endswith("no answer from rank 1 within 0.4 s; the same command continues")
        assert str(error).count("continues") == 1


def test_a_rank_that_comes_just_after_the_limit_is_named() -> None:
    def work(group: Group) -> None:
        if group.rank == 1:
            time.sleep(1.2)
        group.all_gather(torch.zeros(3), "the gradients")

    for error in run_ranks(3, work, timeout=0.6):
        assert isinstance(error, DistributedError)
        match = r"the gradients: (rank . gave up: )?(rank 1|a rank) came later than the limit of"
        assert re.match(match, str(error)), error


def test_ranks_wait_for_the_work_of_rank_0_alone() -> None:
    def work(group: Group) -> str:
        return group.first(lambda: time.sleep(1.5) or "done", "the grid")

    assert run_ranks(3, work, timeout=0.5) == ["done"] * 3


def test_a_failure_to_end_torch_distributed_does_not_replace_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def fail() -> None:
        calls.append("end")
        raise NameError("name 'ProcessGroupNCCL' is not defined")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", fail)
        rendezvous._abort()
        assert calls == ["end"]
        monkeypatch.delattr(dist.distributed_c10d, "_abort_process_group")
        rendezvous._abort()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_number_is_dealt_once_and_more_of_them_to_the_fast(world_size: int) -> None:
    slow = threading.Event()

    def work(group: Group) -> list[int]:
        numbers = []
        for number in group.deal(7, "numbers"):
            numbers.append(number)
            if group.rank == 1:
                slow.wait(20)
            elif number == 6:
                slow.set()
        assert list(group.deal(0, "nothing")) == []
        return numbers

    dealt = run_ranks(world_size, work)
    assert sorted(itertools.chain(*dealt)) == list(range(7))
    if world_size > 1:
        assert len(dealt[1]) <= 1


def test_ranks_on_different_kinds_of_devices_are_named() -> None:
    def work(group: Group) -> None:
        check_devices(group, torch.device("meta" if group.rank == 1 else "cpu"))

    for error in run_ranks(3, work):
        assert isinstance(error, DistributedError)
        match = 'start: the processes differ in the kind of device: "cpu" on ranks 0, 2, "meta" on'
        assert match in str(error)


@pytest.mark.parametrize("shared", [False, True])
def test_gpus_are_told_apart_where_each_process_sees_only_its_own(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are cuda:0, as with SLURM."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert own_device("auto") == own_device("cuda") == "cuda:0"
    gpus = iter(["GPU-a", "GPU-b", "GPU-a" if shared else "GPU-c"])
    monkeypatch.setattr(rendezvous, "_identity", lambda _: next(gpus))
    results = run_ranks(3, lambda group: check_devices(group, torch.device("cuda:0")))
    if not shared:
        assert results == [None] * 3
    for error in results if shared else ():
        assert isinstance(error, DistributedError)
        assert "are all on GPU GPU-a; start at most one process per GPU" in str(error)


def test_a_process_group_of_the_user_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(DistributedError, match="initialised already"), join("cpu"):
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
