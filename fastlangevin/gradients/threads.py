"""The number of threads for work that is done again and again, found while it is done."""

import time
from collections.abc import Callable

_ROUNDS = 3  # times that each number is tried
_PERIOD = 1000  # calls after which they are tried again, since the load of the machine changes
_CLEAR = 1.3  # how much slower one thread must be to be tried no more


class ThreadTrial:
    """Runs a task with one thread or with ``most``, whichever has taken less time.

    A small task is often faster with one thread, and always if the other cores are busy: the last
    thread to be scheduled ends it. The task must give the same result for any number of threads.
    Tasks are compared by the time of a unit, such as a step of the chain.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._calls = 0
        self._seconds = {most: float("inf"), 1: float("inf")}
        self._latest: float | None = None  # seconds of a unit when it was last timed

    def run(self, task: Callable[[int], None], units: int = 1) -> None:
        """Run a task of some units that takes the number of its threads."""
        call = self._calls % _PERIOD
        self._calls += 1
        trying = self._tries(call)
        if trying and call == 0:
            self._seconds = dict.fromkeys(self._seconds, float("inf"))
        if trying:
            threads = (self.most, 1)[call % 2]
        else:
            threads = min(self._seconds, key=lambda threads: self._seconds[threads])
        start = time.perf_counter()
        task(threads)
        self._latest = (time.perf_counter() - start) / units
        if not trying:
            return
        self._seconds[threads] = min(self._seconds[threads], self._latest)
        # The first call of all is slow, so that only this comparison is safe early.
        if threads == 1 and self._seconds[1] > _CLEAR * self._seconds[self.most]:
            self._calls += 2 * _ROUNDS - 1 - call

    def units_within(self, seconds: float) -> int:
        """Return how many units the next task may have to take about so long; at least 1.

        It is a tenth while both numbers of threads are being tried, so that a trial is short.
        """
        if self._latest is None:
            return 1
        if self._tries(self._calls % _PERIOD):
            seconds /= 10
        return max(1, int(seconds / max(self._latest, 1e-9)))

    def _tries(self, call: int) -> bool:
        return self.most > 1 and call < 2 * _ROUNDS
