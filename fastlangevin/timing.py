"""Times runs in turns, so that slow phases of the machine affect all of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds_in_turns(
    runs: Sequence[Callable[[], Any]],
    device: torch.device,
    rounds: int = 1,
    budget: float = 0.0,
) -> list[list[float]]:
    """Return the seconds of each run in every round.

    There are at least ``rounds``, and more until ``budget`` seconds have passed.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    start = _now(device)
    while len(seconds[0]) < rounds or _now(device) - start < budget:
        for run, times in zip(runs, seconds, strict=True):
            begin = _now(device)
            run()
            times.append(_now(device) - begin)
    return seconds


def _now(device: torch.device) -> float:
    """Return the time at which a device has done all of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
