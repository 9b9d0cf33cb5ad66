"""Ranks as threads: sums that no number of processes changes, and failures that are named."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastlangevin.distributed import DistributedError, Group, Launch, OrderedSum, join, split_rows
from fastlangevin.distributed.rendezvous import meet
from fastlangevin.distributed.store import TimedStore
from tests.distributed.threads import run_ranks


def vectors(leaves: int, length: int) -> Tensor:
    torch.manual_seed(leaves)
    return torch.randn(leaves, length) * 10 ** torch.randint(-4, 4, (leaves, 1))


@pytest.mark.parametrize(("leaves", "length"), [(4, 1), (6, 7), (7, 12), (16, 5)])
def test_a_sum_is_the_same_bits_for_every_number_of_processes(leaves: int, length: int) -> None:
    values = vectors(leaves, length)

    def work(group: Group) -> tuple[Tensor, Tensor]:
        extra = torch.tensor([float(group.rank), 7.0])
        total, extras = OrderedSum(leaves, group)(lambda i: values[i], lambda: extra, "a sum")
        return total, torch.stack(extras)

    ((alone, _),) = run_ranks(1, work)
    torch.testing.assert_close(alone.double(), values.double().sum(0), rtol=1e-4, atol=1e-4)
    for world_size in (2, 3, 4):
        for total, extras in run_ranks(world_size, work):
            assert torch.equal(total, alone)
            assert extras.tolist() == [[rank, 7.0] for rank in range(world_size)]


def test_a_plain_sum_depends_on_the_number_of_processes() -> None:
    """What the order of the additions prevents, on the same numbers."""
    values = vectors(16, 5)
    halves = values[:8].cumsum(0)[-1] + values[8:].cumsum(0)[-1]
    assert not torch.equal(halves, values.cumsum(0)[-1])


@pytest.mark.parametrize("n", [1, 5, 9])
def test_rows_are_those_of_one_process(n: int) -> None:
    """Also with more processes than blocks, and where one result is None."""
    images = torch.arange(n * 2.0).view(n, 2)

    def compute(rows: slice) -> tuple[Tensor, None, Tensor]:
        return images[rows].double(), None, images[rows].sum(1).long()

    def work(group: Group) -> Any:
        return split_rows(group, n, 2, compute, "rows")

    for world_size in (1, 2, 4):
        for squares, nothing, sums in run_ranks(world_size, work):
            assert torch.equal(squares, images.double())
            assert nothing is None
            assert torch.equal(sums, images.sum(1).long())


def test_ranks_without_rows_wait_for_rows_that_take_longer_than_the_time_limit() -> None:
    def compute(rows: slice) -> tuple[Tensor]:
        time.sleep(1.5)
        return (torch.arange(rows.start, rows.stop),)

    def work(group: Group) -> Any:
        return split_rows(group, 3, 4, compute, "rows")

    for (rows,) in run_ranks(3, work, timeout=0.5):
        assert rows.tolist() == [0, 1, 2]


def test_a_rank_that_fails_is_named_at_once_with_its_reason() -> None:
    def work(group: Group) -> None:
        if group.rank == 1:
            raise OSError("the disk is full")
        group.barrier("the end")

    started = time.monotonic()
    first, failed, last = run_ranks(3, work)
    assert isinstance(failed, OSError)
    for error in (first, last):
        assert isinstance(error, DistributedError)
        assert str(error) == "the end: rank 1 failed: OSError: the disk is full"
    assert time.monotonic() - started < 30  # half of the time limit


@pytest.mark.parametrize("collective", [False, True])
def test_a_rank_that_does_not_answer_is_named(
    collective: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlangevin.distributed.time_limits.GRACE", 0.5)

    def work(group: Group) -> None:
        if group.rank == 1:
            time.sleep(1.5)
        elif collective:
            group.all_gather(torch.zeros(3), "the gradients")
        else:
            group.share(group.rank, "the gradients")

    first, _, last = run_ranks(3, work, timeout=0.5)
    for error in (first, last):
        assert isinstance(error, DistributedError)
        assert str(error).startswith("the gradients: ")
        assert str(error).endswith("no answer from rank 1 within 0.5 s")


def test_what_differs_is_named_with_its_ranks() -> None:
    def work(group: Group) -> None:
        lr = 0.2 if group.rank == 1 else 0.1
        group.compare({"seed": 3, "lr": lr} | ({"code": "x"} if group.rank < 2 else {}), "start")

    for error in run_ranks(3, work):
        assert isinstance(error, DistributedError)
        assert str(error) == "start: the processes differ in lr: 0.1 on ranks 0, 2, 0.2 on rank 1"


def test_a_process_alone_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as group:
        assert (group.rank, group.world_size) == (0, 1)
        assert group.share("a", "b") == ["a"]
        assert torch.equal(group.all_gather(torch.ones(2), "b"), torch.ones(1, 2))
    with pytest.raises(ValueError, match="timeout must be greater than 0, got 0"), join(timeout=0):
        pass


def test_processes_that_do_not_come_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    match = "start: rank 1 did not meet the other processes of WORLD_SIZE=2 within 0.5 s"
    with pytest.raises(DistributedError, match=match), join("cpu", timeout=0.5):
        pass
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(DistributedError, match="MASTER_ADDR expected, but not set"), join("cpu"):
        pass


def test_processes_that_meet_again_in_one_store_leave_the_dead_alone() -> None:
    """As after a restart by torchrun, which keeps its store: here, a second time and a third."""
    store = dist.HashStore()
    names = []
    for late in (0, 1, 2):

        def come(rank: int, late: int = late) -> str:
            time.sleep(0.2 * (rank == late))
            return meet(TimedStore(store, 20, False), Launch(rank, 3, rank), timeout=20)

        with ThreadPoolExecutor(3) as pool:
            (name,) = set(pool.map(come, range(3)))
        names.append(name)
    assert len(set(names)) == 3
    for rank, missing in ((0, "ranks 1, 2"), (1, "rank 0")):
        match = f"start: no answer to rank {rank} from {missing} within 0.2 s"
        with pytest.raises(DistributedError, match=match):
            meet(TimedStore(store, 20, False), Launch(rank, 3, rank), timeout=0.2)


def test_tensors_of_any_shape_and_dtype_become_those_of_rank_0_in_one_message_per_dtype() -> None:
    def tensors(rank: int) -> list[torch.Tensor]:
        values = torch.arange(6.0) + 10 * rank
        return [values.view(2, 3).T, torch.tensor(rank), values[:0], values.double(), values[1]]

    def work(group: Group) -> list[torch.Tensor]:
        messages = []
        broadcast, group._broadcast = group._broadcast, lambda t: messages.append(t) or broadcast(t)
        own = tensors(group.rank)
        group.broadcast_(own, "the buffers")
        group.broadcast_([], "nothing")
        assert len(messages) == 3
        assert group.bytes == (2 * (7 * 4 + 8 + 6 * 8) if group.rank == 0 else 0)
        return own

    for result in run_ranks(3, work):
        for value, want in zip(result, tensors(0), strict=True):
            assert torch.equal(value, want)
