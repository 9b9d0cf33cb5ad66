"""Distances between two sets of features, computed in float64.

x [n, d] are features of samples, and y [m, d] features of the reference. Callers must name the
features next to every figure. Pairs are processed in blocks of rows, so memory grows only with the
size of the features.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_PAIRS = 2**22  # pairs per block: 32 MiB, and still 83 rows for 50,000 others


class Neighbours(NamedTuple):
    """Distances to the nearest element of a set, and the indices of these elements: [n] each."""

    distance: Tensor
    which: Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of Gaussians with the moments of x and y.

        |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))

    The last trace is computed as the nuclear norm of R_x R_y^T, where C = R^T R comes from a QR
    decomposition of the centred features. This is exact for singular C and takes no root of a
    rounding error. Covariances divide by n - 1, as in FID. The estimate is biased upwards in small
    sets, so compare only figures of equal counts. Source: Heusel et al. 2017, arXiv 1706.08500.
    """
    x, y = _checked("frechet_distance", x, y)
    (mean_x, root_x), (mean_y, root_y) = _moments(x), _moments(y)
    overlap = torch.linalg.svdvals(root_x @ root_y.T).sum()
    squares = (mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum()
    return max(0.0, float(squares - 2 * overlap))


def rank(x: Tensor) -> int:
    """Return the rank of the covariance of float32 features [n, d]: at most n - 1 and at most d."""
    root = _moments(x.double())[1]
    # With the tolerance of float64, rounding errors of float32 features would count as directions.
    return int(
        torch.linalg.matrix_rank(root, rtol=max(root.shape) * torch.finfo(torch.float32).eps)
    )


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy for the kernel (a.b / d + 1)^3.

        mean k(x_i, x_j), i != j  +  mean k(y_i, y_j), i != j  -  2 mean k(x_i, y_j)

    For two sets from the same distribution it is near zero and may be negative. Source: Binkowski
    et al. 2018, arXiv 1801.01401 (KID; the paper averages over subsets, this function over all
    pairs).
    """
    x, y = _checked("kernel_distance", x, y)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y).sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y) / (n * m))


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    """Return (precision, recall): the share of x in the manifold of y, and of y in that of x.

    The manifold of a set is the union of balls around its points. The radius of each ball is the
    distance to the k-th nearest other point. Source: Kynkaanniemi et al. 2019, arXiv 1904.06991.
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
    """Return exp of the mean over samples of KL(p(c|x) | p(c)), from probabilities [n, classes].

    It ranges from 1, if all samples have the same probabilities, to the number of classes, if
    every sample is certain and all classes are equally frequent. It is the inception score only if
    the classifier is Inception. Source: Salimans et al. 2016, arXiv 1606.03498.
    """
    p = probabilities.double()
    if p.ndim != 2 or not bool((p >= 0).all()) or not torch.allclose(p.sum(1), p.new_ones(len(p))):
        raise ValueError("inception_score: probabilities must be [n, classes], each row of sum 1")
    entropies = torch.special.entr(p).sum(1).mean()
    return float(torch.exp(torch.special.entr(p.mean(0)).sum() - entropies))


def nearest(x: Tensor, blocks: Iterable[Tensor]) -> Neighbours:
    """Find the nearest element to each of x, by Euclidean distance, in blocks [m, d] of a set."""
    distance = x.new_full((len(x),), math.inf, dtype=torch.float64)
    which = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    first = 0
    for block in blocks:
        ours, theirs = _checked("nearest", x, block, least=1)
        for rows in _blocks(ours, theirs):
            closest = _distances(ours[rows], theirs).min(1)
            nearer = closest.values < distance[rows]
            which[rows] = torch.where(nearer, closest.indices + first, which[rows])
            distance[rows] = torch.minimum(distance[rows], closest.values)
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
    """Return the mean, and R such that R^T R is the covariance."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def _blocks(a: Tensor, b: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of a with at most _PAIRS pairs with the rows of b each."""
    size = max(1, _PAIRS // len(b))
    return (slice(i, i + size) for i in range(0, len(a), size))


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    parts = [((a[rows] @ b.T / a.shape[1] + 1) ** 3).sum() for rows in _blocks(a, b)]
    return torch.stack(parts).sum()


def _kernel_diagonal(a: Tensor) -> Tensor:
    return (a.square().mean(1) + 1) ** 3


def _radii(x: Tensor, k: int) -> Tensor:
    # The smallest distance in a row is from the point to itself.
    parts = [_distances(x[rows], x).kthvalue(k + 1, dim=1).values for rows in _blocks(x, x)]
    return torch.cat(parts)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    centre = b.mean(0)  # because |a|^2 + |b|^2 - 2 a b cancels far from 0
    return torch.cdist(a - centre, b - centre)
