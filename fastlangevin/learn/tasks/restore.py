"""Images from linear measurements y = A x, by chains: inpainting, super-resolution, deblurring."""

import inspect
import math
from typing import Any, NamedTuple

from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import check_count, check_positive
from fastlangevin.learn.tasks.guidance import DataTerm, clamped, with_term
from fastlangevin.learn.tasks.measurements import Mask, Operator, norm
from fastlangevin.learn.tasks.reconstruct import (
    Fit,
    check_measurements,
    image_shape,
    reconstruct,
    starts,
)
from fastlangevin.sampler import LangevinSampler

METHODS = ("posterior", "clamped", "latent")
# The options of a fit, less the seed, which every method has.
FIT = tuple(
    name
    for name, option in inspect.signature(reconstruct).parameters.items()
    if option.kind is option.KEYWORD_ONLY and name != "seed"
)


class Restored(NamedTuple):
    """Several answers for each measurement."""

    x: Tensor  # [n, answers, C, H, W]
    residual: Tensor  # [n, answers] mean over elements of (y - A x)^2


def restore(
    sampler: LangevinSampler,
    y: Tensor,
    operator: Operator,
    *,
    method: str = "posterior",
    answers: int = 4,
    zeta: float | None = None,
    seed: int = 0,
    **fit: Any,
) -> Restored:
    """Images x that a model finds likely and that agree with measurements y = A x.

    y: finite, [n, ...] in the shape that ``operator``, linear, gives of n images.
    method: "posterior", chains from p0 on the energy + |y - A x|^2 / zeta^2; "clamped", for a
        Mask, chains on the hidden pixels alone, the known ones held at y; "latent", chains
        from starts fitted to y.
    answers: per measurement. Chain i * answers + k is answer k for y[i], whatever the others are.
    zeta: for "posterior"; by default as in :func:`with_data`.
    fit: for "latent", the options of :func:`reconstruct`; restarts, here by default 1, are those
        of each answer, and take as many chains in place of one.

    With a Mask, "clamped" and "latent" answers have y's known pixels exactly. Raises TypeError or
    ValueError naming the argument, before any work, and FloatingPointError if a chain is not
    finite.
    """
    op = "restore"
    if method not in METHODS:
        raise ValueError(f"{op}: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "clamped" and not isinstance(operator, Mask):
        raise ValueError(
            f'{op}: method "clamped" holds known pixels, so operator must be a Mask, '
            f"got {type(operator).__name__}"
        )
    if method != "posterior" and zeta is not None:
        raise ValueError(f'{op}: zeta belongs to method "posterior", got method={method!r}')
    options = {"posterior": ("zeta",), "clamped": (), "latent": FIT}[method]
    if others := [name for name in fit if name not in options]:
        raise TypeError(
            f'{op}: method "{method}" has no option {", ".join(others)}; it takes '
            f"{', '.join(options) or 'none'}"
        )
    check_count(op, "answers", answers)
    shape = image_shape(op, sampler, y, "y")
    check_measurements(op, y, operator, shape, name="y")
    seed = _noise.check_seed(seed)

    if method == "latent":
        restarts = check_count(op, "restarts", fit.pop("restarts", 1))
        found = reconstruct(sampler, y, operator, restarts=answers * restarts, seed=seed, **fit)
        x = Fit(*(part.reshape(-1, restarts, *part.shape[2:]) for part in found)).best().x
    target = y.repeat_interleave(answers, 0)
    if method != "latent":
        if method == "posterior":
            guided = with_data(sampler, target, operator, zeta)
        else:
            assert isinstance(operator, Mask)
            guided = clamped(sampler, target, operator)
        x = guided(starts(len(target), shape, seed, y), seed=seed)
    if method != "posterior" and isinstance(operator, Mask):
        x = operator.fill(x, target)
    residual = (target - operator(x)).square().flatten(1).mean(1)
    return Restored(x.unflatten(0, (len(y), answers)), residual.view(len(y), answers))


def with_data(
    sampler: LangevinSampler,
    y: Tensor,
    operator: Operator,
    zeta: float | None = None,
    op: str = "restore",
) -> LangevinSampler:
    """A sampler like this one on the energy + |y - A x|^2 / zeta^2: chain i has y[i].

    zeta is by default |A| sqrt(2 a), with which one step of size a would take the largest singular
    direction of A to y were there no energy. ValueError, under the name ``op``, below 1 / sqrt(2)
    of that: those steps would go ever further past y.
    """
    size = norm(operator, image_shape(op, sampler, y), y.device, y.dtype)
    step_size = sampler.step_size
    if isinstance(step_size, Tensor):
        a = float(step_size.max())
    else:
        a = max(step_size) if isinstance(step_size, list) else step_size
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
