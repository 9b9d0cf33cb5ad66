"""The simulation of many GPUs against what can be calculated."""

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import (
    ETHERNET,
    INFINIBAND,
    NVLINK,
    PARAMETERS,
    Link,
    communicate,
    computing,
    main,
    measured,
    simulated,
    step,
)
from tests.benchmarks.shared import ROOT


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


def test_a_step_takes_what_was_measured_and_never_less_for_more_chains() -> None:
    assert len(measured()) >= 2
    for chains, seconds in measured().items():
        assert step(chains) == pytest.approx(seconds)
    most = max(measured())
    assert step(4 * most) == pytest.approx(4 * measured()[most])
    times = [step(chains) for chains in range(1, 2 * most)]
    assert times == sorted(times)
    assert times[0] > 0


def test_the_pages_rows_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what the waiting for the slowest GPU is in, which takes seconds to simulate."""
    monkeypatch.setattr(scaling, "ITERATIONS", 1)
    page = (ROOT / "docs" / "distributed.md").read_text("utf-8")
    for row in scaling.rows():
        assert f"\n| {' | '.join(row[:7])} |" in page


@pytest.mark.slow
def test_the_pages_table_is_that_of_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(shutil.copy(ROOT / "docs" / "distributed.md", tmp_path))
    before = page.read_text("utf-8")
    monkeypatch.setattr(sys, "argv", ["scaling", "--docs", str(page)])
    main()
    assert page.read_text("utf-8") == before
    assert before.count(capsys.readouterr().out) == 1
