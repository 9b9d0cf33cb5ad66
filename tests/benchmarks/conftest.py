"""The benchmarks' modules, for their tests."""

import importlib
from types import ModuleType

import pytest

from tests.benchmarks.shared import ROOT


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of ``benchmarks``, which stands beside the package and is not installed."""

    def module(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(ROOT))
        return importlib.import_module(f"benchmarks.{name}")

    return module
