"""Group: the processes of a job, with collectives that end in time and say who is missing."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 600.0
GRACE = 5.0  # seconds in which the other processes may say why a collective failed
_FAILURE = "failure"


class DistributedError(RuntimeError):
    """The processes of a job cannot work together, or one of them has failed or is missing."""


class Group:
    """The processes of a job: this one's rank, and how it communicates with the others.

    Tensors travel through torch.distributed's default process group. Small values travel as JSON
    through its store, so that a process that waits for them can tell who is missing, and learns
    at once if another process has failed. All processes must call the same methods in the same
    order. Each call says in ``what`` what it is for. It raises DistributedError with this text if
    another process fails or does not answer within ``timeout`` seconds.

    ``Group()`` is a process alone, whose calls return at once.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        store: Any = None,
        device: torch.device | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.device = device or torch.device("cpu")  # of the tensors that travel
        self.bytes = 0  # sent by this process to the others
        self.seconds = 0.0  # spent in collectives of tensors, including the wait for the others
        self._store = store
        self._calls = 0

    def all_to_all(
        self, sent: Tensor, counts: Sequence[int], expected: Sequence[int], what: str
    ) -> Tensor:
        """Send ``counts[r]`` leading entries to each rank r; return what all sent, in rank order.

        expected: the number of entries that each rank sends to this one.
        """
        if self.world_size == 1:
            return sent
        received = sent.new_empty((sum(expected), *sent.shape[1:]))
        with self.timed(what):
            self._all_to_all(received, sent.contiguous(), list(expected), list(counts))
        self._count(sent[: sum(counts) - counts[self.rank]], 1)
        return received

    def all_gather(self, tensor: Tensor, what: str) -> Tensor:
        """Return the tensors of all ranks, which have one shape, stacked in rank order."""
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self.timed(what):
            self._all_gather(parts, tensor.contiguous())
        self._count(tensor, self.world_size - 1)
        return torch.stack(parts)

    def broadcast_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Overwrite the tensors with those of rank 0."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            with self.timed(what):
                self._broadcast(tensor)
            self._count(tensor, self.world_size - 1 if self.rank == 0 else 0)

    def barrier(self, what: str) -> None:
        """Return once all processes have come here."""
        self.share(None, what)

    def share(self, value: Any, what: str) -> list[Any]:
        """Return the JSON-ready values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        self._calls += 1
        keys = [f"{self._calls}/{rank}" for rank in range(self.world_size)]
        with self._asking(what):
            self._store.set(keys[self.rank], json.dumps(value))
        self._wait(keys, what)
        with self._asking(what):
            return [json.loads(self._store.get(key)) for key in keys]

    def first(self, call: Callable[[], Any], what: str) -> Any:
        """Call a function on rank 0, and return its JSON-ready result on all ranks."""
        if self.world_size == 1:
            return call()
        self._calls += 1
        key = f"{self._calls}/0"
        if self.rank == 0:
            value = call()
            with self._asking(what):
                self._store.set(key, json.dumps(value))
            return value
        self._wait([key], what)
        with self._asking(what):
            return json.loads(self._store.get(key))

    def compare(self, facts: Mapping[str, Any], what: str) -> None:
        """Raise DistributedError, naming facts and ranks, unless all ranks have equal ``facts``."""
        everyone = self.share(facts, what)
        names = dict.fromkeys(name for others in everyone for name in others)
        for name in names:
            ranks: dict[str, list[int]] = {}
            for rank, others in enumerate(everyone):
                ranks.setdefault(json.dumps(others.get(name)), []).append(rank)
            if len(ranks) > 1:
                values = ", ".join(f"{value} on {named(who)}" for value, who in ranks.items())
                raise DistributedError(f"{what}: the processes differ in {name}: {values}")

    def check(self, what: str) -> None:
        """Raise DistributedError if another process has reported a failure."""
        if self.world_size > 1:
            with self._asking(what):
                if reason := self._failure():
                    raise DistributedError(f"{what}: {reason}")

    def report_failure(self, error: BaseException) -> None:
        """Tell the other processes why this one ends; they raise this instead of a time-out."""
        if self._store is None or isinstance(error, DistributedError):
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone
            reason = f"rank {self.rank} failed: {type(error).__name__}: {error}"
            self._store.set(_FAILURE, json.dumps(reason))

    # The three collectives, which tests run in threads. Some builds of torch have none of them.

    def _all_to_all(
        self, received: Tensor, sent: Tensor, expected: list[int], counts: list[int]
    ) -> None:
        dist.all_to_all_single(received, sent, expected, counts)

    def _all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        dist.all_gather(parts, tensor)

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, 0)

    def leave(self, error: BaseException) -> None:
        """Report a failure, and let the others read the store before this process ends.

        Without torchrun, the store is a part of rank 0.
        """
        self.report_failure(error)
        gone = [f"gone/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + GRACE
        with contextlib.suppress(RuntimeError):
            self._store.set(gone[self.rank], "")
            while self.rank == 0 and time.monotonic() < deadline and not self._store.check(gone):
                time.sleep(0.05)

    def _count(self, tensor: Tensor, times: int) -> None:
        self.bytes += tensor.numel() * tensor.element_size() * times

    def _wait(self, keys: Sequence[str], what: str) -> None:
        """Return once the store has all keys; a rank is named by what follows the last slash."""
        deadline, pause = time.monotonic() + self.timeout, 0.001
        with self._asking(what):
            while not self._store.check(list(keys)):
                if reason := self._failure():
                    raise DistributedError(f"{what}: {reason}")
                if time.monotonic() > deadline:
                    missing = [
                        int(k.rpartition("/")[2]) for k in keys if not self._store.check([k])
                    ]
                    raise DistributedError(self._no_answer(missing, what))
                time.sleep(pause)
                pause = min(2 * pause, 0.1)

    def _no_answer(self, missing: Sequence[int], what: str) -> str:
        return f"{what}: no answer from {named(missing)} within {self.timeout:g} s"

    def _failure(self) -> str | None:
        return json.loads(self._store.get(_FAILURE)) if self._store.check([_FAILURE]) else None

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn an error of the store into one that says what it was needed for."""
        try:
            yield
        except DistributedError:
            raise
        except RuntimeError as error:
            raise DistributedError(
                f"{what}: rank {self.rank} cannot reach the store of the job: {brief(error)}"
            ) from error

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Time a collective, and turn its error into one that says what it was for and why."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise DistributedError(self._reason(what, error)) from error
        finally:
            self.seconds += time.perf_counter() - started

    def _reason(self, what: str, error: RuntimeError) -> str:
        """Say why a collective failed: another process says so, or is missing."""
        here = [f"here/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + GRACE
        try:
            self._store.set(here[self.rank], "")
            while time.monotonic() < deadline and not self._store.check(here):
                if reason := self._failure():
                    return f"{what}: {reason}"
                time.sleep(0.05)
            missing = [rank for rank, key in enumerate(here) if not self._store.check([key])]
        except RuntimeError:
            missing = []
        if missing and "timed out" in str(error).lower():
            return self._no_answer(missing, what)
        lost = f"{named(missing)} ended or cannot be reached" if missing else "failed"
        return f"{what}: {lost}: {brief(error)}"


def named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def brief(error: BaseException) -> str:
    return str(error).split("\n")[0][:300]
