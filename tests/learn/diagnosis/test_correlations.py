"""Correlations of energies and losses along a run, by their formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.learn.diagnosis.correlations import correlations, series_of, temperature_of
from tests.learn.diagnosis.shared import normal


def test_correlations_by_their_formula() -> None:
    """Against numpy's: sums over the overlap, divided by the whole series' sums of squares."""
    d, r = normal(2, 50, seed=1).double().cumsum(1).tolist()
    found = correlations(d, r, lags=6)
    a, b = (np.array(v) - np.mean(v) for v in (d, r))
    for lag in range(7):
        assert found.d[lag] == pytest.approx((a[: 50 - lag] @ a[lag:]) / (a @ a))
        assert found.r[lag] == pytest.approx((b[: 50 - lag] @ b[lag:]) / (b @ b))
    scale = math.sqrt((a @ a) * (b @ b))
    for i, lag in enumerate(range(-6, 7)):
        want = a[: 50 - lag] @ b[lag:] if lag >= 0 else a[-lag:] @ b[:lag]
        assert found.cross[i] == pytest.approx(want / scale)
    assert found.response == pytest.approx(np.corrcoef(d[:-1], np.diff(r))[0, 1])
    assert found.expansion == np.mean(np.array(d) < 0)
    assert (found.d_mean, found.d_std) == pytest.approx((np.mean(d), np.std(d, ddof=1)))


def test_a_delay_is_found_at_its_lag() -> None:
    x = normal(400, seed=2).tolist()
    found = correlations(x[3:], x[:-3])  # r follows d by 3
    assert int(np.argmax(found.cross)) - 15 == 3
    assert max(found.cross) > 0.95


def autoregressive(memory: float, n: int, seed: int = 3) -> Tensor:
    """x_t = memory x_{t-1} + noise, from 0."""
    x = [0.0]
    for z in normal(n, seed=seed).tolist():
        x.append(memory * x[-1] + z)
    return torch.tensor(x[1:])


T = torch.linspace(0, 1, 2000)
TRENDS = {
    "none": 0 * T,
    "line": 100 * T,
    "decay": 100 * torch.exp(-10 * T),
    "slow decay": 100 * torch.exp(-2 * T),
    "swings at the start": 50 * (-1.0) ** torch.arange(2000) * (T < 0.05),
}


@pytest.mark.parametrize(
    ("memory", "reading"), [(-0.6, "strong"), (0.0, "weak"), (0.9, "weak")], ids=str
)
@pytest.mark.parametrize("trend", TRENDS)
def test_oscillation(memory: float, reading: str, trend: str) -> None:
    """On any trend, and whatever lags are shown: N = 1,000, 5 standard errors from -0.6's lag 1."""
    x = (autoregressive(memory, 2000) + TRENDS[trend]).tolist()
    found = correlations(x, x).oscillation
    assert (found.values, found.verdict) == (1000, reading)
    assert found.d[0] == pytest.approx(memory, abs=5 / math.sqrt(1000))
    assert correlations(x, x, lags=1).oscillation == found
    assert correlations(x, x, last=1000).oscillation == found


def test_oscillation_by_its_formula() -> None:
    """Of the last half, less numpy's parabola."""
    x = autoregressive(-0.3, 101, seed=5).cumsum(0).tolist()
    late = np.array(x[-50:])
    rest = late - np.polyval(np.polyfit(range(50), late, 2), range(50))
    found = correlations(x, x).oscillation
    for lag in range(1, 6):
        assert found.d[lag - 1] == pytest.approx((rest[:-lag] @ rest[lag:]) / (rest @ rest))
    assert (found.values, found.bound) == (50, 3 / math.sqrt(50))


def test_chance_is_not_read_as_oscillation() -> None:
    """White noise goes below -3 standard errors in 1 % of series; in 6 of 40 with p = 4e-6."""
    for n in (64, 500):
        verdicts = [
            correlations(x, x).oscillation.verdict for x in normal(40, n, seed=6).double().tolist()
        ]
        assert verdicts.count("strong") < 6


def test_no_verdict_on_oscillation() -> None:
    """Of values apart, between which d may have swung; of a short series; of one without change."""
    x = autoregressive(-0.9, 2000).tolist()
    assert correlations(x, x, spacing=10).oscillation.verdict is None
    assert correlations(x[:63], x[:63]).oscillation.verdict is None
    assert correlations(x[:64], x[:64]).oscillation.verdict == "strong"
    assert len(correlations(x[:16], x[:16]).oscillation.d) == 5
    line = [0.1 * i + 3 for i in range(100)]
    assert correlations(line, line).oscillation.d == [0.0] * 5


def test_only_the_last_values_count() -> None:
    old, new = normal(2, 300, seed=4).tolist()
    want = correlations(new, new)
    found = correlations(old + new, old + new, last=300)
    assert found._replace(oscillation=want.oscillation) == want
    assert found.oscillation.values == 300  # all of them, now that they are the later half
    assert len(correlations(new[:20], new[:20]).d) == 6  # lags to a quarter of the values
    flat = correlations([1.0] * 20, [2.0] * 20)
    assert flat.d == [0.0] * 6


def test_series_of_a_log() -> None:
    """d = gap / T, of the opposite sign where the model's output is f; r = a |grad|."""
    records: list[dict[str, Any]] = [
        {"iteration": i, "gap": 0.5 * i, "grad_norm": None if i == 3 else 2.0 * i, "reach": 1.0}
        for i in (1, 3, 11, 21, 31, 36)
    ]
    sampler = fl.LangevinSampler(fl.GaussianEnergy(), steps=2, step_size=[1, 3], noise_std=0.2)
    assert temperature_of(sampler) == pytest.approx(0.01)
    d, r, spacing = series_of(records, "grad_norm", sampler)
    assert d == pytest.approx([50.0 * i for i in (1, 11, 21, 31, 36)])
    assert r == pytest.approx([4.0 * i for i in (1, 11, 21, 31, 36)])
    assert spacing == 10
    up = fl.LangevinSampler(
        fl.GaussianEnergy(), steps=2, step_size=2.0, noise_std=0.2, maximize=True
    )
    assert series_of(records, "reach", up)[:2] == (pytest.approx([-50 * i for i in
        (1, 3, 11, 21, 31, 36)]), [1.0] * 6)  # fmt: skip
    still = fl.LangevinSampler(fl.GaussianEnergy(), noise_std=0.0)
    assert series_of(records, "reach", still)[0][0] == 0.5
    assert series_of([], "reach", still) == ([], [], 1)


@pytest.mark.parametrize(
    ("d", "r", "message"),
    [
        ([0.0] * 15, [0.0] * 15, "16 or more logged values, got 15"),
        ([0.0] * 20, [0.0] * 19, "one length, got 20 and 19"),
        ([math.nan] * 20, [0.0] * 20, "holds NaN or infinity"),
    ],
)
def test_no_correlations(d: list[float], r: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correlations(d, r)
