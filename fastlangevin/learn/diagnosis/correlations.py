"""How learning changes between iterations: the quantities d_s and r_s, and their correlations.

    d_s = (E_data[E] - E_samples[E]) / T,   T = b^2 / 2a        d_s < 0: samples lie above the data
    r_s = mean over steps and chains of a |dE/dx|

If d < 0, an update moves data and samples further apart in energy and gradients grow: expansion. If
d > 0, they come closer: contraction. In a strong oscillation, d alternates between the two within a
few iterations, so that its autocorrelations at short lags are negative. This is typical of learning
with Adam or at high learning rates, where long chains leave the data. A trend would hide the
oscillation, because it makes the autocorrelations at short lags positive. Therefore only the later
half of a run is used, and a parabola is subtracted. Source: Nijkamp et al., "On the Anatomy of
MCMC-Based Maximum Likelihood Learning of Energy-Based Models" (arXiv 1903.12370).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.arguments import Coefficient
from fastlangevin.sampler import LangevinSampler

FEWEST = 16
_SHORT = 5  # lags that are examined for oscillation
# With fewer values, even an autocorrelation of -0.6 would often lie within the bound.
_FEWEST_TO_TELL = 32


class Oscillation(NamedTuple):
    """The oscillation of d_s in the later half of a run, after subtracting a fitted parabola."""

    values: int  # number of values
    d: list[float]  # autocorrelations at lags 1 to 5
    bound: float  # 3 / sqrt(values)
    verdict: str | None  # "strong" if one of d is below -bound, else "weak"; None: undecidable


class Correlations(NamedTuple):
    """Correlations of two series over the last iterations of a run. Lags are counted in values."""

    values: int  # number of values
    spacing: int  # iterations between values
    d: list[float]  # autocorrelations at lags 0, 1, ...
    r: list[float]  # the same for r
    cross: list[float]  # correlations of d at t with r at t + lag, for lags -L .. L
    bound: float  # 3 / sqrt(values), rarely exceeded without correlation
    d_mean: float
    d_std: float
    expansion: float  # fraction of values with d < 0
    response: float  # correlation of d at t with the change of r from t to t + 1
    oscillation: Oscillation


def correlations(
    d: Sequence[float], r: Sequence[float], spacing: int = 1, lags: int = 15, last: int = 2000
) -> Correlations:
    """Return the :class:`Correlations` of the ``last`` values of d_s and r_s.

    r may also be another measure of how far chains move. ``lags`` is limited to a quarter of the
    values. The oscillation has no verdict if values are more than one iteration apart, because d
    may alternate between them, or if there are fewer than 64. Raises ValueError for series of
    different lengths, with fewer than 16 values, or with values that are not finite.
    """
    if len(d) != len(r):
        raise ValueError(f"diagnose: d and r must be of one length, got {len(d)} and {len(r)}")
    if len(d) < FEWEST:
        raise ValueError(
            f"diagnose: correlations need {FEWEST} or more logged values, got {len(d)}"
        )
    x, y = (torch.tensor(list(v)[-last:], dtype=torch.float64, device="cpu") for v in (d, r))
    if not bool((x.isfinite() & y.isfinite()).all()):
        raise ValueError("diagnose: d and r must be finite, the log holds NaN or infinity")
    n = len(x)
    lags = min(lags, n // 4)
    return Correlations(
        values=n, spacing=spacing,
        d=[_correlation(x, x, lag) for lag in range(lags + 1)],
        r=[_correlation(y, y, lag) for lag in range(lags + 1)],
        cross=[_correlation(x, y, lag) for lag in range(-lags, lags + 1)],
        bound=3 / math.sqrt(n), d_mean=float(x.mean()), d_std=float(x.std()),
        expansion=float((x < 0).double().mean()), response=_correlation(x[:-1], y.diff(), 0),
        oscillation=_oscillation(x[-(len(d) // 2) :], spacing),
    )  # fmt: skip


def temperature_of(sampler: LangevinSampler) -> float:
    """Return T = b^2 / 2a for the means of a and b over steps and chains; 1 if a or b is 0."""
    a, b = (_mean(value) for value in (sampler.step_size, sampler.noise_std))
    return b * b / (2 * a) if a > 0 and b > 0 else 1.0


def series_of(
    records: Sequence[Mapping[str, Any]], name: str, sampler: LangevinSampler
) -> tuple[list[float], list[float], int]:
    """Return (d_s, the column ``name``, spacing) of the records of a log.

    grad_norm is multiplied by the mean step size. Records in which the column is None are left
    out. Raises ValueError for records without the columns, which are from another version.
    """
    if any("gap" not in record or name not in record for record in records):
        raise ValueError(
            f"diagnose: the log has records without gap or {name}; is it from another version?"
        )
    measured = [record for record in records if record[name] is not None]
    scale = temperature_of(sampler) * (-1 if sampler.maximize else 1)
    unit = _mean(sampler.step_size) if name == "grad_norm" else 1.0
    steps = [b["iteration"] - a["iteration"] for a, b in itertools.pairwise(measured)]
    # The last record of a run may come sooner than the others.
    spacing = max(set(steps), key=steps.count) if steps else 1
    return [r["gap"] / scale for r in measured], [unit * r[name] for r in measured], spacing


def _oscillation(d: Tensor, spacing: int) -> Oscillation:
    t = torch.linspace(-1, 1, len(d), dtype=torch.float64, device="cpu")
    basis = torch.linalg.qr(torch.stack([torch.ones_like(t), t, t.square()], 1)).Q
    residual = d - basis @ (basis.T @ d)
    if residual.norm() <= 1e-9 * d.norm():  # only rounding errors are left, and these oscillate
        residual = torch.zeros_like(d)
    autocorrelations = [_correlation(residual, residual, lag) for lag in range(1, _SHORT + 1)]
    bound = 3 / math.sqrt(len(d))
    verdict = None
    if spacing == 1 and len(d) >= _FEWEST_TO_TELL:
        verdict = "strong" if min(autocorrelations) < -bound else "weak"
    return Oscillation(len(d), autocorrelations, bound, verdict)


def _mean(value: Coefficient | list[float]) -> float:
    return float(torch.as_tensor(value, dtype=torch.float64, device="cpu").mean())


def _correlation(x: Tensor, y: Tensor, lag: int) -> float:
    """Return the correlation of x at t with y at t + lag (biased estimate); 0 for a constant."""
    a, b = x - x.mean(), y - y.mean()
    norm = float((a.square().sum() * b.square().sum()).sqrt())
    if lag < 0:
        a, b, lag = b, a, -lag
    return float(a[: len(a) - lag] @ b[lag:]) / norm if norm else 0.0
