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
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._calls = 0
        self._seconds = {most: float("inf"), 1: float("inf")}

    def run(self, task: Callable[[int], None]) -> None:
        """Run a task that takes the number of its threads."""
        if self.most == 1:
            task(1)
            return
        call = self._calls % _PERIOD
        self._calls += 1
        if call >= 2 * _ROUNDS:
            task(min(self._seconds, key=lambda threads: self._seconds[threads]))
            return
        if call == 0:
            self._seconds = dict.fromkeys(self._seconds, float("inf"))
        threads = (self.most, 1)[call % 2]
        start = time.perf_counter()
        task(threads)
        self._seconds[threads] = min(self._seconds[threads], time.perf_counter() - start)
        # The first call of all is slow, so that only this comparison is safe early.
        if threads == 1 and self._seconds[1] > _CLEAR * self._seconds[self.most]:
            self._calls += 2 * _ROUNDS - 1 - call
