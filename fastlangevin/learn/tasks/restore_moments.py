"""Restore by moments: the mean and covariance of a model's samples, conditioned on measurements.

This is the default method of :func:`fastlangevin.learn.tasks.restore.restore`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.gradients.precision import network_precision
from fastlangevin.learn.tasks.measurements import Operator
from fastlangevin.learn.tasks.reconstruct import starts
from fastlangevin.sampler import LangevinSampler

LARGEST = 16384  # elements of an image; its covariance then takes 2 GiB
ROUNDING = 1 / 255  # most that a picture's 256 levels change a pixel of [-1, 1]
# Standard deviation of what images have and the ends of chains without noise lack. Of 0.05, 0.1,
# 0.15 and 0.2, it had the least error for the model cifar10 and masked training images.
LACKING = 0.2
_ROWS = 1024  # images to which an operator is applied at a time


def from_moments(
    sampler: LangevinSampler,
    y: Tensor,
    operator: Operator,
    shape: tuple[int, ...],
    answers: int,
    samples: int,
    noise: float,
    seed: int,
    callback: Callable[[int, Tensor], Any] | None,
) -> tuple[Tensor, Tensor]:
    """Return ``answers`` images for each measurement, [n * answers, C, H, W], and their mean.

    shape: (C, H, W) of an image.
    samples: number of chains from which the moments are estimated.
    noise: standard deviation of the noise in y.

    Raises ValueError for fewer than two samples, and for images with more than :data:`LARGEST`
    elements.
    """
    if samples < 2:
        raise ValueError(f"restore: samples must be at least 2, got {samples}")
    if math.prod(shape) > LARGEST:
        raise ValueError(
            f'restore: method "moments" needs images of at most {LARGEST} elements, got '
            f"{list(shape)}"
        )
    target = y.repeat_interleave(answers, 0)
    x0 = starts(sampler, max(samples, len(target)), shape, seed, y)
    ends = sampler(x0, seed=seed, callback=callback)
    of_model = moments(ends[:samples], lacking_std(sampler))
    conditional = Conditional(of_model, operator, noise, ends.dtype)
    mean = conditional(of_model.mean.expand(len(y), *shape), y)
    e = _noise.normal(target.shape, seed=seed, step=0, stream=_noise.USER, device=y.device)
    return conditional(ends[: len(target)], target + noise * e), mean


class Moments(NamedTuple):
    """The mean and covariance of images, in float64."""

    mean: Tensor  #: [C, ...]
    covariance: Tensor  #: [d, d], where d is the number of elements of an image


def lacking_std(sampler: LangevinSampler) -> float:
    """Return :data:`LACKING` if the last step of the chains has no noise, else 0."""
    noise: Any = sampler.noise_std
    by_step = isinstance(noise, Sequence) or (isinstance(noise, Tensor) and noise.ndim == 2)
    last = noise[-1] if by_step else noise
    noisy = bool(last.any()) if isinstance(last, Tensor) else last != 0
    return 0.0 if noisy else LACKING


def moments(samples: Tensor, lacking: float = 0.0) -> Moments:
    """Estimate the mean and covariance of the distribution that samples [n, C, ...] come from.

    The covariance of n samples has rank n - 1 at most, less than the d elements of most images. It
    is therefore averaged with a stationary one:

        covariance = (n S + d D) / (n + d) + lacking^2 I

    S is the covariance of the samples. In the basis of the discrete cosine transform over all axes
    but the channels, D is S without the entries between different frequencies. With these weights,
    the result is the posterior mean under an inverse Wishart prior around D that counts as d
    samples.

    samples: two or more.

    lacking: standard deviation of what every element has and the samples lack. Smooth samples would
    otherwise explain every detail of a measurement by large changes elsewhere.
    """
    x = samples.double()
    n, d = len(x), math.prod(x.shape[1:])
    mean = x.mean(0)
    flat = (x - mean).flatten(1)
    sampled = flat.T @ flat / (n - 1)
    covariance = (n * sampled + d * stationary(x - mean)) / (n + d)
    covariance.diagonal().add_(lacking**2)
    return Moments(mean, covariance)


def stationary(x: Tensor) -> Tensor:
    """Return the covariance D of :func:`moments`, [d, d], from n centred samples [n, C, ...]."""
    sizes = x.shape[2:]
    cosines = [_cosines(size, x) for size in sizes]
    waves = x
    for axis, basis in enumerate(cosines, 2):
        waves = (waves.transpose(axis, -1) @ basis.T).transpose(axis, -1)
    n, channels = x.shape[:2]
    waves = waves.reshape(n, channels, -1).permute(2, 1, 0)  # [frequencies, C, n]
    blocks = (waves @ waves.mT / (n - 1)).permute(1, 2, 0)
    out = blocks.reshape(channels, channels, *sizes)
    for basis in cosines:  # replace the axis of frequencies by two axes of positions at the end
        out = torch.tensordot(out, basis[:, :, None] * basis[:, None, :], ([2], [0]))
    axes = range(len(sizes))
    order = [0, *(2 + 2 * k for k in axes), 1, *(3 + 2 * k for k in axes)]
    return out.permute(order).reshape(math.prod(x.shape[1:]), -1)


def _cosines(size: int, like: Tensor) -> Tensor:
    """Return the orthonormal basis of the discrete cosine transform (DCT-II), [size, size]."""
    at = torch.arange(size, dtype=like.dtype, device=like.device)
    basis = torch.cos(math.pi / size * (at + 0.5) * at[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


class Conditional:
    """Moves images x onto measurements y = A x + noise, given the moments of x.

    A call returns x + K (y - A x), where K = S A^T (A S A^T + s^2 I)^-1 for the covariance S. At
    the mean of x, this is the linear estimate of least expected squared error. At random x with
    these moments, and with noise of standard deviation s added to y, the results have the mean and
    covariance of x given y, if x is Gaussian (Matheron's rule). ``noise`` is s. If it is
    below :data:`ROUNDING`, s is ROUNDING. A is applied in ``dtype``, which the images have too.
    """

    @torch.no_grad()
    def __init__(self, of_x: Moments, operator: Operator, noise: float, dtype: torch.dtype):
        self.operator, self.shape, self.dtype = operator, of_x.mean.shape, dtype
        rows = self._measure(of_x.covariance)  # S A^T, [d, m]
        square = self._measure(rows.T)  # A S A^T
        self.measured = square.diagonal() > 0  # False for hidden pixels, for example
        square = square[self.measured][:, self.measured]
        square = (square + square.T) / 2
        square.diagonal().add_(max(noise, ROUNDING) ** 2)
        self.rows, self.factor = rows[:, self.measured], torch.linalg.cholesky(square)

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x + K (y - A x), for images x and measurements y: [n, ...]."""
        error = y.double().flatten(1) - self._measure(x)
        change = torch.cholesky_solve(error[:, self.measured].T, self.factor)
        return (x.double() + (self.rows @ change).T.view_as(x)).to(self.dtype)

    def _measure(self, x: Tensor) -> Tensor:
        """Return A x, [n, m] in float64, for images [n, d] or [n, C, ...]."""
        parts = x.to(self.dtype).reshape(-1, *self.shape).split(_ROWS)
        with network_precision("fp32", x.device):
            return torch.cat([self.operator(part).flatten(1) for part in parts]).double()
