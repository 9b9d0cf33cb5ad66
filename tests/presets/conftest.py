"""Fixtures of several test files."""

import pytest

from tests.presets.shared import Net


@pytest.fixture
def net() -> Net:
    return Net()
