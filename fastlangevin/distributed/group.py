"""Group: the processes of a job, with collectives that end in time and say who is missing."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlangevin.distributed.store import TimedStore, within
from fastlangevin.distributed.time_limits import TIMEOUT, DistributedError, TimedWaits, named


class Group:
    """The processes of a job: this one's rank, and how it communicates with the others.

    Tensors travel through torch.distributed's default process group, and small values as JSON
    through its store. All processes must call the same methods in the same order. If another
    process fails, or does not answer within ``timeout`` seconds, a call raises DistributedError,
    which begins with ``what``, the purpose of the call. A process waits longer for values, but not
    for tensors, while another one is :meth:`working`.

    ``Group()`` is a single process, whose calls return at once.

    device: of the tensors that travel.
    holder: whether rank 0 holds the store, which then ends with it.
    job: a name that stays the same when the launcher restarts the processes. None if it would not.
    start: a name that is new whenever the processes are started.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        store: Any = None,
        device: torch.device | None = None,
        timeout: float = TIMEOUT,
        holder: bool = False,
        job: str | None = None,
        start: str = "",
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.device = device or torch.device("cpu")
        self.job, self.start = job, start
        self.bytes = 0  # sent by this process to the others
        self.seconds = 0.0  # spent in collectives of tensors, waiting for others included
        self._store = TimedStore(store, timeout, holder)
        self._waits = TimedWaits(rank, world_size, self._store, timeout, holder)
        self._calls = 0

    def all_to_all(
        self, sent: Tensor, counts: Sequence[int], expected: Sequence[int], what: str
    ) -> Tensor:
        """Send ``counts[r]`` leading entries to each rank r; return what all sent, in rank order.

        expected: the number of entries that each rank sends to this one.
        """
        if self.world_size == 1:
            return sent
        received, sent = sent.new_empty((sum(expected), *sent.shape[1:])), sent.contiguous()
        self._finish(lambda: self._all_to_all(received, sent, list(expected), list(counts)), what)
        self._count(sent[: sum(counts) - counts[self.rank]], 1)
        return received

    def all_gather(self, tensor: Tensor, what: str) -> Tensor:
        """Return the tensors of all ranks, which have one shape, stacked in rank order."""
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        sent = tensor.contiguous()
        self._finish(lambda: self._all_gather(parts, sent), what)
        self._count(tensor, self.world_size - 1)
        return torch.stack(parts)

    def broadcast_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Overwrite the tensors with those of rank 0."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in alike])
            self._finish(functools.partial(self._broadcast, flat), what)
            self._count(flat, self.world_size - 1 if self.rank == 0 else 0)
            parts = flat.split([tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self, what: str) -> None:
        """Return once all processes have called this method."""
        self.share(None, what)

    def share(self, value: Any, what: str) -> list[Any]:
        """Return the JSON-ready values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        self._calls += 1
        keys = [f"{self._calls}/{rank}" for rank in range(self.world_size)]
        with self._waits.asking(what):
            self._store.set(keys[self.rank], json.dumps(value))
            self._waits.wait_for(keys, what)
            return [json.loads(self._store.get(key)) for key in keys]

    def first(self, call: Callable[[], Any], what: str) -> Any:
        """Call a function on rank 0, and return its JSON-ready result on all ranks.

        The others wait as long as rank 0 is running the function.
        """
        if self.world_size == 1:
            return call()
        self._calls += 1
        key = f"{self._calls}/0"
        if self.rank == 0:
            with self.working():
                value = call()
        with self._waits.asking(what):
            if self.rank == 0:
                self._store.set(key, json.dumps(value))
                return value
            self._waits.wait_for([key], what)
            return json.loads(self._store.get(key))

    def deal(self, n: int, what: str) -> Iterator[int]:
        """Return an iterator over 0, ..., n - 1, whose numbers are dealt to the processes.

        Each number goes to one process. A process gets the next number when it asks for it, so
        that a fast one gets more of them.
        """
        if self.world_size == 1:
            return iter(range(n))
        self._calls += 1
        key = f"{self._calls}/dealt"

        def ask() -> int:
            with self._waits.asking(what):
                return min(n, self._store.add(key, 1) - 1)

        return iter(ask, n)

    def compare(self, facts: Mapping[str, Any], what: str) -> None:
        """Raise DistributedError, naming facts and ranks, unless all ranks have equal ``facts``."""
        everyone = self.share(facts, what)
        for name in dict.fromkeys(name for facts_of_rank in everyone for name in facts_of_rank):
            ranks: dict[str, list[int]] = {}
            for rank, facts_of_rank in enumerate(everyone):
                ranks.setdefault(json.dumps(facts_of_rank.get(name)), []).append(rank)
            if len(ranks) > 1:
                values = ", ".join(f"{value} on {named(who)}" for value, who in ranks.items())
                raise DistributedError(f"{what}: the processes differ in {name}: {values}")

    def check(self, what: str) -> None:
        """Raise DistributedError if another process has reported a failure."""
        if self.world_size > 1:
            with self._waits.asking(what):
                if reason := self._waits.failure(what):
                    raise DistributedError(reason)

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Let the others wait for this process for the duration of the context.

        This is for work of any length in which not all processes take part. A thread tells the
        others that this process is still running.
        """
        return contextlib.nullcontext() if self.world_size == 1 else self._waits.working()

    @contextlib.contextmanager
    def membership(self) -> Iterator[None]:
        """Belong to the group for the duration of the context, and leave it when all are done.

        If the body raises an error, the other processes learn the reason. If rank 0 holds the
        store, it waits until the others have left, or for ``timeout`` seconds.
        """
        try:
            yield
            self.barrier("the end of the job")
        except BaseException as error:
            self._waits.report(error)
            self._waits.leave(failed=True)
            raise
        self._waits.leave()

    def connect(self, call: Callable[[], None]) -> None:
        """Run a call that may block until all processes are connected."""
        with self._explained("start"):
            within(self.timeout, call)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say why a collective failed, if torch raises an error."""
        started = time.perf_counter()
        try:
            yield
        except DistributedError:
            raise
        except RuntimeError as error:
            waited = time.perf_counter() - started
            raise DistributedError(self._waits.reason(what, error, waited)) from error

    # Tests, which run in threads, override these three. Some builds of torch lack the collectives.

    def _all_to_all(
        self, received: Tensor, sent: Tensor, expected: list[int], counts: list[int]
    ) -> Any:
        return dist.all_to_all_single(received, sent, expected, counts, async_op=True)

    def _all_gather(self, parts: list[Tensor], tensor: Tensor) -> Any:
        return dist.all_gather(parts, tensor, async_op=True)

    def _broadcast(self, tensor: Tensor) -> Any:
        return dist.broadcast(tensor, 0, async_op=True)

    def _finish(self, begin: Callable[[], Any], what: str) -> None:
        """Begin a collective and wait for its end, in the same way for NCCL and Gloo.

        NCCL's own ``wait`` returns before the end, and its own limit ends the process.
        """
        started = time.perf_counter()
        try:
            with self._explained(what):
                work = begin()
                self._waits.poll(work.is_completed, what)
                work.wait()
        finally:
            self.seconds += time.perf_counter() - started

    def _count(self, tensor: Tensor, times: int) -> None:
        self.bytes += tensor.numel() * tensor.element_size() * times
