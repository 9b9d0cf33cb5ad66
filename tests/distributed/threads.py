"""Several ranks as threads of this process, which communicate through Gloo."""

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
        super().__init__(rank, world_size, store=store, timeout=timeout, holder=True)
        gloo = dist.PrefixStore("gloo", store)
        limit = timedelta(seconds=timeout)
        self.gloo = dist.ProcessGroupGloo(gloo, rank, world_size, limit)

    def _all_to_all(self, received: Tensor, sent: Tensor, expected: Any, counts: Any) -> Any:
        return self.gloo.alltoall_base(received, sent, expected, counts)

    def _all_gather(self, parts: list[Tensor], tensor: Tensor) -> Any:
        return self.gloo.allgather([parts], [tensor])

    def _broadcast(self, tensor: Tensor) -> Any:
        return self.gloo.broadcast([tensor], dist.BroadcastOptions())  # from rank 0


def run_ranks(
    world_size: int, work: Callable[[Group], T], timeout: float = 60.0, store: Any = None
) -> list[T | Any]:
    """The results of ``work(group)`` of every rank; an exception is returned in place of one.

    The ranks come and leave as they do in ``join``.
    """
    if world_size == 1:
        return [_outcome(Group(), work)]
    store = store or dist.HashStore()

    def run(rank: int) -> T | Any:
        group = ThreadGroup(rank, world_size, store, timeout)
        groups.append(group)  # a rank that is done still answers the others
        return _outcome(group, work)

    groups: list[Group] = []
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def _outcome(group: Group, work: Callable[[Group], T]) -> T | Any:
    try:
        with group.membership():
            return work(group)
    except BaseException as error:
        return error
