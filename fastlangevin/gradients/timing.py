"""Which of several engines is the fastest on this machine, by trying each."""

import time
from typing import Any

from torch import Tensor

from fastlangevin.gradients.engine import Engine

Candidate = tuple[str, str | None]  # the name of an engine, and its precision

_ROUNDS = 3
# By case: the seconds of a step with each engine. One measurement per case and process, so that all
# calls of a process run the same engine.
_measured: dict[tuple[Any, ...], dict[Candidate, float]] = {}


def step_seconds(
    case: tuple[Any, ...], engines: dict[Candidate, Engine], x: Tensor
) -> dict[Candidate, float]:
    """Return the seconds of one gradient at x with each engine, the least of some runs.

    The engines take turns, so that a temporary load slows all of them. ``case`` is everything that
    the times depend on; a case that was measured before is not measured again.
    """
    seconds = _measured.get(case)
    if seconds is None:
        seconds = dict.fromkeys(engines, float("inf"))
        for engine in engines.values():
            engine.begin()
            engine(x, False)
        for _ in range(_ROUNDS):
            for candidate, engine in engines.items():
                start = time.perf_counter()
                engine(x, False)
                seconds[candidate] = min(seconds[candidate], time.perf_counter() - start)
        _measured[case] = seconds
    return seconds
