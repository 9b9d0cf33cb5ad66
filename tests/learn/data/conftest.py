"""Arrays that are read through a temporary file."""

import pytest

from fastlangevin.learn.data import arrays, collect


@pytest.fixture
def spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put even small arrays in a temporary file."""
    monkeypatch.setattr(collect, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 0)
