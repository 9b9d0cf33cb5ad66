"""Reconstruct: find starts whose chains end at given images."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_count, check_positive
from fastlangevin.gradients.modules import parameters_of
from fastlangevin.learn.tasks.measurements import Operator, check_operator, identity
from fastlangevin.names import check_name, keywords_checked
from fastlangevin.reprs import short_repr
from fastlangevin.sampler import LangevinSampler

OPTIMIZERS = ("adam", "gd")
NOISES = ("off", "frozen")
ITERATIONS = 200
_RATES = {"adam": 0.1, "gd": 0.05}


class Fit(NamedTuple):
    """Fitted starts and the ends of their chains: [n, restarts, ...] for n images."""

    x: Tensor  #: M(z), the ends of the chains
    z: Tensor  #: the starts, in the support [-1, 1] of p0
    error: Tensor  #: [n, restarts], means over elements of (y - A M(z))^2

    def __repr__(self) -> str:
        return short_repr("Fit", self._asdict())

    def best(self) -> "Fit":
        """Return the restart with the smallest error for each image: [n, ...]."""
        rows = torch.arange(len(self.error), dtype=torch.int64, device=self.x.device)
        chosen = self.error.argmin(1)
        return Fit(self.x[rows, chosen], self.z[rows, chosen], self.error[rows, chosen])


@torch.inference_mode(False)  # the caller's inference mode would disable gradients
@keywords_checked
def reconstruct(
    sampler: LangevinSampler,
    images: Tensor,
    operator: Operator = identity,
    *,
    restarts: int = 4,
    iterations: int = ITERATIONS,
    optimizer: str = "adam",
    lr: float | None = None,
    noise: str = "off",
    grad_through: str = "exact",
    checkpoint: str | int = "auto",
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Fit:
    """Find starts z whose chains end at given images, where M(z) is the end of the chain from z.

    Gradient descent minimises

        L(z) = |y - A M(z)|^2

    Args:
        images: Images y [n, C, H, W] in [-1, 1] or, with ``operator``, measurements y = A x of
            images.
        operator: The linear map A.
        restarts: Number of starts for each image, drawn from p0 = U(-1, 1). After every step they
            are clamped to [-1, 1], the support of p0. Each returns the best of all its steps.
        iterations: Number of descent steps.
        optimizer: "gd", which is the paper's z <- z - lr L'(z), or "adam".
        lr: Learning rate (default: 0.1 for adam, 0.05 for gd).
        noise: Noise in the chain, "off" or "frozen". Frozen noise is the same at every evaluation.
        grad_through: "exact" differentiates through all steps of the chain. "straight" takes d M /
            d z as the identity, which gives the same gradient if the energy is piecewise linear.
        checkpoint: States kept for the gradient, as for a call of the sampler.
        seed: Seed of the starts and the noise.
        report: Called with (iteration, mean over images of the best error so far).

    Chain i * restarts + r fits image i, independently of the other images. Raises TypeError or
    ValueError naming the argument, before any work, and FloatingPointError if a chain is not
    finite. Source: arXiv 1904.09770.
    """
    op = "reconstruct"
    check_count(op, "restarts", restarts)
    check_count(op, "iterations", iterations)
    check_name(f"{op}: optimizer", optimizer, OPTIMIZERS)
    check_name(f"{op}: grad_through", grad_through, ("exact", "straight"))
    lr = check_positive(op, "lr", _RATES[optimizer] if lr is None else lr)
    deterministic = with_noise(op, sampler, noise)
    if report is not None and not callable(report):
        raise TypeError(f"{op}: report must be a function or None, got {report!r}")
    shape = image_shape(op, sampler, images)
    check_measurements(op, images, operator, shape, bounded=operator is identity)
    seed = _noise.check_seed(seed)

    target = images.repeat_interleave(restarts, 0)
    z = starts(sampler, len(target), shape, seed, images).requires_grad_()
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    descent = kind([z], lr=lr)
    best = Fit(z.detach(), z.detach(), z.new_full((len(z),), math.inf, requires_grad=False))
    with frozen(sampler):
        for i in range(iterations + 1):
            x = deterministic(
                z, seed=seed, differentiable=True, checkpoint=checkpoint, grad_through=grad_through
            )
            squares = (target - operator(x)).square().flatten(1)
            best = _better(best, Fit(x.detach(), z.detach(), squares.detach().mean(1)))
            if report is not None:
                report(i, float(best.error.view(-1, restarts).amin(1).mean()))
            if i < iterations:
                (z.grad,) = torch.autograd.grad(squares.sum(), z)
                descent.step()
                with torch.no_grad():
                    z.clamp_(-1, 1)
    rows = len(images), restarts
    return Fit(best.x.unflatten(0, rows), best.z.unflatten(0, rows), best.error.view(rows))


def with_noise(op: str, sampler: LangevinSampler, noise: str) -> LangevinSampler:
    """Return the sampler itself for "frozen" noise, or a sampler without noise for "off"."""
    check_name(f"{op}: noise", noise, NOISES)
    if noise == "frozen":
        return sampler
    return LangevinSampler(sampler.energy, **sampler.settings() | {"noise_std": 0.0})


def starts(
    sampler: LangevinSampler, n: int, shape: tuple[int, ...], seed: int, like: Tensor
) -> Tensor:
    """Draw n of the sampler's starts, on the device of ``like``, in float64 if ``like`` is."""
    x0 = sampler.starts(n, shape=shape, seed=seed).to(like.device)
    return x0.double() if like.dtype == torch.float64 else x0


def check_batch(op: str, name: str, x: Any) -> None:
    """Raise TypeError unless the argument ``name`` is a floating tensor [n, ...]."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        got = f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} must be a floating tensor [n, ...], got {got}")


def image_shape(
    op: str, sampler: LangevinSampler, images: Tensor, name: str = "images"
) -> tuple[int, ...]:
    """Return (C, H, W) of the energy if it has a shape, else of the images, argument ``name``."""
    check_batch(op, name, images)
    return tuple(getattr(sampler.energy, "shape", images.shape[1:]))


def check_measurements(
    op: str,
    y: Tensor,
    operator: Operator,
    shape: tuple[int, ...],
    bounded: bool = False,
    name: str = "images",
) -> None:
    """Check that y, the argument ``name``, holds finite measurements of images of ``shape``.

    Raises TypeError or ValueError unless it does and, if ``bounded``, lies in [-1, 1].
    """
    check_batch(op, name, y)
    want = check_operator(op, operator, shape, y.device, y.dtype)
    if tuple(y.shape[1:]) != want or len(y) == 0:
        raise ValueError(
            f"{op}: {name} must have shape [n >= 1, {', '.join(map(str, want))}], "
            f"got {list(y.shape)}"
        )
    low, high = float(y.min()), float(y.max())
    if not (math.isfinite(low) and math.isfinite(high)) or (bounded and (low < -1 or high > 1)):
        where = "lie in [-1, 1]" if bounded else "be finite"
        raise ValueError(f"{op}: {name} must {where}, got {low:.4g} .. {high:.4g}")


@contextlib.contextmanager
def frozen(sampler: LangevinSampler) -> Iterator[None]:
    """Freeze the parameters of the energy, because a fit would also compute their gradients."""
    parameters = [p for p in parameters_of(sampler.energy) if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _better(best: Fit, fit: Fit) -> Fit:
    better = fit.error < best.error
    wide = better.view(-1, *[1] * (fit.x.ndim - 1))
    x, z = torch.where(wide, fit.x, best.x), torch.where(wide, fit.z, best.z)
    return Fit(x, z, torch.where(better, fit.error, best.error))
