"""The number of threads that a repeated task is given, on a clock that the test moves."""

from unittest import mock

import pytest

from fastlangevin.gradients import threads
from fastlangevin.gradients.threads import ThreadTrial


def counts(most: int, seconds: dict[int, float], calls: int, first: float = 0.0) -> list[int]:
    """The threads of each call of a task that takes these seconds, and ``first`` more at first."""
    clock, used, trial = [0.0], [], ThreadTrial(most)

    def task(n: int) -> None:
        clock[0] += seconds[n] + first * (not used)
        used.append(n)

    with mock.patch.object(threads.time, "perf_counter", side_effect=lambda: clock[0]):
        for _ in range(calls):
            trial.run(task)
    return used


def test_a_single_thread_is_not_questioned() -> None:
    assert counts(1, {1: 1.0}, 5) == [1] * 5


@pytest.mark.parametrize("first", [0.0, 50.0])
def test_a_task_that_is_faster_alone_runs_alone(first: float) -> None:
    assert counts(4, {4: 2.0, 1: 1.0}, 20, first)[6:] == [1] * 14


def test_a_task_that_is_clearly_faster_together_is_tried_alone_once() -> None:
    assert counts(4, {4: 1.0, 1: 2.0}, 20) == [4, 1] + [4] * 18


def test_a_slow_first_call_decides_nothing() -> None:
    assert counts(4, {4: 1.0, 1: 1.2}, 20, first=50.0)[6:] == [4] * 14


def test_both_are_tried_again_later() -> None:
    used = counts(2, {2: 2.0, 1: 1.0}, 2000)
    assert used[1000:1006] == [2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize("most", [1, 2])
def test_units_fill_the_time_that_is_asked_for(most: int) -> None:
    clock, trial = [0.0], ThreadTrial(most)
    assert trial.units_within(1.0) == 1  # nothing is known yet

    def task(n: int) -> None:
        clock[0] += 0.5 / n

    with mock.patch.object(threads.time, "perf_counter", side_effect=lambda: clock[0]):
        trial.run(task, 10)
        assert trial.units_within(1.0) == (20 if most == 1 else 4)
        trial.run(task, 10)
    assert trial.units_within(1.0) == 20
    assert trial.units_within(1e-9) == 1
