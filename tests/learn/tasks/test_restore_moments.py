"""restore by moments: against the textbook's Gaussian, exact answers and the definition."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.energies import GaussianEnergy
from fastlangevin.learn import restore
from fastlangevin.learn.tasks.measurements import Downsample, Mask, Operator, identity, measure
from fastlangevin.learn.tasks.restore_moments import (
    LACKING,
    LARGEST,
    ROUNDING,
    Conditional,
    Moments,
    lacking_std,
    moments,
    stationary,
)
from tests.learn.tasks.shared import BOX, SHAPE, dense, images, net

D = math.prod(SHAPE)


def some_moments() -> Moments:
    root = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return Moments(images(1)[0].double(), root @ root.T / D)


def cosine(size: int, frequency: int) -> Tensor:
    wave = torch.cos(math.pi / size * (torch.arange(size, dtype=torch.float64) + 0.5) * frequency)
    return wave / wave.norm()


def test_the_stationary_covariance_keeps_what_one_frequency_does_and_nothing_else() -> None:
    """For x = sum of a_k wave_k, it is the sum of var(a_k) wave_k wave_k^T: no mixed products."""
    slow, fast = (torch.outer(cosine(4, u), cosine(5, v)) for u, v in ((1, 0), (2, 3)))
    red = torch.tensor([1.0, 0.5], dtype=torch.float64)[:, None, None]
    a = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)[:, None, None, None]
    b = 3 * a  # which depends on a, as frequencies of real images do not
    x = a * red * slow + b * red * fast
    variance = float((a**2).sum() / 3)
    one, other = ((red * wave).flatten() for wave in (slow, fast))
    want = variance * (torch.outer(one, one) + 9 * torch.outer(other, other))
    torch.testing.assert_close(stationary(x), want)


@pytest.mark.parametrize("shape", [(5,), (2, 6), (3, 4, 5), (1, 2, 3, 4)])
def test_moments_of_any_shape_are_a_covariance(shape: tuple[int, ...]) -> None:
    """The average is symmetric, has no negative eigenvalue, and keeps the total variance."""
    x = torch.randn(7, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, covariance = moments(x + 3)
    torch.testing.assert_close(mean, x.mean(0) + 3)
    torch.testing.assert_close(covariance, covariance.T)
    assert float(torch.linalg.eigvalsh(covariance).min()) > -1e-12
    torch.testing.assert_close(covariance.trace(), x.var(0).sum())
    n, d = 7, math.prod(shape)
    want = (n * torch.cov(x.flatten(1).T) + d * stationary(x - x.mean(0))) / (n + d)
    torch.testing.assert_close(covariance, want)


def test_ends_of_chains_without_noise_lack_what_the_diagonal_gets(operator: Any) -> None:
    """The default noise leaves the moments alone; none in the last step does not."""
    quiet = fl.LangevinSampler(net(), steps=2, noise_std=[0.01, 0.0])
    for noise_std, want in (
        (0.01, 0.0),
        (0.0, LACKING),
        ([0.01, 0.0], LACKING),
        ([0.0, 0.01], 0.0),
        (torch.tensor([[0.1, 0.1], [0.0, 0.0]]), LACKING),
        (torch.tensor([0.0, 0.1]), 0.0),
    ):
        assert lacking_std(fl.LangevinSampler(net(), steps=2, noise_std=noise_std)) == want
    y, ends = operator(images(2)), quiet(n=6, seed=9)
    plain = moments(ends)
    wide = Moments(plain.mean, plain.covariance + LACKING**2 * torch.eye(D))
    mean = Conditional(wide, operator, 0.1, torch.float32)(wide.mean.expand(2, *SHAPE), y)
    found = restore(quiet, y, operator, answers=3, samples=6, seed=9, measurement_noise=0.1).mean
    torch.testing.assert_close(found, mean.to(found.dtype), rtol=0, atol=1e-5)


def test_without_positions_the_covariance_is_that_of_the_samples() -> None:
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moments(x).covariance, torch.cov(x.T))


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_conditional_is_that_of_a_gaussian(operator: Any, noise: float) -> None:
    """It solves a system of the size of x, (S^-1 + A^T A / s^2) change = A^T (y - A x) / s^2."""
    given, x, y = some_moments(), images(3, seed=5).double(), operator(images(3)).double()
    s, matrix = max(noise, ROUNDING), dense(operator)
    precision = torch.linalg.inv(given.covariance) + matrix.T @ matrix / s**2
    left = (y - operator(x)).flatten(1) @ matrix / s**2
    want = x + torch.linalg.solve(precision, left.T).T.view_as(x)
    found = Conditional(given, operator, noise, torch.float64)(x, y)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_answers_have_the_moments_of_a_gaussian_given_the_measurement() -> None:
    """At a Gaussian x with noise added to y, mean and covariance are those of the textbook."""
    given, noise, n = some_moments(), 0.5, 20_000
    operator, matrix = Downsample(4), dense(Downsample(4))
    g = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(given.covariance)
    x = torch.randn(n, D, dtype=torch.float64, generator=g) @ root.T + given.mean.flatten()
    y = operator(images(1)).double()
    e = torch.randn(n, *y.shape[1:], dtype=torch.float64, generator=g)
    conditional = Conditional(given, operator, noise, torch.float64)
    answers = conditional(x.view(n, *SHAPE), y + noise * e).flatten(1)
    mean = conditional(given.mean[None], y).flatten()
    precision = torch.linalg.inv(given.covariance) + matrix.T @ matrix / noise**2
    covariance = torch.linalg.inv(precision)
    z = (answers.mean(0) - mean) / (covariance.diagonal() / n).sqrt()
    assert float(z.abs().max()) < 5
    spread = (answers.var(0) / covariance.diagonal() - 1) * (n / 2) ** 0.5
    assert float(spread.abs().max()) < 5


def test_restore_is_the_formula_on_the_samplers_chains(operator: Any) -> None:
    sampler, y = fl.LangevinSampler(net(), steps=2), operator(images(2))
    restored = restore(sampler, y, operator, answers=3, samples=4, seed=9)
    chains = sampler(n=6, seed=9)  # more answers than samples, whose moments are those of 4
    conditional = Conditional(moments(chains[:4]), operator, 0.0, torch.float32)
    want = conditional(chains, y.repeat_interleave(3, 0))
    mean = conditional(moments(chains[:4]).mean.expand(2, *SHAPE), y)
    if isinstance(operator, Mask):
        want, mean = operator.fill(want, y.repeat_interleave(3, 0)), operator.fill(mean, y)
        assert float(restored.residual.max()) == 0
    torch.testing.assert_close(restored.x.flatten(0, 1), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(restored.mean, mean, rtol=0, atol=1e-5)
    alone = restore(sampler, y[:1], operator, answers=3, samples=4, seed=9)
    torch.testing.assert_close(alone.x[0], restored.x[0], rtol=0, atol=1e-4)


def test_more_noise_moves_the_estimate_from_the_measurement_to_the_mean() -> None:
    sampler, y = fl.LangevinSampler(GaussianEnergy(1.0), steps=3, noise_std=0.1), images(2)
    sampler.energy.shape = SHAPE  # type: ignore[attr-defined]
    model = sampler(n=64, seed=0).mean(0)
    means = [
        restore(sampler, y, identity, samples=64, measurement_noise=s).mean for s in (0, 0.3, 30)
    ]
    gaps = [float((mean - y).square().mean()) for mean in means]
    assert gaps[0] < 1e-3 < gaps[1] < gaps[2]
    torch.testing.assert_close(means[2], model.expand_as(y), rtol=0, atol=1e-2)
    noisy = restore(sampler, BOX(y), BOX, samples=64, measurement_noise=0.3)
    assert float(noisy.residual.min()) > 1e-3  # known pixels are not copied


def test_answers_approach_their_mean() -> None:
    sampler, y = fl.LangevinSampler(net(), steps=2), BOX(images(1))
    few, many = (restore(sampler, y, BOX, answers=n, samples=512, seed=1) for n in (8, 512))
    assert torch.equal(few.mean, many.mean)
    torch.testing.assert_close(many.x.mean(1), many.mean, rtol=0, atol=1e-4)
    posterior = restore(sampler, y, BOX, method="posterior", seed=1)
    assert torch.equal(posterior.mean, posterior.x.mean(1))


def test_restored_images_are_nearer_than_the_mean_and_the_measurement() -> None:
    """On chains of the model itself, whose moments are known from other chains."""
    sampler = fl.LangevinSampler(net(), steps=3)
    truth = sampler(n=100, seed=77)
    mean = sampler(n=512, seed=0).mean(0)
    cases: list[tuple[Operator, float]] = [(BOX, 0.0), (BOX, 0.2), (Downsample(2), 0.2)]
    for operator, noise in cases:
        y = measure(operator, truth, noise, seed=3)
        found = restore(sampler, y, operator, answers=1, measurement_noise=noise).mean
        error = (found - truth).square().flatten(1).mean(1)
        for other in (mean.expand_as(truth), torch.zeros_like(truth)):
            less = (other - truth).square().flatten(1).mean(1) - error
            assert float(less.mean() / less.std() * 10) > 5


def test_measurements_have_the_noise_that_was_asked_for() -> None:
    x = images(200)
    noisy = measure(BOX, x, 0.25, seed=4)
    known = BOX(torch.ones_like(x)) == 1
    assert float(noisy[~known].abs().max()) == 0
    e = (noisy - x)[known] / 0.25
    assert abs(float(e.std()) - 1) < 5 / (2 * e.numel()) ** 0.5
    assert torch.equal(measure(BOX, x, 0.0, seed=4), BOX(x))
    assert torch.equal(measure(BOX, x[:3], 0.25, seed=4), noisy[:3])
    with pytest.raises(ValueError, match="measurement_noise must be finite and >= 0, got -1"):
        measure(BOX, x, -1.0, seed=0)


def test_images_that_are_too_large_for_a_covariance_are_refused_before_any_work() -> None:
    side = math.isqrt(LARGEST) + 1
    energy = GaussianEnergy(1.0)
    energy.forward = lambda x: pytest.fail("work before checks")  # type: ignore[method-assign]
    sampler = fl.LangevinSampler(energy, steps=1)
    y = torch.zeros(1, 1, side, side)
    with pytest.raises(ValueError, match=r'"moments" needs images of at most 16384 elements'):
        restore(sampler, y, identity)
