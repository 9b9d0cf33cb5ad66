"""The comparison of training runs: its statistic, its check of the loops, and its command."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastlangevin as fl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    def module(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(ROOT))
        return importlib.import_module(f"benchmarks.{name}")

    return module


@pytest.mark.parametrize("b", [[1.1, 1.9, 3.2], [2.0, 2.1], [-4.0, -3.0, -3.5, -3.6]])
def test_curves_are_compared_by_students_t_test(benchmark_module: Any, b: list[float]) -> None:
    from scipy import stats  # takes seconds to import

    a = [1.0, 2.0, 3.0]
    found, want = benchmark_module("train_peers").same(a, b), stats.ttest_ind(b, a)
    assert found["t"] == pytest.approx(want.statistic)
    assert found["p"] == pytest.approx(want.pvalue)
    assert found["difference"] == pytest.approx(sum(b) / len(b) - 2)


def test_the_distance_of_curves(benchmark_module: Any) -> None:
    """Runs that differ by 3, 4 in two iterations, and by 0: (sqrt(12.5) + 0) / 2."""
    curves = [[1.0, 2.0], [5.0, 5.0]], [[4.0, -2.0], [5.0, 5.0]]
    assert benchmark_module("train_peers").distance(*curves) == pytest.approx(12.5**0.5 / 2)


def test_a_loop_that_is_not_the_samplers_is_refused(
    benchmark_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmarks = benchmark_module("train_peers")

    def other(f: Any, steps: int, noise_std: float = 0.005) -> fl.LangevinSampler:
        return fl.LangevinSampler(
            f, steps, 10.0, noise_std, maximize=True, clamp=(-1, 1), grad_clip=0.0301
        )

    benchmarks.check()
    monkeypatch.setattr(benchmarks, "uva_sampler", other)
    with pytest.raises(SystemExit, match="UvA is off the loop's chain by"):
        benchmarks.check()


@pytest.mark.slow
def test_the_command_and_its_report(benchmark_module: Any, tmp_path: Path) -> None:
    benchmark_module("train_peers").main(["--out", str(tmp_path), "--quick"])
    content = json.loads((tmp_path / "train_peers-cpu.json").read_text())
    rows = {(row["style"], row["variant"]): row for row in content["results"]}
    assert len(rows) == 12
    for (style, variant), row in rows.items():
        assert (row["distance"] == 0) == (variant == "original loop"), style
        assert [len(run) for run in row["gap"]] == [3, 3]
        assert row["late_gap"] == pytest.approx([run[-1] for run in row["gap"]], rel=1e-4)
    report = benchmark_module("report").report([content])
    for style in ("short-run", "JEM", "UvA"):
        assert report.count(f"| {style} |") == 3
    pytest.importorskip("matplotlib")
    benchmark_module("report_train").plot(content, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 0
