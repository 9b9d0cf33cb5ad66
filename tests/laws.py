"""Whether numbers follow a law. Without scipy, whose import takes longer than most tests."""

import math

import torch
from torch import Tensor


def uniform_p(x: Tensor, lo: float = 0.0, hi: float = 1.0) -> float:
    """p of the Kolmogorov-Smirnov test of x, 1,000 numbers or more, against U(lo, hi)."""
    u = ((x.flatten().double() - lo) / (hi - lo)).sort().values
    n = len(u)
    assert n >= 1000, "p is that of the limit of many numbers"
    if not 0 <= float(u[0]) <= float(u[-1]) <= 1:
        return 0.0
    above = torch.arange(1, n + 1, dtype=torch.float64) / n - u
    distance = float(torch.maximum(above, 1 / n - above).max()) * math.sqrt(n)
    if distance < 0.3:  # p is 1 to eight digits, and the series converges slowly
        return 1.0
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 50))


def normal_p(z: Tensor) -> float:
    """p of the Kolmogorov-Smirnov test of z against N(0, 1)."""
    return uniform_p(torch.special.ndtr(z.double()))


def equal_counts_p(counts: Tensor) -> float:
    """p of the chi-square test of counts against equal expected counts."""
    expected = counts.double().mean()
    statistic = (counts.double() - expected).square().sum() / expected
    degrees = torch.tensor(len(counts) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))
