"""TimedStore: the keys that the processes of a job share, with calls that end in time."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class StoreError(RuntimeError):
    """The store of a job does not answer or cannot be reached."""


class TimedStore:
    """A store of torch.distributed. Every call returns in time or raises StoreError.

    torch's calls wait for an answer without a limit, for example if the process that holds the
    keys has been stopped. Once a call has not been answered in time, all later calls fail at once.

    store: a Store of torch.distributed.
    timeout: the longest wait for an answer, in seconds.
    holder: whether rank 0 holds the keys, for error messages.
    """

    def __init__(self, store: Any, timeout: float, holder: bool) -> None:
        self._store, self._timeout = store, timeout
        self._name = ("rank 0, which holds " if holder else "") + "the store of the job"
        self._lost = False

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> str:
        """Return the value of a key that exists."""
        return self._call(lambda: self._store.get(key)).decode()

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all keys exist."""
        return self._call(lambda: self._store.check(list(keys)))

    def add(self, key: str, amount: int) -> int:
        """Add to the number of a key, which begins at 0, and return the sum."""
        return self._call(lambda: self._store.add(key, amount))

    def propose(self, key: str, value: str) -> str:
        """Set a key unless it exists, and return its value."""
        return self._call(lambda: self._store.compare_set(key, "", value)).decode()

    def _call(self, call: Callable[[], T]) -> T:
        silence = f"no answer from {self._name} within {self._timeout:g} s"
        if self._lost:
            raise StoreError(silence)
        try:
            return within(self._timeout, call)
        except DeadlineError as error:
            self._lost = True
            raise StoreError(silence) from error
        except RuntimeError as error:
            raise StoreError(f"{self._name} cannot be reached: {brief(error)}") from error


class DeadlineError(RuntimeError):
    """Something has taken too long."""

    def __init__(self) -> None:
        super().__init__("timed out")


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return ``call()``; raise DeadlineError if it takes longer than ``seconds``.

    It runs in another thread, because a call that blocks in C++ cannot be interrupted. A call that
    takes too long continues in its thread.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise DeadlineError
    return results[0]


def brief(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).split("\n")[0][:300]
