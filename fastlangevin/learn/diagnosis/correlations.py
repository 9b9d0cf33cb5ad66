"""How learning moves from one iteration to the next: d_s, r_s and their correlations.

    d_s = (E_data[E] - E_samples[E]) / T,   T = b^2 / 2a        below 0: samples above the data
    r_s = mean over steps and chains of a |dE/dx|

Where d < 0 an update pulls data and samples further apart in energy and gradients grow, which is
expansion; where d > 0 they come together, contraction. Strong oscillation is d swinging from one to
the other within a few iterations, negative autocorrelations at short lags: mostly the sign of
learning by Adam or at high rates, whose long chains leave the data. A trend hides it, positive at
every short lag, so it is looked for where the start of training is past, and less a parabola.
Source: Nijkamp et al., "On the Anatomy of MCMC-Based Maximum Likelihood Learning of Energy-Based
Models" (arXiv 1903.12370).
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
_SHORT = 5  # lags that tell of oscillation
# Of fewer values than this an autocorrelation of -0.6 is as likely as not within the bound.
_FEWEST_TO_TELL = 32


class Oscillation(NamedTuple):
    """Of d_s over the later half of a run, its last iterations at most, less its parabola."""

    values: int
    d: list[float]  # autocorrelation at lags 1 to 5
    bound: float  # 3 / sqrt(values)
    verdict: str | None  # "strong" with one of d below -bound, else "weak"; None: cannot be told


class Correlations(NamedTuple):
    """Of two series over a run's last iterations. Lags count values, ``spacing`` iterations."""

    values: int
    spacing: int
    d: list[float]  # autocorrelation at lags 0, 1, ...
    r: list[float]
    cross: list[float]  # of d at t with r at t + lag, lags -L .. L
    bound: float  # 3 / sqrt(values): of a series without correlations few pass it
    d_mean: float
    d_std: float
    expansion: float  # fraction of values with d < 0
    response: float  # correlation of d at t with r at t + 1 less r at t
    oscillation: Oscillation


def correlations(
    d: Sequence[float], r: Sequence[float], spacing: int = 1, lags: int = 15, last: int = 2000
) -> Correlations:
    """:class:`Correlations` of the last values of d_s and of r_s, or another size of the moves.

    Means are taken out, and lags go to at most a quarter of the values. Oscillation has lags and a
    window of its own, whatever ``lags`` are shown; there is no verdict on values more than one
    iteration apart, between which d may have swung, nor on fewer than 64 iterations. Raises
    ValueError for series of different lengths, shorter than 16, or with values that are not finite.
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
        n,
        spacing,
        [_correlation(x, x, lag) for lag in range(lags + 1)],
        [_correlation(y, y, lag) for lag in range(lags + 1)],
        [_correlation(x, y, lag) for lag in range(-lags, lags + 1)],
        3 / math.sqrt(n),
        float(x.mean()),
        float(x.std()),
        float((x < 0).double().mean()),
        _correlation(x[:-1], y.diff(), 0),
        _oscillation(x[-(len(d) // 2) :], spacing),
    )


def temperature_of(sampler: LangevinSampler) -> float:
    """T = b^2 / 2a of the means over steps and chains; 1 for chains without noise or step."""
    a, b = (_mean(value) for value in (sampler.step_size, sampler.noise_std))
    return b * b / (2 * a) if a > 0 and b > 0 else 1.0


def series_of(
    records: Sequence[Mapping[str, Any]], name: str, sampler: LangevinSampler
) -> tuple[list[float], list[float], int]:
    """(d_s, the column ``name`` in steps' units, spacing) of a log's records.

    Records without the column, on which nothing was measured, are left out. Raises ValueError for
    records that have no gap: they are another version's.
    """
    if any("gap" not in record or name not in record for record in records):
        raise ValueError(f"diagnose: the log has records without gap or {name}: another version's?")
    kept = [record for record in records if record[name] is not None]
    scale = temperature_of(sampler) * (-1 if sampler.maximize else 1)
    unit = _mean(sampler.step_size) if name == "grad_norm" else 1.0
    steps = [b["iteration"] - a["iteration"] for a, b in itertools.pairwise(kept)]
    # The last record of a run may come early.
    spacing = max(set(steps), key=steps.count) if steps else 1
    return [r["gap"] / scale for r in kept], [unit * r[name] for r in kept], spacing


def _oscillation(d: Tensor, spacing: int) -> Oscillation:
    t = torch.linspace(-1, 1, len(d), dtype=torch.float64, device="cpu")
    basis = torch.linalg.qr(torch.stack([torch.ones_like(t), t, t.square()], 1)).Q
    rest = d - basis @ (basis.T @ d)
    if rest.norm() <= 1e-9 * d.norm():  # rounding errors, which oscillate
        rest = torch.zeros_like(d)
    found = [_correlation(rest, rest, lag) for lag in range(1, _SHORT + 1)]
    bound = 3 / math.sqrt(len(d))
    verdict = None
    if spacing == 1 and len(d) >= _FEWEST_TO_TELL:
        verdict = "strong" if min(found) < -bound else "weak"
    return Oscillation(len(d), found, bound, verdict)


def _mean(value: Coefficient | list[float]) -> float:
    return float(torch.as_tensor(value, dtype=torch.float64, device="cpu").mean())


def _correlation(x: Tensor, y: Tensor, lag: int) -> float:
    """Of x at t with y at t + lag, as the usual biased estimate; 0 for a constant."""
    a, b = x - x.mean(), y - y.mean()
    norm = float((a.square().sum() * b.square().sum()).sqrt())
    if lag < 0:
        a, b, lag = b, a, -lag
    return float(a[: len(a) - lag] @ b[lag:]) / norm if norm else 0.0
