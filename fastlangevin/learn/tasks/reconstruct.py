"""The chain as a map from starts to images: reconstruct and interpolate."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import check_count, check_positive
from fastlangevin.gradients.network import modules_of
from fastlangevin.learn.tasks.measurements import Operator, check_operator, identity
from fastlangevin.sampler import LangevinSampler

OPTIMIZERS = ("adam", "gd")
NOISES = ("off", "frozen")
_RATES = {"adam": 0.1, "gd": 0.05}


class Fit(NamedTuple):
    """Starts whose chains end where asked, one row per restart: [n, restarts, ...]."""

    x: Tensor  # M(z)
    z: Tensor  # in the support [-1, 1] of p0
    error: Tensor  # [n, restarts] mean over elements of (y - A M(z))^2

    def best(self) -> "Fit":
        """The restart of smallest error for each image: [n, ...]."""
        rows = torch.arange(len(self.error), dtype=torch.int64, device=self.x.device)
        chosen = self.error.argmin(1)
        return Fit(self.x[rows, chosen], self.z[rows, chosen], self.error[rows, chosen])


@torch.inference_mode(False)  # the caller's mode would deny it the gradient
def reconstruct(
    sampler: LangevinSampler,
    images: Tensor,
    operator: Operator = identity,
    *,
    restarts: int = 4,
    iterations: int = 200,
    optimizer: str = "adam",
    lr: float | None = None,
    noise: str = "off",
    grad_through: str = "exact",
    checkpoint: str | int = "auto",
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Fit:
    """Starts z whose chains M(z) end at given images, by descent of L(z) = |y - A M(z)|^2.

    images: y [n, C, H, W] in [-1, 1], or with ``operator`` measurements A x of images. Each
        has ``restarts`` starts, drawn from p0 = U(-1, 1); after every step they are put back into
        [-1, 1], the support of p0, and the best of all steps is what is returned.
    optimizer: "gd", z <- z - lr L'(z), the paper's; or "adam". ``lr`` is by default 0.1 for
        adam and 0.05 for gd.
    noise: in the chain: "off", or "frozen", the same at every evaluation.
    grad_through: "exact", unrolled through the steps, or "straight", as if d M / d z were the
        identity: what "exact" finds as well where the energy is piecewise linear.
    checkpoint: what the unrolled chain keeps, as for a call of the sampler.
    report: called with (iteration, mean over images of the best error so far).

    Chain i * restarts + r fits image i, whatever the others are. Raises TypeError or ValueError
    naming the argument, before any work, and FloatingPointError if a chain is not finite. Source:
    arXiv 1904.09770.
    """
    op = "reconstruct"
    check_count(op, "restarts", restarts)
    check_count(op, "iterations", iterations)
    _check_name(op, "optimizer", optimizer, OPTIMIZERS)
    _check_name(op, "grad_through", grad_through, ("exact", "straight"))
    lr = check_positive(op, "lr", _RATES[optimizer] if lr is None else lr)
    quiet = with_noise(op, sampler, noise)
    if report is not None and not callable(report):
        raise TypeError(f"{op}: report must be a function or None, got {report!r}")
    shape = image_shape(op, sampler, images)
    check_measurements(op, images, operator, shape, bounded=operator is identity)
    seed = _noise.check_seed(seed)

    target = images.repeat_interleave(restarts, 0)
    z = starts(len(target), shape, seed, images).requires_grad_()
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    descent = kind([z], lr=lr)
    best = Fit(z.detach(), z.detach(), z.new_full((len(z),), math.inf, requires_grad=False))
    with frozen(sampler):
        for i in range(iterations + 1):
            x = quiet(
                z,
                seed=seed,
                differentiable=True,
                checkpoint=checkpoint,
                grad_through=grad_through,
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


def interpolate(
    sampler: LangevinSampler,
    z1: Tensor,
    z2: Tensor,
    frames: int = 9,
    *,
    noise: str = "off",
    seed: int = 0,
) -> Tensor:
    """Images M(z_rho) between those of two starts: [frames, n, ...], from M(z1) to M(z2).

        z_rho = rho z1 + sqrt(1 - rho^2) z2,    rho = cos(t pi / 2),    t = 0 .. 1 in equal steps

    Independent z1, z2 [n, ...] from p0 keep its variance, 1/3, on the way, though not its law: the
    elements of z_rho reach sqrt(2). ``noise``: "off", or "frozen", chain i's the same in every
    frame. Raises TypeError or ValueError naming the argument. Source: arXiv
    1904.09770.
    """
    op = "interpolate"
    check_count(op, "frames", frames)
    if frames < 2:
        raise ValueError(f"{op}: frames must be at least 2, got {frames}")
    for name, z in (("z1", z1), ("z2", z2)):
        check_tensor(op, name, z)
    if z1.shape != z2.shape:
        raise ValueError(f"{op}: z2 must have z1's shape {list(z1.shape)}, got {list(z2.shape)}")
    quiet = with_noise(op, sampler, noise)
    angles = [math.pi / 2 * k / (frames - 1) for k in range(frames)]
    weights = [(1.0, 0.0), *((math.cos(a), math.sin(a)) for a in angles[1:-1]), (0.0, 1.0)]
    return torch.stack([quiet(a * z1 + b * z2, seed=seed) for a, b in weights])


def with_noise(op: str, sampler: LangevinSampler, noise: str) -> LangevinSampler:
    """The sampler itself for "frozen" noise, one without noise for "off"."""
    _check_name(op, "noise", noise, NOISES)
    if noise == "frozen":
        return sampler
    return LangevinSampler(sampler.energy, **sampler.settings() | {"noise_std": 0.0})


def starts(n: int, shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """p0 = U(-1, 1) as the sampler draws it, where ``like`` is, in float64 if that is."""
    x0 = _noise.initial((n, *shape), seed=seed, device=like.device)
    return x0.double() if like.dtype == torch.float64 else x0


def check_tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        got = f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} must be a floating tensor [n, ...], got {got}")


def image_shape(
    op: str, sampler: LangevinSampler, images: Tensor, name: str = "images"
) -> tuple[int, ...]:
    """(C, H, W) of the energy, where it says, else of the images, the argument ``name``."""
    check_tensor(op, name, images)
    return tuple(getattr(sampler.energy, "shape", images.shape[1:]))


def check_measurements(
    op: str,
    y: Tensor,
    operator: Operator,
    shape: tuple[int, ...],
    bounded: bool = False,
    name: str = "images",
) -> None:
    """TypeError or ValueError unless y, the argument ``name``, are finite measurements by
    ``operator`` of images of ``shape``."""
    check_tensor(op, name, y)
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
    """The energy's parameters need no gradient meanwhile, which a fit would pay for."""
    found = [p for m in modules_of(sampler.energy) for p in m.parameters() if p.requires_grad]
    try:
        for parameter in found:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in found:
            parameter.requires_grad_(True)


def _better(best: Fit, fit: Fit) -> Fit:
    better = fit.error < best.error
    wide = better.view(-1, *[1] * (fit.x.ndim - 1))
    x, z = torch.where(wide, fit.x, best.x), torch.where(wide, fit.z, best.z)
    return Fit(x, z, torch.where(better, fit.error, best.error))


def _check_name(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
