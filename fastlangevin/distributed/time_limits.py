"""TimedWaits: how a process waits for the others, and learns of their failures."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from fastlangevin.distributed.store import DeadlineError, StoreError, TimedStore, brief

TIMEOUT = 600.0  # seconds that a process waits for the others, by default
GRACE = 5.0  # seconds that the other processes have to say why a collective failed
_LOOK = 0.2  # seconds between checks, while waiting, for failures of other processes
_FAILURE, _SIGNS = "failure", "signs"


class DistributedError(RuntimeError):
    """The processes of a job cannot work together, or one of them has failed or is missing."""


class TimedWaits:
    """The waits of a process for the others, which end in time and say who is missing or why.

    holder: whether rank 0 holds the store, which then ends with it.
    """

    def __init__(
        self, rank: int, world_size: int, store: TimedStore, timeout: float, holder: bool
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._store, self._holder = store, holder
        self._missing: set[int] = set()

    def wait_for(self, keys: Sequence[str], what: str) -> None:
        """Return once the store has all keys. A key ends in a slash and a rank."""
        try:
            self.poll(lambda: self._store.check(keys), what, patient=True)
        except DeadlineError:
            missing = [int(k.rpartition("/")[2]) for k in keys if not self._store.check([k])]
            raise DistributedError(self._no_answer(missing, what)) from None

    def poll(self, done: Callable[[], bool], what: str, patient: bool = False) -> None:
        """Return once ``done()`` is true; raise DeadlineError after the time limit.

        Raises DistributedError as soon as another process has reported a failure. If ``patient``,
        the time limit starts again with every sign of a process that is working.
        """
        started = since = looked = time.monotonic()
        signs = None
        while not done():
            now = time.monotonic()
            late = now - since > self.timeout
            if late or now - looked > min(_LOOK, self.timeout / 4):
                looked = now
                with self.asking(what):
                    # The work may have ended, and a failure been reported, since the last check.
                    if (reason := self.failure(what)) and not done():
                        raise DistributedError(reason)
                    before, signs = signs, self._store.add(_SIGNS, 0) if patient else 0
                if before not in (None, signs):
                    since = now
                elif late:
                    raise DeadlineError
            time.sleep(min(0.05, max(2e-5, (now - started) / 20)))  # 5 % more than it takes

    def _no_answer(self, missing: Sequence[int], what: str) -> str:
        self._missing |= set(missing)
        return f"{what}: no answer from {named(missing)} within {self.timeout:g} s"

    def failure(self, what: str) -> str | None:
        """Return why another process has ended, or None."""
        if not self._store.check([_FAILURE]):
            return None
        reason = json.loads(self._store.get(_FAILURE))
        return f"{what}: {reason.replace(f'gave up: {what}: ', 'gave up: ')}"

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Add to an error of the store what the store was needed for."""
        try:
            yield
        except StoreError as error:
            raise DistributedError(f"{what}: {error}") from error

    def reason(self, what: str, error: Exception, waited: float) -> str:
        """Return why a collective failed: as another process reports, or who is missing or late.

        waited: the seconds since this process called it. All processes compare their seconds.
        """
        keys = [f"here/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + GRACE
        try:
            self._store.set(keys[self.rank], str(waited))
            while time.monotonic() < deadline and not self._store.check(keys):
                if reason := self.failure(what):
                    return reason
                time.sleep(0.05)
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            waits = {} if missing else {r: float(self._store.get(k)) for r, k in enumerate(keys)}
        except StoreError as silence:
            return f"{what}: {silence}"
        timed_out = "timed out" in str(error).lower()  # by this class or by Gloo
        if missing and timed_out:
            return self._no_answer(missing, what)
        longest = max(waits.values(), default=0.0)
        if waits and (timed_out or longest >= self.timeout):
            late = [rank for rank, seconds in waits.items() if seconds < longest / 2]
            who = named(late) if late else "a rank"
            return f"{what}: {who} came later than the limit of {self.timeout:g} s"
        self._missing |= set(missing)
        lost = f"{named(missing)} ended or cannot be reached" if missing else "failed"
        return f"{what}: {lost}: {brief(error)}"

    def report(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, so that they raise this and not a time-out.

        This process also reports that it gave up waiting for a slow one, which would otherwise
        blame the processes that have ended.
        """
        if self.world_size == 1:
            return
        if isinstance(error, DistributedError):
            while isinstance(error.__cause__, DistributedError):
                error = error.__cause__  # without the advice that callers add
            reason = f"rank {self.rank} gave up: {error}"
        else:
            reason = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        with contextlib.suppress(StoreError):
            self._store.propose(_FAILURE, json.dumps(reason))  # the first reason counts

    def leave(self, failed: bool = False) -> None:
        """Tell the others that this process no longer needs the store, and wait until they do so.

        The holder of the store waits for ``timeout`` seconds, but only GRACE seconds for processes
        that are missing, which may just be slow. After a failure the others wait for GRACE seconds,
        too, because a launcher may end all processes with the first one.
        """
        departures = [f"gone/{r}" for r in range(self.world_size)]
        known_departures = [key for r, key in enumerate(departures) if r not in self._missing]
        limit = self.timeout if self._holder and self.rank == 0 else GRACE if failed else 0
        started = time.monotonic()
        with contextlib.suppress(StoreError):
            if self.world_size > 1:
                self._store.set(f"gone/{self.rank}", "")
                while (waited := time.monotonic() - started) < limit:
                    if self._store.check(departures if waited < GRACE else known_departures):
                        break
                    time.sleep(0.05)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Signal to the others, from a thread, that this process runs, while the context lasts."""
        done = threading.Event()

        def tell() -> None:
            # If the store is lost, the process notices at its next call.
            with contextlib.suppress(StoreError):
                while not done.wait(self.timeout / 8):
                    self._store.add(_SIGNS, 1)

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            done.set()


def named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
