"""Restore images from linear measurements: inpainting, super-resolution, deblurring, colour."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_count, check_number, check_positive
from fastlangevin.learn.tasks.guidance import DataTerm, clamped, with_term
from fastlangevin.learn.tasks.measurements import Mask, Operator, norm
from fastlangevin.learn.tasks.reconstruct import (
    Fit,
    check_measurements,
    image_shape,
    reconstruct,
    starts,
)
from fastlangevin.learn.tasks.restore_moments import from_moments
from fastlangevin.names import check_name, did_you_mean
from fastlangevin.reprs import short_repr
from fastlangevin.sampler import LangevinSampler

SAMPLES = 512
# The options that belong to each method. A fit has a seed, too, which every method takes.
_OPTIONS = {
    "moments": ("measurement_noise", "samples"),
    "posterior": ("zeta",),
    "clamped": (),
    "latent": tuple(
        name
        for name, option in inspect.signature(reconstruct).parameters.items()
        if option.kind is option.KEYWORD_ONLY and name != "seed"
    ),
}
METHODS = tuple(_OPTIONS)


class Restored(NamedTuple):
    """Restored images, several answers for each measurement."""

    x: Tensor  #: [n, answers, C, H, W]
    residual: Tensor  #: [n, answers], means over elements of (y - A x)^2
    #: [n, C, H, W], the mean of the answers; with "moments", the limit for infinitely many
    mean: Tensor

    def __repr__(self) -> str:
        return short_repr("Restored", self._asdict())


def restore(
    sampler: LangevinSampler,
    y: Tensor,
    operator: Operator,
    *,
    method: str = "moments",
    answers: int = 4,
    measurement_noise: float | None = None,
    samples: int | None = None,
    zeta: float | None = None,
    seed: int = 0,
    callback: Callable[[int, Tensor], Any] | None = None,
    **fit: Any,
) -> Restored:
    """Find images x that are likely under a model and agree with measurements y = A x.

    With "moments", the mean m and the covariance S of samples of the model are conditioned on y:

        mean = m + K (y - A m),    answer = x + K (y + s e - A x),
        K = S A^T (A S A^T + s^2 I)^-1

    x is a chain's end and e is standard normal, so that an answer is a sample of the model that is
    moved onto the measurement. There is nothing to tune: :func:`moments` weighs S by the number of
    samples, and s is the noise of y. Learning matches the moments of data and samples, but does not
    make the energy a calibrated density, on which "posterior" and "clamped" rely.

    Args:
        y: Finite measurements [n, ...], in the shape that ``operator`` returns for n images.
        operator: The linear map A.
        method: "moments" is described above. "posterior" runs chains from p0 on the energy
            + |y - A x|^2 / zeta^2. "clamped", for a Mask, runs chains on the hidden pixels only and
            holds the known ones at y. "latent" runs chains from starts that are fitted to y.
        answers: Number of answers for each measurement. Chain i * answers + k is answer k for y[i],
            independently of the other measurements.
        measurement_noise: Standard deviation s of independent Gaussian noise in y, for "moments"
            (default: 0). K is computed with 1 / 255 or more, the rounding of pictures.
        samples: Number of chains from which the moments are estimated, 2 or more, for "moments"
            (default: 512).
        zeta: Scale of the posterior's data term (default: as in :func:`with_data`).
        seed: Seed of the starts and the noise.
        callback: The callback of a sampler's call, for all methods but "latent".
        fit: Options of :func:`reconstruct` for "latent". ``restarts`` (default here: 1) is the
            number of chains for each answer; the best one is returned.

    With a Mask, all answers reproduce the known pixels of y exactly, except those of "posterior"
    and of "moments" with noise. "moments" needs memory for several matrices of d x d elements, for
    images of d <= 16384 elements. Raises TypeError or ValueError naming the argument, before any
    work, and FloatingPointError if a chain is not finite.
    """
    op = "restore"
    options = {"measurement_noise": measurement_noise, "samples": samples, "zeta": zeta}
    _check_method(op, method, operator, options, fit)
    if method == "latent" and callback is not None:
        raise ValueError(f'{op}: callback belongs to chains from noise; method "latent" has report')
    check_count(op, "answers", answers)
    shape = image_shape(op, sampler, y, "y")
    check_measurements(op, y, operator, shape, name="y")
    seed = _noise.check_seed(seed)
    noise = check_number(op, "measurement_noise", measurement_noise or 0)

    target = y.repeat_interleave(answers, 0)
    mean = None
    if method == "moments":
        count = check_count(op, "samples", SAMPLES if samples is None else samples)
        x, mean = from_moments(sampler, y, operator, shape, answers, count, noise, seed, callback)
    elif method == "latent":
        restarts = check_count(op, "restarts", fit.pop("restarts", 1))
        fits = reconstruct(sampler, y, operator, restarts=answers * restarts, seed=seed, **fit)
        x = Fit(*(part.reshape(-1, restarts, *part.shape[2:]) for part in fits)).best().x
    else:
        guided = (
            clamped(sampler, target, operator)
            if method == "clamped" and isinstance(operator, Mask)
            else with_data(sampler, target, operator, zeta)
        )
        x = guided(starts(sampler, len(target), shape, seed, y), seed=seed, callback=callback)
    if method != "posterior" and not noise and isinstance(operator, Mask):
        x = operator.fill(x, target)
        mean = None if mean is None else operator.fill(mean, y)
    residual = (target - operator(x)).square().flatten(1).mean(1)
    x = x.unflatten(0, (len(y), answers))
    residual = residual.view(len(y), answers)
    return Restored(x, residual, x.mean(1) if mean is None else mean)


def _check_method(
    op: str, method: str, operator: Operator, options: Mapping[str, Any], fit: Mapping[str, Any]
) -> None:
    """Raise TypeError or ValueError unless the operator and the given options fit the method."""
    check_name(f"{op}: method", method, METHODS)
    if method == "clamped" and not isinstance(operator, Mask):
        raise ValueError(
            f'{op}: method "clamped" holds known pixels, so operator must be a Mask, '
            f"got {type(operator).__name__}"
        )
    for owner, names in _OPTIONS.items():
        for name in names:
            if owner != method and options.get(name) is not None:
                raise ValueError(f'{op}: {name} belongs to method "{owner}", got method={method!r}')
    known = _OPTIONS[method]
    if others := [name for name in fit if name not in known]:
        arguments = {*known, *inspect.signature(restore).parameters} - {"fit"}
        raise TypeError(
            f'{op}: method "{method}" has no option {", ".join(others)}; it takes '
            f"{', '.join(known) or 'none'}{did_you_mean(others[0], arguments)}"
        )


def with_data(
    sampler: LangevinSampler,
    y: Tensor,
    operator: Operator,
    zeta: float | None = None,
    op: str = "restore",
) -> LangevinSampler:
    """Return this sampler on the energy + |y - A x|^2 / zeta^2, where chain i uses y[i].

    Args:
        zeta: The default is |A| sqrt(2 a). With it, and without the energy, one step of size a
            would reach y along the largest singular direction of A.

    Raises ValueError, prefixed with ``op``, if zeta is less than 1 / sqrt(2) times the default,
    because the steps would then overshoot y further and further.
    """
    size = norm(operator, image_shape(op, sampler, y), y.device, y.dtype)
    a = float(torch.as_tensor(sampler.step_size, dtype=torch.float64, device="cpu").max())
    natural = size * math.sqrt(2 * a)
    if size == 0 or a == 0:
        raise ValueError(f"{op}: operator and step_size must not be 0, got |A| = {size}, a = {a}")
    zeta = natural if zeta is None else check_positive(op, "zeta", zeta)
    if not zeta >= natural / math.sqrt(2):
        raise ValueError(
            f"{op}: zeta must be at least |A| sqrt(a) = {natural / math.sqrt(2):.4g} for chains "
            f"not to diverge, got {zeta}"
        )
    return with_term(sampler, DataTerm(y, operator, zeta))
