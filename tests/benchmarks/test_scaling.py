"""The simulation of many GPUs against what can be calculated."""

import pytest

from benchmarks.scaling import (
    ETHERNET,
    INFINIBAND,
    NVLINK,
    PARAMETERS,
    Link,
    communicate,
    computing,
    simulated,
)


@pytest.mark.parametrize("link", [NVLINK, INFINIBAND, ETHERNET], ids=lambda link: link.name)
@pytest.mark.parametrize("gpus", [1, 2, 3, 8, 64])
def test_gpus_that_are_ready_together_communicate_as_long_as_calculated(
    gpus: int, link: Link
) -> None:
    moved = 2 * 4 * PARAMETERS * (gpus - 1) / gpus / link.bandwidth
    latencies = gpus * link.latency if gpus > 1 else 0
    assert communicate([7.0] * gpus, link) - 7 == pytest.approx(moved + latencies, rel=1e-6)


def test_all_wait_for_the_slowest() -> None:
    together, late = communicate([1.0] * 8, NVLINK), communicate([1.0] * 7 + [2.0], NVLINK)
    assert 2 < late <= together + 1
    assert simulated(8, NVLINK, 8, 0.05) > simulated(8, NVLINK, 8, 0.0) > computing(8)
