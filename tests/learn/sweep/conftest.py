"""The plan that the tests of sweeps share."""

import pytest

from fastlangevin.learn import resolve
from fastlangevin.learn.sweep.plan import Sweep
from tests.learn.sweep.shared import CENTRE


@pytest.fixture(scope="module")
def plan() -> Sweep:
    return Sweep(resolve(overrides=CENTRE), {"steps": [1, 2]}, seeds=2)
