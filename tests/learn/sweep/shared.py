"""Settings that the tests of sweeps share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlangevin.learn import train

CENTRE = {
    "limit": 100,
    "width": 2,
    "steps": 2,
    "iterations": 4,
    "batch_size": 8,
    "log_every": 1,
    "save_every": 1,
    "samples": 4,
    "device": "cpu",
    "seed": 5,
}


def interrupted(at_run: int, at_iteration: int, action: Callable[[], None]) -> Any:
    """``train``, with something happening after an iteration of the sweep's at_run-th run."""
    calls = 0

    def patched(config: Any, out: Path, *, report: Any, **options: Any) -> Path:
        nonlocal calls
        calls += 1
        here = calls == at_run + 1

        def follow(iteration: int, record: Any) -> None:
            report(iteration, record)
            if here and iteration == at_iteration:
                action()

        return train(config, out, report=follow, **options)

    return patched


def options(**changes: Any) -> list[str]:
    named = {"iterations": 2, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in (CENTRE | named).items()]
