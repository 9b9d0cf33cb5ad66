"""How far one set of features is from another: the formulas, in float64.

x are features of samples [n, d], y of the reference [m, d]; what they are features of is the
caller's to say beside every figure. Of all pairs, blocks of rows are held at a time: memory grows
with the features alone.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_PAIRS = 2**22  # held at a time: 32 MiB, and still many rows beside 50,000 others


class Neighbours(NamedTuple):
    """Distances to the nearest of a set, and which one that is: [n] each."""

    distance: Tensor
    which: Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with the moments of x and y.

        |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))

    The last trace is the nuclear norm of R_x R_y^T, with C = R^T R from a QR of the centred
    features: exact where C is singular, and no root of a rounding error is taken. Covariances
    divide by n - 1, as FID does. Biased upwards in small sets: compare figures of equal counts.
    Source: Heusel et al. 2017, arXiv 1706.08500.
    """
    x, y = _checked("frechet_distance", x, y)
    (mean_x, root_x), (mean_y, root_y) = _moments(x), _moments(y)
    overlap = torch.linalg.svdvals(root_x @ root_y.T).sum()
    squares = (mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum()
    return max(0.0, float(squares - 2 * overlap))


def rank(x: Tensor) -> int:
    """Of the covariance of features [n, d], that come in float32: n - 1 at most, and d at most."""
    root = _moments(x.double())[1]
    # In float64 the rounding errors of float32 features would count as directions of their own.
    return int(
        torch.linalg.matrix_rank(root, rtol=max(root.shape) * torch.finfo(torch.float32).eps)
    )


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased, of the kernel k(a, b) = (a.b / d + 1)^3.

        mean k(x_i, x_j), i != j  +  mean k(y_i, y_j), i != j  -  2 mean k(x_i, y_j)

    About zero, also below it, for two sets of one law. Source: Binkowski et al. 2018, arXiv
    1801.01401 (KID, there averaged over subsets; here over all pairs).
    """
    x, y = _checked("kernel_distance", x, y)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y).sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y) / (n * m))


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of x in y's manifold, and of y in x's.

    A set's manifold is the union of balls around its points, each out to the point's k-th nearest
    other one. Source: Kynkaanniemi et al. 2019, arXiv 1904.06991.
    """
    x, y = _checked("precision_recall", x, y)
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(
            f"precision_recall: k must lie between 1 and {min(len(x), len(y)) - 1}, one less than "
            f"the smaller set, got {k}"
        )
    radii_x, radii_y = _radii(x, k), _radii(y, k)
    inside_y = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    inside_x = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for rows in _blocks(x, y):
        distances = _distances(x[rows], y)
        inside_y[rows] = (distances <= radii_y).any(1)
        inside_x |= (distances <= radii_x[rows, None]).any(0)
    return float(inside_y.double().mean()), float(inside_x.double().mean())


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean over samples of KL(p(c|x) | p(c)), from probabilities [n, classes].

    From 1 (all alike) to the number of classes (each sure, all equally many). It is the inception
    score when the classifier is Inception, and otherwise that of the classifier it comes from.
    Source: Salimans et al. 2016, arXiv 1606.03498.
    """
    p = probabilities.double()
    if p.ndim != 2 or not bool((p >= 0).all()) or not torch.allclose(p.sum(1), p.new_ones(len(p))):
        raise ValueError("inception_score: probabilities must be [n, classes], each row of sum 1")
    entropies = torch.special.entr(p).sum(1).mean()
    return float(torch.exp(torch.special.entr(p.mean(0)).sum() - entropies))


def nearest(x: Tensor, blocks: Iterable[Tensor]) -> Neighbours:
    """The nearest to each of x, by Euclidean distance, in a set that comes in blocks [m, d]."""
    distance = x.new_full((len(x),), math.inf, dtype=torch.float64)
    which = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    first = 0
    for block in blocks:
        ours, theirs = _checked("nearest", x, block, least=1)
        for rows in _blocks(ours, theirs):
            found = _distances(ours[rows], theirs).min(1)
            nearer = found.values < distance[rows]
            which[rows] = torch.where(nearer, found.indices + first, which[rows])
            distance[rows] = torch.minimum(distance[rows], found.values)
        first += len(block)
    return Neighbours(distance, which)


def _checked(op: str, x: Tensor, y: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    for name, value in (("x", x), ("y", y)):
        if value.ndim != 2 or len(value) < least:
            raise ValueError(
                f"{op}: {name} must have shape [n, d] with n >= {least}, got {list(value.shape)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"{op}: {name} is not finite")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} features, y has {y.shape[1]}")
    return x.double(), y.double()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and R with R^T R the covariance."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def _blocks(a: Tensor, b: Tensor) -> Iterator[slice]:
    """Rows of a, so many at a time that their pairs with b's are few."""
    size = max(1, _PAIRS // len(b))
    return (slice(i, i + size) for i in range(0, len(a), size))


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    parts = [((a[rows] @ b.T / a.shape[1] + 1) ** 3).sum() for rows in _blocks(a, b)]
    return torch.stack(parts).sum()


def _kernel_diagonal(a: Tensor) -> Tensor:
    return (a.square().mean(1) + 1) ** 3


def _radii(x: Tensor, k: int) -> Tensor:
    # The smallest of a row is the point itself.
    parts = [_distances(x[rows], x).kthvalue(k + 1, dim=1).values for rows in _blocks(x, x)]
    return torch.cat(parts)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, [n, m]: of points about 0, since |a|^2 + |b|^2 - 2 a b cancels."""
    centre = b.mean(0)
    return torch.cdist(a - centre, b - centre)
