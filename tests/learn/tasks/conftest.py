"""The operators that the tests of restore and of measurements run with."""

from typing import Any

import pytest

from tests.learn.tasks.shared import OPERATORS


@pytest.fixture(params=OPERATORS, ids=str)
def operator(request: pytest.FixtureRequest) -> Any:
    return OPERATORS[request.param]
