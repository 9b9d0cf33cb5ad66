"""What pytest-benchmark's files say about the machine, beside its own account."""

from typing import Any

from benchmarks import timing


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastlangevin"] = timing.machine()
