"""The paper's theory in one or two dimensions, where every law can be computed exactly.

A law is a vector of masses on a regular grid, and a chain's kernel is a matrix. Sums over the grid
are midpoint rules. For smooth laws that vanish at the grid's edge, they converge faster than any
power of its spacing. Everything is float64. Source: arXiv 1904.09770, section 4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastlangevin.arguments import at_step, check_count
from fastlangevin.sampler import LangevinSampler

# At a standard deviation of this many spacings, the midpoint rule's relative error of a Gaussian's
# mass is 2 exp(-2 pi^2 0.75^2) = 3e-5 per step. It is 5e-9 for one spacing and 1e-12 for 1.2.
_FINEST = 0.75


@dataclass(frozen=True)
class Grid:
    """The midpoints of n cells along each axis of [lo, hi]^dim.

    With ``atoms`` each axis also has the points lo, before its midpoints, and hi, after them. A
    clamp leaves mass there that no density describes.
    """

    lo: float
    hi: float
    n: int
    dim: int = 1
    atoms: bool = False

    def __post_init__(self) -> None:
        check_count("Grid", "n", self.n)
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo < self.hi):
            raise ValueError(f"Grid: needs finite lo < hi, got {self.lo}, {self.hi}")
        if self.dim not in (1, 2):
            raise ValueError(f"Grid: dim must be 1 or 2, got {self.dim!r}")

    @property
    def spacing(self) -> float:
        return (self.hi - self.lo) / self.n

    @property
    def axis(self) -> Tensor:
        """Coordinates along one axis."""
        cells = torch.arange(self.n, dtype=torch.float64, device="cpu")
        inside = self.lo + self.spacing * (cells + 0.5)
        ends = inside.new_tensor([self.lo, self.hi])
        return torch.cat((ends[:1], inside, ends[1:])) if self.atoms else inside

    @property
    def points(self) -> Tensor:
        """All points [m, dim]; the last coordinate varies fastest."""
        return torch.cartesian_prod(*[self.axis] * self.dim).reshape(-1, self.dim)

    @property
    def volumes(self) -> Tensor:
        """The volumes [m] of the points' cells; those of atoms are 0."""
        lengths = torch.full((self.n,), self.spacing, dtype=torch.float64, device="cpu")
        if self.atoms:
            lengths = torch.cat((lengths.new_zeros(1), lengths, lengths.new_zeros(1)))
        return torch.cartesian_prod(*[lengths] * self.dim).reshape(-1, self.dim).prod(1)

    def law(self, log_density: Tensor) -> Tensor:
        """The masses [m] of a density from its logarithm [m], up to an additive constant."""
        return torch.softmax(log_density + self.volumes.log(), 0)

    def uniform(self, lo: float = -1.0, hi: float = 1.0) -> Tensor:
        """The masses of U(lo, hi)^dim, the paper's p0. lo and hi must be boundaries of cells.

        Raises ValueError if they cut a cell, because part of its mass would then be wrong.
        """
        for end in (lo, hi):
            cells = (end - self.lo) / self.spacing
            if not (0 <= cells <= self.n and abs(cells - round(cells)) < 1e-9):
                raise ValueError(
                    f"Grid: uniform needs bounds between two of the cells, {self.spacing:g} wide "
                    f"from {self.lo:g}, got {end:g}"
                )
        inside = ((self.points > lo) & (self.points < hi)).all(1)
        return self.law(torch.where(inside, 0.0, -math.inf).double())


def temperature(sampler: LangevinSampler, k: int = 0) -> float:
    """T = b^2 / 2a of step k: the chain's density is close to p ~ exp(-E / T).

    Raises ValueError if step sizes or noise differ between chains.
    """
    step_size, noise_std = _coefficients(sampler, k)
    return noise_std**2 / (2 * step_size)


def gibbs(sampler: LangevinSampler, grid: Grid, k: int = 0) -> Tensor:
    """The masses [m] of p_theta = exp(-E / T) / Z, or exp(f / T) / Z with maximize.

    Z is the exact sum over the grid.
    """
    return grid.law(_log_density(sampler, grid, k))


def transition(
    sampler: LangevinSampler, grid: Grid, k: int = 0, metropolis: bool | None = None
) -> Tensor:
    """The kernel of the sampler's step k on the grid: [m, m], row i the law after a step from i.

        N(y; x + s a clip(g(x)), b^2),        g = dE/dx, s = -1, or +1 with maximize

    The mean is the sampler's own step without its noise, so all of its settings apply. With the
    sampler's ``clamp`` the mass beyond a bound is an atom at the bound, and the grid needs atoms.
    With ``metropolis``, by default the sampler's setting, the move is a proposal. It is accepted
    with probability min(1, p(y) q(x | y) / p(x) q(y | x)), and never beyond the grid or a clamp;
    this leaves :func:`gibbs` invariant. Otherwise rows sum to 1 less the mass that leaves the grid.

    Raises ValueError for a grid that is too coarse for the noise or does not match the clamp, and
    for settings that have no kernel on one chain: clips by the batch's norm and a noise_order other
    than "after".
    """
    step_size, noise_std = _coefficients(sampler, k)
    if metropolis is None:
        metropolis = sampler.metropolis
    _check_kernel(sampler, grid, noise_std, metropolis)
    settings = sampler.settings() | {"steps": 1, "step_size": step_size, "noise_std": 0.0}
    settings |= {"clamp": None, "metropolis": False}
    mean = LangevinSampler(sampler.energy, **settings)(grid.points, seed=0)
    moves = [_axis_law(mean[:, d], noise_std, grid) for d in range(grid.dim)]
    kernel = moves[0] if grid.dim == 1 else (moves[0][:, :, None] * moves[1][:, None]).flatten(1)
    if not metropolis:
        return kernel
    log_density = _log_density(sampler, grid, k)
    log_move = -(grid.points[None] - mean[:, None]).square().sum(2) / (2 * noise_std**2)
    log_flow = log_density[:, None] + log_move  # of the proposal, from row to column
    kernel *= (log_flow.T - log_flow).clamp(max=0).exp()
    kernel.fill_diagonal_(0)
    return kernel + torch.diag(1 - kernel.sum(1))


def short_run(
    sampler: LangevinSampler,
    grid: Grid,
    start: Tensor | None = None,
    metropolis: bool | None = None,
) -> Tensor:
    """The laws p_0, p_1, ..., p_K of the sampler's chain: [K + 1, m].

    ``start`` are the masses of p_0, by default those of U(-1, 1).
    """
    laws = [grid.uniform() if start is None else start]
    kernel, last = None, None
    for k in range(sampler.steps):
        if kernel is None or _coefficients(sampler, k) != last:
            kernel, last = transition(sampler, grid, k, metropolis), _coefficients(sampler, k)
        laws.append(laws[-1] @ kernel)
    return torch.stack(laws)


def stationary(kernel: Tensor) -> Tensor:
    """The law [m] that a kernel [m, m] leaves invariant."""
    m = kernel.shape[0]
    system = torch.eye(m, dtype=kernel.dtype, device=kernel.device) - kernel.T + 1 / m
    # Rounding may make masses that are almost 0 negative.
    law = torch.linalg.solve(system, kernel.new_full((m,), 1 / m)).clamp(min=0)
    return law / law.sum()


def kl(q: Tensor, p: Tensor) -> float:
    """KL(q | p) = sum q log(q / p) in nats; infinite if q has mass at a point where p has none."""
    return float((torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum())


def entropy(p: Tensor, grid: Grid) -> float:
    """H(p), the density's differential entropy in nats; minus infinity if atoms have mass."""
    return -kl(p, grid.volumes)


def fit_moments(features: Tensor, target: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(p_MLE, theta) of the exponential family p ~ exp(<theta, h>) with E_p[h] = target.

    It is the maximum likelihood law for data with these moments, and the law of largest entropy
    among all laws that have them. features: h on the grid [m, j], linearly independent of one
    another and of 1; target [j]. Uses Newton's method on the convex log Z(theta) - <theta, target>.
    Raises ValueError if no law on the grid has these moments.
    """
    theta = torch.zeros_like(target)
    base = grid.volumes.log()

    def log_partition(theta: Tensor) -> Tensor:
        return torch.logsumexp(features @ theta + base, 0) - theta @ target

    for _ in range(200):
        law = grid.law(features @ theta)
        residual = law @ features - target
        if residual.abs().max() < 1e-12 * (1 + target.abs().max()):
            return law, theta
        centred = features - law @ features
        hessian = centred.T @ (law[:, None] * centred)
        direction = torch.linalg.lstsq(hessian, -residual[:, None]).solution[:, 0]
        before, slope, length = log_partition(theta), residual @ direction, 1.0
        # If the expected decrease is below float64's resolution, the full step is taken.
        while (
            -slope > 1e-12
            and log_partition(theta + length * direction) > before + 1e-4 * length * slope
        ):
            length /= 2
            if length < 1e-10:
                break
        theta = theta + length * direction
    law = grid.law(features @ theta)
    if (law @ features - target).abs().max() < 1e-9 * (1 + target.abs().max()):
        return law, theta
    raise ValueError(
        f"fit_moments: no law on the grid has the moments {target.tolist()}, or the features are "
        "linearly dependent"
    )


def mean_gradient(energy: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    """E[dE(x) / dtheta] as one vector, for points x [n, ...] with probabilities weights [n]."""
    parameters = [p for p in energy.parameters() if p.requires_grad]
    with torch.enable_grad():
        mean = energy(x).reshape(-1) @ weights
        grads = torch.autograd.grad(mean, parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(grads, parameters, strict=True)
        ]
    )


def estimating_equation(
    sampler: LangevinSampler, grid: Grid, x: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(E_data[dE / dtheta] - E_q[dE / dtheta], q): algorithm 1's expected update, and its law q.

    q is the law after the sampler's K steps from U(-1, 1). The data are points x [n, dim] with
    probabilities weights [n].
    """
    energy = _module(sampler)
    law = short_run(sampler, grid)[-1]
    gap = mean_gradient(energy, x, weights) - mean_gradient(energy, grid.points, law)
    return gap, law


def solve(
    sampler: LangevinSampler,
    grid: Grid,
    x: Tensor,
    weights: Tensor,
    tolerance: float = 1e-9,
    iterations: int = 100,
) -> Tensor:
    """Set the energy's parameters to a fixed point of algorithm 1 in expectation, and return its q.

        E_data[dE / dtheta] = E_q(theta)[dE / dtheta]

    Uses Newton's method with finite differences for the derivative. The result is that of a
    converged run of ShortRunLearner, without its noise. The parameters should be float64. Raises
    ValueError if no fixed point is found; the parameters are then unchanged.
    """
    parameters = [p for p in _module(sampler).parameters() if p.requires_grad]
    initial = parameters_to_vector(parameters).detach()

    def at(theta: Tensor) -> Tensor:
        vector_to_parameters(theta, parameters)
        return estimating_equation(sampler, grid, x, weights)[0]

    with torch.no_grad():
        theta, gap = initial.clone(), at(initial)
        for _ in range(iterations):
            if gap.abs().max() <= tolerance:
                at(theta)
                return short_run(sampler, grid)[-1]
            columns = [
                (at(theta + step) - at(theta - step)) / 2e-5
                for step in 1e-5 * torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
            ]
            # Least squares, because some directions, such as an energy's constant, have no effect.
            jacobian = torch.stack(columns, 1)
            step = torch.linalg.lstsq(jacobian, -gap[:, None], driver="gelsd").solution[:, 0]
            length, new = 1.0, at(theta + step)
            while not new.norm() < gap.norm() and length > 1e-4:
                length /= 2
                new = at(theta + length * step)
            theta, gap = theta + length * step, new
        at(initial)
    raise ValueError(
        f"solve: no fixed point found in {iterations} iterations: a moment is still off by "
        f"{float(gap.abs().max()):.2g}; start from other parameters"
    )


def _axis_law(mean: Tensor, noise_std: float, grid: Grid) -> Tensor:
    """The law of one coordinate for each mean [m, axis], clamped if the grid has atoms."""
    inside = grid.axis[1:-1] if grid.atoms else grid.axis
    z = (inside - mean[:, None]) / noise_std
    masses = (-z.square() / 2).exp() * (grid.spacing / noise_std / math.sqrt(2 * math.pi))
    if not grid.atoms:
        return masses
    below = torch.special.ndtr((grid.lo - mean) / noise_std)
    above = torch.special.ndtr((mean - grid.hi) / noise_std)
    return torch.cat((below[:, None], masses, above[:, None]), 1)


def _log_density(sampler: LangevinSampler, grid: Grid, k: int) -> Tensor:
    with torch.no_grad():
        energies = sampler.energy(grid.points).reshape(-1).double()
    return (energies if sampler.maximize else -energies) / temperature(sampler, k)


def _coefficients(sampler: LangevinSampler, k: int) -> tuple[float, float]:
    """(step_size, noise_std) of step k, as numbers."""
    values = at_step(sampler.step_size, k), at_step(sampler.noise_std, k)
    for name, value in zip(("step_size", "noise_std"), values, strict=True):
        if isinstance(value, Tensor) and value.numel() > 1:
            raise ValueError(
                f"theory: {name} must be the same for every chain, got {list(value.shape)} values"
            )
    return float(values[0]), float(values[1])


def _check_kernel(sampler: LangevinSampler, grid: Grid, noise_std: float, metropolis: bool) -> None:
    if sampler.noise_order != "after":
        raise ValueError(f'theory: noise_order must be "after", got {sampler.noise_order!r}')
    if isinstance(sampler.grad_clip, Sequence) and sampler.grad_clip[0] == "batch_norm":
        raise ValueError("theory: grad_clip by the batch's norm couples the chains")
    if noise_std < _FINEST * grid.spacing:
        raise ValueError(
            f"theory: noise_std {noise_std:g} needs a grid of n >= "
            f"{_cells(grid, noise_std)}, got n = {grid.n}"
        )
    if grid.atoms != (sampler.clamp is not None and not metropolis) or (
        sampler.clamp is not None and tuple(sampler.clamp) != (grid.lo, grid.hi)
    ):
        raise ValueError(
            "theory: with a clamp the grid must end at its bounds, with atoms there unless "
            f"metropolis=True; without a clamp it must have no atoms; got clamp={sampler.clamp}, "
            f"{grid}"
        )


def _cells(grid: Grid, noise_std: float) -> int | str:
    if noise_std <= 0:
        return "infinity (without noise there is no density)"
    return math.ceil(_FINEST * (grid.hi - grid.lo) / noise_std)


def _module(sampler: LangevinSampler) -> nn.Module:
    if not isinstance(sampler.energy, nn.Module):
        raise TypeError(
            f"theory: sampler.energy must be an nn.Module, got {type(sampler.energy).__name__}"
        )
    return sampler.energy
