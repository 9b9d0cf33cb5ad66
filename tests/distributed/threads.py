"""Several ranks as threads of this process, which communicate through Gloo."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from fastlangevin.distributed import Group

T = TypeVar("T")


class ThreadGroup(Group):
    """A Group whose collectives are those of its own Gloo process group."""

    def __init__(self, rank: int, world_size: int, store: Any, timeout: float) -> None:
        super().__init__(rank, world_size, store=store, timeout=timeout)
        gloo = dist.PrefixStore("gloo", store)
        limit = timedelta(seconds=timeout)
        self.gloo = dist.ProcessGroupGloo(gloo, rank, world_size, limit)

    def _all_to_all(self, received: Tensor, sent: Tensor, expected: Any, counts: Any) -> None:
        self.gloo.alltoall_base(received, sent, expected, counts).wait()

    def _all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        self.gloo.allgather([parts], [tensor]).wait()

    def _broadcast(self, tensor: Tensor) -> None:
        self.gloo.broadcast([tensor], dist.BroadcastOptions()).wait()  # from rank 0


def run_ranks(world_size: int, work: Callable[[Group], T], timeout: float = 60.0) -> list[T | Any]:
    """The results of ``work(group)`` of every rank; an exception is returned in place of one.

    An exception is reported to the other ranks, as ``join`` does.
    """
    if world_size == 1:
        return [_outcome(Group(), work)]
    store = dist.HashStore()

    def run(rank: int) -> T | Any:
        group = ThreadGroup(rank, world_size, store, timeout)
        groups.append(group)  # a rank that is done still answers the others
        return _outcome(group, work)

    groups: list[Group] = []
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def _outcome(group: Group, work: Callable[[Group], T]) -> T | Any:
    try:
        return work(group)
    except BaseException as error:
        with contextlib.suppress(RuntimeError):
            group.report_failure(error)
        return error
