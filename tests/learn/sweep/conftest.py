"""The plan that the tests of sweeps share."""

from collections.abc import Iterator

import pytest

from fastlangevin.learn import resolve, sweep
from fastlangevin.learn.sweep.plan import Sweep
from tests.learn.sweep.shared import CENTRE


@pytest.fixture(scope="module", autouse=True)
def _light() -> Iterator[None]:
    """Few samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.run, "SAMPLES", 50)
        yield


@pytest.fixture(scope="module")
def plan() -> Sweep:
    return Sweep(resolve(overrides=CENTRE), {"steps": [1, 2]}, seeds=2)
