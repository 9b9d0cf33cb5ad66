"""The metrics of an evaluation against formulas and loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlangevin.learn.evaluation import metrics

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Tensor:
    return torch.from_numpy(RNG.standard_normal(shape))


def with_moments(mean: Tensor, covariance: Tensor, n: int = 50) -> Tensor:
    """Features [n, d] whose mean and covariance (n - 1) are exactly these."""
    z = normal(n, len(mean))
    z = torch.linalg.qr(z - z.mean(0)).Q * math.sqrt(n - 1)
    values, vectors = torch.linalg.eigh(covariance)
    return mean + z @ (vectors * values.clamp_min(0).sqrt()).T


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def test_frechet_distance_of_commuting_gaussians() -> None:
    """|mu_x - mu_y|^2 + sum (s_x - s_y)^2 with the standard deviations along common axes."""
    mean_x, mean_y = normal(7), normal(7)
    s_x, s_y = normal(7).abs(), normal(7).abs()
    axes = torch.linalg.qr(normal(7, 7)).Q
    x = with_moments(mean_x, axes @ (s_x**2).diag() @ axes.T)
    y = with_moments(mean_y, axes @ (s_y**2).diag() @ axes.T, n=31)
    exact = (mean_x - mean_y).square().sum() + (s_x - s_y).square().sum()
    assert metrics.frechet_distance(x, y) == pytest.approx(float(exact), rel=1e-10)


def test_frechet_distance_in_the_plane() -> None:
    """For 2 x 2: tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2), no axes in common."""
    a = torch.tensor([[2.0, 0.7], [0.7, 0.5]]).double()
    b = torch.tensor([[0.3, -0.4], [-0.4, 1.9]]).double()
    trace = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    found = metrics.frechet_distance(
        with_moments(torch.zeros(2).double(), a), with_moments(torch.ones(2).double(), b)
    )
    assert found == pytest.approx(float(2 + a.trace() + b.trace() - 2 * trace), rel=1e-10)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_frechet_distance_of_few_images(n: int) -> None:
    """Singular covariances: against tr (C_x^(1/2) C_y C_x^(1/2))^(1/2) by eigenvalues."""
    x, y = normal(n, 10), 2 * normal(n + 1, 10) + 1
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    half = root(cov_x)
    trace = cov_x.trace() + cov_y.trace() - 2 * root(half @ cov_y @ half).trace()
    exact = (x.mean(0) - y.mean(0)).square().sum() + trace
    # 1e-7: the reference takes roots of rounding errors, the function does not.
    assert metrics.frechet_distance(x, y) == pytest.approx(float(exact), rel=1e-6)
    assert metrics.frechet_distance(x, x.flip(0)) < 1e-10


@pytest.mark.parametrize(("n", "d", "rank"), [(3, 10, 2), (10, 10, 9), (40, 10, 10)])
def test_rank(n: int, d: int, rank: int) -> None:
    assert metrics.rank(normal(n, d)) == rank
    assert metrics.rank(torch.cat([normal(n, d), torch.ones(n, 2).double()], 1)) == rank


def test_rank_of_what_was_computed_in_float32() -> None:
    few = normal(300, 3).float() @ normal(3, 64).float()
    assert metrics.rank(few) == metrics.rank(few.double()) == 3
    assert metrics.rank(few + 1e-3 * normal(300, 64).float()) == 64


def test_kernel_distance_by_loops() -> None:
    x, y = normal(6, 4), normal(5, 4) + 1

    def mean(a: Tensor, b: Tensor, skip: bool) -> float:
        pairs = [
            (float(u @ v) / 4 + 1) ** 3
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not (skip and i == j)
        ]
        return sum(pairs) / len(pairs)

    exact = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert metrics.kernel_distance(x, y) == pytest.approx(exact, rel=1e-10)


def test_kernel_distance_is_unbiased() -> None:
    """200 pairs of sets of one law: mean 0 within 5 standard errors, and often below 0."""
    found = np.array([metrics.kernel_distance(normal(8, 3), normal(8, 3)) for _ in range(200)])
    assert abs(found.mean()) < 5 * found.std() / math.sqrt(len(found))
    assert (found < 0).mean() > 0.2


def test_precision_and_recall_by_loops() -> None:
    x, y, k = normal(12, 3), normal(15, 3) + 0.7, 2

    def inside(points: Tensor, manifold: Tensor) -> float:
        hits = 0
        for p in points:
            for i, m in enumerate(manifold):
                others = sorted(float((m - o).norm()) for j, o in enumerate(manifold) if j != i)
                if float((p - m).norm()) <= others[k - 1]:
                    hits += 1
                    break
        return hits / len(points)

    assert metrics.precision_recall(x, y, k) == pytest.approx((inside(x, y), inside(y, x)))
    assert 0 < inside(x, y) < 1


def test_a_lost_mode_costs_recall_alone() -> None:
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0]]).double()
    y = torch.cat([c + normal(200, 2) for c in centres])
    precision, recall = metrics.precision_recall(y[:100], y)
    assert precision == 1
    assert recall == pytest.approx(0.5, abs=0.03)
    assert metrics.precision_recall(y + 1000, y) == (0, 0)


def test_inception_score() -> None:
    assert metrics.inception_score(torch.full((6, 4), 0.25)) == pytest.approx(1)
    assert metrics.inception_score(torch.eye(4).repeat(3, 1)) == pytest.approx(4)
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).double()
    kl = [
        sum(a * math.log(a / b) for a, b in zip(r, p.mean(0).tolist(), strict=True))
        for r in p.tolist()
    ]
    assert metrics.inception_score(p) == pytest.approx(math.exp(sum(kl) / 2))
    with pytest.raises(ValueError, match="each row of sum 1"):
        metrics.inception_score(2 * p)


def test_copies_far_from_zero_are_near() -> None:
    """|a|^2 + |b|^2 - 2 a b of points about 50 would leave 1e-4 of 3,072 elements' squares."""
    x = torch.rand(20, 3072, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 50
    assert metrics.nearest(x, [x]).distance.max() < 1e-5


def test_nearest_over_blocks() -> None:
    x, y = normal(9, 5), normal(20, 5)
    y[13] = x[4]
    exact = (x[:, None] - y).norm(dim=2).min(1)
    found = metrics.nearest(x, y.split(7))
    assert torch.equal(found.which, exact.indices)
    torch.testing.assert_close(found.distance, exact.values, atol=1e-7, rtol=0)
    assert found.which[4] == 13


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        out = function(*arguments, **(options or {}))
        given = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *given, 0)
        return out


def test_pairs_are_held_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """800 x 800 pairs, never all of them at once, and the figures that all at once give."""
    monkeypatch.setattr(metrics, "_PAIRS", 2**18)
    x, y = normal(800, 2), normal(800, 2) + 0.3

    def mean(a: Tensor, b: Tensor) -> Tensor:
        pairs = (a @ b.T / 2 + 1) ** 3
        return (pairs.sum() - pairs.trace()) / (800 * 799) if a is b else pairs.mean()

    radii_x, radii_y = (torch.cdist(a, a).kthvalue(4, dim=1).values for a in (x, y))
    between = torch.cdist(x, y)
    with Largest() as seen:
        kernel = metrics.kernel_distance(x, y)
        precision_recall = metrics.precision_recall(x, y)
        nearest = metrics.nearest(x, [y])
    assert seen.elements < 0.6 * 800**2
    assert kernel == pytest.approx(float(mean(x, x) + mean(y, y) - 2 * mean(x, y)), abs=1e-12)
    precision = float((between <= radii_y).any(1).double().mean())
    recall = float((between <= radii_x[:, None]).any(0).double().mean())
    assert precision_recall == pytest.approx((precision, recall), abs=1e-12)
    torch.testing.assert_close(nearest.distance, between.amin(1), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), "x has 3 features, y has 4"),
        (torch.zeros(1, 3), torch.zeros(5, 3), r"x must have shape \[n, d\] with n >= 2"),
        (torch.zeros(5, 3), torch.zeros(5, 3, 2), r"y must have shape .* got \[5, 3, 2\]"),
        (torch.zeros(5, 3), torch.full((5, 3), math.nan), "y is not finite"),
    ],
)
def test_wrong_features(x: Tensor, y: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=f"frechet_distance: {words}"):
        metrics.frechet_distance(x, y)
