"""Adds our description of the machine to pytest-benchmark's files."""

from typing import Any

from benchmarks.result_file import machine


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastlangevin"] = machine()
