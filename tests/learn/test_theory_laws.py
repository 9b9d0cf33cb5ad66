"""The paper's theory on toys whose laws are known exactly.

Laws are exact to the rounding of float64 unless a test says otherwise; tests of sampled chains say
how many and reject below p = 1e-5.
"""

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from benchmarks.theory_laws import (
    Grid,
    entropy,
    estimating_equation,
    fit_moments,
    gibbs,
    kl,
    mean_gradient,
    short_run,
    solve,
    stationary,
    temperature,
    transition,
)
from fastlangevin.learn import ShortRunLearner

A, B = 0.02, 0.2  # T = 1
# A tenth to a third of the moves is refused.
MALA = {"metropolis": True, "step_size": 0.1, "noise_std": 0.2**0.5}
LINE = Grid(-4, 4, 80)
FINE_LINE = Grid(-4, 4, 320)
PLANE = Grid(-3, 3, 36, dim=2)


class Polynomial(nn.Module):
    """f = <theta, h>, h = all monomials of degree 1 to ``degree`` in each coordinate, and xy."""

    def __init__(self, degree: int = 4, dim: int = 1, theta: list[float] | None = None) -> None:
        super().__init__()
        self.degree, self.dim = degree, dim
        count = degree * dim + (dim == 2)
        start = torch.zeros(count) if theta is None else torch.tensor(theta)
        self.theta = nn.Parameter(start.double())

    def features(self, x: Tensor) -> Tensor:
        powers = [x[:, i] ** k for i in range(self.dim) for k in range(1, self.degree + 1)]
        return torch.stack(powers + ([x[:, 0] * x[:, 1]] if self.dim == 2 else []), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x.double()) @ self.theta


def mixture(grid: Grid, modes: list[tuple[float, list[float], float]]) -> Tensor:
    """Masses of a mixture of Gaussians (weight, mean, standard deviation)."""
    density = sum(
        w * torch.exp(-(grid.points - torch.tensor(m)).square().sum(1) / (2 * s * s)) / s**grid.dim
        for w, m, s in modes
    )
    assert isinstance(density, Tensor)
    return density / density.sum()


TWO_MODES = [(0.65, [1.0], 0.4), (0.35, [-1.2], 0.3)]
TWO = mixture(LINE, TWO_MODES)
THREE = mixture(PLANE, [(0.4, [1.0, 0.3], 0.4), (0.3, [-0.8, 0.9], 0.3), (0.3, [-0.3, -1.0], 0.4)])
DATA = {"line": (LINE, TWO), "plane": (PLANE, THREE)}


def sampler_of(
    energy: Callable[[Tensor], Tensor], steps: int = 20, **changes
) -> fl.LangevinSampler:
    settings = {"step_size": A, "noise_std": B, "maximize": True} | changes
    return fl.LangevinSampler(energy, steps=steps, **settings)


def double_well(x: Tensor) -> Tensor:
    """An energy, and a rough one: wells at about -1 and 1.2, a bump of period 2 pi / 3."""
    return (x.square() - 1).square().sum(1) - 0.3 * x.sum(1) + 0.2 * torch.sin(3 * x).sum(1)


# The kernel is the step contract's ------------------------------------------------------------


def test_a_row_is_the_steps_density() -> None:
    grid = Grid(-3, 3, 200)
    kernel = transition(sampler_of(double_well, maximize=False, grad_clip=4.0), grid)
    x = grid.points[:, 0]
    slope = 4 * x * (x * x - 1) - 0.3 + 0.6 * torch.cos(3 * x)
    mean = x - A * slope.clamp(-4, 4)
    want = torch.exp(-((x - mean[:, None]) ** 2) / (2 * B * B)) / math.sqrt(2 * math.pi) / B * 0.03
    torch.testing.assert_close(kernel, want, rtol=1e-9, atol=1e-14)


def test_a_clamp_leaves_atoms() -> None:
    """Whole rows: mass beyond a bound is on it, found here by numbers of the error function."""
    grid = Grid(-1, 1, 100, atoms=True)
    kernel = transition(sampler_of(double_well, maximize=False, clamp=(-1, 1)), grid)
    x = grid.points[:, 0]
    mean = x - A * (4 * x * (x * x - 1) - 0.3 + 0.6 * torch.cos(3 * x))
    below = (1 + torch.erf((-1 - mean) / B / math.sqrt(2))) / 2
    torch.testing.assert_close(kernel[:, 0], below, rtol=0, atol=1e-12)
    # The midpoint rule at the ends of an interval: h^2 / 24 times the slopes there, 6 / unit.
    torch.testing.assert_close(kernel.sum(1), torch.ones(102).double(), rtol=0, atol=3e-4)


def test_the_plane_is_two_lines() -> None:
    """An energy that is a sum has a kernel that is a product."""
    line = Grid(-3, 3, 36)
    one = transition(sampler_of(double_well), line)
    both = transition(sampler_of(double_well), PLANE)
    torch.testing.assert_close(both, torch.kron(one, one))


@pytest.mark.parametrize("steps", [1, 7, 200])
def test_a_gaussian_chain_has_the_known_variance(steps: int) -> None:
    """Variance c^2k s + b^2 (1 - c^2k) / (1 - c^2), c = 1 - a / v; and the known stationary one."""
    energy, grid, contraction = fl.GaussianEnergy(0.3), Grid(-6, 6, 240), 1 - A / 0.3
    sampler = sampler_of(energy, steps, maximize=False)
    x = grid.points[:, 0]
    law = short_run(sampler, grid, start=grid.law(-x.square() / 2 / 0.5))[-1]
    shrunk = contraction ** (2 * steps)
    want = shrunk * 0.5 + B * B * (1 - shrunk) / (1 - contraction**2)
    assert float(law @ x.square()) == pytest.approx(want, rel=1e-9)
    known = energy.stationary_variance(A, B)
    still = stationary(transition(sampler, grid))
    assert float(still @ x.square()) == pytest.approx(known, rel=1e-9)
    assert entropy(still, grid) == pytest.approx(math.log(2 * math.pi * math.e * known) / 2)
    assert temperature(sampler) == pytest.approx(1)
    # KL(N(0, s) | N(0, v)), the floor that the unadjusted chain never gets under.
    ratio = known / 0.3
    floor = (ratio - 1 - math.log(ratio)) / 2
    assert kl(still, gibbs(sampler, grid)) == pytest.approx(floor, rel=1e-6)


def p_value(law: Tensor, x: Tensor, grid: Grid, group: int) -> float:
    """Of Pearson's chi square, over blocks of ``group`` cells an axis that expect 20 or more."""
    inside = ((x - grid.lo) / grid.spacing).floor().long()
    if grid.atoms:
        inside = torch.where(x == grid.lo, 0, torch.where(x == grid.hi, grid.n + 1, inside + 1))
    block = (inside.clamp(0, len(grid.axis) - 1) + (group - 1 if grid.atoms else 0)) // group
    axis = (torch.arange(len(grid.axis)) + (group - 1 if grid.atoms else 0)) // group
    index, cells = block[:, 0], axis
    if grid.dim == 2:
        width = int(axis.max()) + 1
        index = block[:, 0] * width + block[:, 1]
        cells = (axis[:, None] * width + axis).flatten()
    size = int(cells.max()) + 1
    expected = law.new_zeros(size).index_add(0, cells, law) * len(x)
    found = torch.bincount(index, minlength=size).double()
    enough = expected >= 20
    expected = torch.cat((expected[enough], expected[~enough].sum()[None] + 1e-9))
    found = torch.cat((found[enough], found[~enough].sum()[None]))
    statistic = ((found - expected).square() / expected.clamp(min=1)).sum()
    degrees = torch.tensor((len(expected) - 1) / 2).double()
    return float(torch.special.gammaincc(degrees, statistic / 2))


@pytest.mark.parametrize(
    ("grid", "changes"),
    [
        (FINE_LINE, {}),
        (FINE_LINE, {"grad_clip": 2.0, "step_size": [0.05] * 5 + [0.02] * 7}),
        (Grid(-1, 1, 160, atoms=True), {"clamp": (-1.0, 1.0)}),
        (Grid(-3, 3, 48, dim=2), {}),
        (FINE_LINE, MALA),
        (FINE_LINE, MALA | {"grad_clip": 2.0}),
        (Grid(-1, 1, 160), MALA | {"clamp": (-1.0, 1.0)}),
        (Grid(-3, 3, 48, dim=2), MALA),
    ],
    ids=[
        "plain",
        "clip and schedule",
        "clamp",
        "plane",
        "adjusted",
        "adjusted, clip",
        "adjusted, clamp",
        "adjusted, plane",
    ],
)
def test_sampled_chains_follow_the_law(grid: Grid, changes: dict) -> None:
    """N = 40,000 chains of 12 steps."""
    sampler = sampler_of(double_well, 12, maximize=False, **changes)
    law = short_run(sampler, grid)[-1]
    x0 = 2 * fl.noise.uniform((40_000, grid.dim), seed=5, step=0) - 1
    x = sampler(x0, seed=5)
    assert p_value(law, x, grid, 8 if grid.dim == 1 else 2) >= 1e-5


def test_one_percent_of_the_noise_would_be_seen() -> None:
    """N = 1,000,000 chains of one step, from one point."""
    grid = Grid(-1, 2, 300)
    x = sampler_of(double_well, 1, maximize=False)(torch.full((1_000_000, 1), 0.505), seed=6)
    start = torch.zeros(300).double()
    start[150] = 1
    p_values = [
        p_value(short_run(sampler_of(double_well, 1, noise_std=b, maximize=False), grid, start)[-1],
                x, grid, 6)
        for b in (B, 1.01 * B)
    ]  # fmt: skip
    assert p_values[0] >= 1e-5
    assert p_values[1] < 1e-5


# The estimating equation ----------------------------------------------------------------------


@functools.cache
def solved(name: str, steps: int) -> tuple[Polynomial, Tensor, Tensor, Tensor]:
    """(energy, q, p_theta, p_MLE) at the learner's fixed point."""
    grid, data = DATA[name]
    energy = Polynomial(4, grid.dim)
    sampler = sampler_of(energy, steps)
    q = solve(sampler, grid, grid.points, data)
    h = energy.features(grid.points)
    return energy, q, gibbs(sampler, grid), fit_moments(h, data @ h, grid)[0]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("line", 20),
        pytest.param("line", 80, marks=pytest.mark.slow),
        pytest.param("plane", 10, marks=pytest.mark.slow),
    ],
)
def test_generalised_moment_matching(name: str, steps: int) -> None:
    """q has the data's moments though p_theta has not; both identities, each side by itself."""
    grid, data = DATA[name]
    energy, q, p, mle = solved(name, steps)
    h = energy.features(grid.points)
    assert (q @ h - data @ h).abs().max() < 1e-8
    assert (mle @ h - data @ h).abs().max() < 1e-8
    assert (p @ h - data @ h).abs().max() > 0.01
    assert kl(q, p) == pytest.approx(kl(q, mle) + kl(mle, p), abs=1e-8)
    assert kl(q, mle) == pytest.approx(entropy(mle, grid) - entropy(q, grid), abs=1e-8)
    assert min(kl(q, mle), kl(mle, p)) > 1e-4
    # Of the data's negative log likelihoods under the family, p_MLE's is the least.
    assert kl(data, mle) < kl(data, p)


def test_another_law_with_the_moments_has_less_entropy() -> None:
    """The data themselves lie in Omega: KL(data | p_MLE) = H(p_MLE) - H(data)."""
    h = Polynomial(4).features(LINE.points)
    mle, theta = fit_moments(h, TWO @ h, LINE)
    assert kl(TWO, mle) == pytest.approx(entropy(mle, LINE) - entropy(TWO, LINE), abs=1e-9)
    torch.testing.assert_close(mle, LINE.law(h @ theta))
    assert entropy(mle, LINE) > entropy(TWO, LINE) + 0.01


class Network(nn.Module):
    """A small smooth net: f is not linear in its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        with torch.no_grad():
            self.layers[0].weight.copy_(torch.tensor([[1.5], [1.0]]))
            self.layers[0].bias.copy_(torch.tensor([1.0, -1.0]))
            self.layers[2].weight.copy_(torch.tensor([[-0.5, 0.5]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.double()).flatten() - x.double().square().flatten() / 2


@pytest.mark.slow
def test_a_nonlinear_energy_reaches_the_estimating_equation() -> None:
    """E_data[df / dtheta] = E_q[df / dtheta] for every weight and bias, where f is not linear.

    Algorithm 1 with exact expectations comes near, Newton's method ends it: the energy's moments
    are of order 1, their differences 1e-5.
    """
    energy, grid = Network(), Grid(-4, 4, 80)
    data, sampler = mixture(grid, TWO_MODES), sampler_of(energy, 20)
    parameters = list(energy.parameters())
    adam = torch.optim.Adam(parameters, lr=0.05)
    for i in range(300):
        gap, _ = estimating_equation(sampler, grid, grid.points, data)
        if i == 0:
            assert gap.abs().max() > 0.1
        for p, grad in zip(parameters, (-gap).split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
        adam.step()
    q = solve(sampler, grid, grid.points, data, tolerance=1e-5)
    gap = mean_gradient(energy, grid.points, data) - mean_gradient(energy, grid.points, q)
    assert gap.abs().max() <= 1e-5
    torch.testing.assert_close(q, short_run(sampler, grid)[-1])
    assert mean_gradient(energy, grid.points, data).abs().max() > 0.1
    assert kl(data, q) > 0.01  # the moments agree, the laws do not


def test_the_learner_stands_still_at_the_fixed_point() -> None:
    """N = 100,000 chains: their moments are the data's, within 5 standard errors."""
    energy = solved("line", 20)[0]
    x0 = 2 * fl.noise.uniform((100_000, 1), seed=7, step=0) - 1
    h = energy.features(sampler_of(energy, 20)(x0, seed=7).double())
    z = (h.mean(0) - TWO @ energy.features(LINE.points)) / h.std(0) * 100_000**0.5
    assert z.abs().max() <= 5


def test_the_learner_converges_to_the_solved_law() -> None:
    """ShortRunLearner from theta = 0 ends at solve's law, up to the noise of its last batches."""
    energy, exact = Polynomial(2), Polynomial(2)
    data = torch.tensor([[-1.0], [0.5], [1.5], [0.3]])
    sampler = sampler_of(energy, 10)
    learner = ShortRunLearner(sampler, data, batch_size=2048, data_noise=0.0, lr=0.05)
    for i in range(100):
        learner.lr = 0.05 if i < 70 else 0.005
        learner.step()
    quarter = torch.full((4,), 0.25).double()
    q = solve(sampler_of(exact, 10), LINE, data.double(), quarter)
    gap, law = estimating_equation(sampler, LINE, data.double(), quarter)
    # A batch's moments scatter by 1 / sqrt(2048) = 0.02; Adam averages over some of them.
    assert gap.abs().max() < 0.03
    assert kl(q, law) < 1e-3
    assert kl(q, LINE.law(torch.zeros(80))) > 0.3


@pytest.mark.slow
def test_the_docs_table_is_what_its_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/theory.md says what its command prints; here for K = 5."""
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(str(root))
    script = importlib.import_module("benchmarks.theory")
    data = script.mixture(script.LINE, [(0.65, (1.0,), 0.4), (0.35, (-1.2,), 0.3)])
    ((steps, found),) = script.learned(script.LINE, data, [5]).items()
    now = script.row(steps, script.LINE, data, *found)
    (line,) = [row for row in (root / "docs" / "theory.md").read_text().splitlines()
               if row.startswith("| 5 |")]  # fmt: skip
    written = [cell.strip() for cell in line.strip("|").split("|")]
    assert [float(v) for v in now[2:]] == pytest.approx([float(v) for v in written[2:]], abs=2e-6)


# What K steps bring ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "step_size"),
    [(Grid(-3, 3, 150), 0.02), (PLANE, 0.1)],
    ids=["line", "plane"],
)
def test_adjusted_chains_never_move_away_from_the_energys_law(grid: Grid, step_size: float) -> None:
    """Detailed balance; KL(p_K | p_theta) falls at every step, from any start."""
    noise_std = math.sqrt(2 * step_size)
    changes = {"step_size": step_size, "noise_std": noise_std, "metropolis": True}
    sampler = sampler_of(double_well, 50, maximize=False, **changes)
    kernel, p = transition(sampler, grid), gibbs(sampler, grid)
    flow = p[:, None] * kernel
    torch.testing.assert_close(flow, flow.T, rtol=1e-9, atol=1e-18)
    assert (kernel.diagonal() >= 0).all()
    torch.testing.assert_close(kernel.sum(1), torch.ones_like(p))
    for start in (None, grid.law(-(grid.points - 1).square().sum(1) / 0.1)):
        laws = short_run(sampler, grid, start)
        falls = torch.tensor([kl(law, p) for law in laws]).diff()
        assert (falls <= 1e-13).all()
        assert falls[0] < -1e-3


def test_unadjusted_chains_move_away_from_the_energys_law() -> None:
    """Started at p_theta itself KL(p_K | p_theta) rises, to the value at the chain's own law."""
    grid = Grid(-3, 3, 150)
    sampler = sampler_of(double_well, 200, step_size=0.06, noise_std=0.12**0.5, maximize=False)
    kernel, p = transition(sampler, grid), gibbs(sampler, grid)
    still = stationary(kernel)
    torch.testing.assert_close(still @ kernel, still)
    laws = short_run(sampler, grid, start=p)
    away = [kl(law, p) for law in laws]
    assert away[0] == pytest.approx(0, abs=1e-12)
    assert away[1] > 1e-4
    assert max(away) > 0.005
    assert away[-1] == pytest.approx(kl(still, p), rel=1e-3)
    # To its own stationary law any chain only comes closer.
    home = torch.tensor([kl(law, still) for law in laws]).diff()
    assert (home <= 1e-13).all()


def test_the_bias_is_of_the_first_order_in_the_step() -> None:
    """Half the step, at one T: the stationary laws' KL is a quarter, the square of the bias."""
    grid = Grid(-3, 3, 240)
    floors = []
    for a in (0.02, 0.01, 0.005):
        sampler = sampler_of(double_well, step_size=a, noise_std=(2 * a) ** 0.5, maximize=False)
        floors.append(kl(stationary(transition(sampler, grid)), gibbs(sampler, grid)))
    assert floors[0] / floors[1] == pytest.approx(4, rel=0.25)
    assert floors[1] / floors[2] == pytest.approx(4, rel=0.15)


# What cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_std": 0.01}, r"noise_std 0\.01 needs a grid of n >= 600, got n = 80"),
        ({"noise_std": 0.0}, "without noise there is no density"),
        ({"noise_order": "last"}, 'noise_order must be "after"'),
        ({"grad_clip": ("batch_norm", 1.0)}, "batch's norm couples"),
        ({"clamp": (-1.0, 1.0)}, "with a clamp the grid must end at its bounds, with atoms"),
        ({"noise_std": torch.full((3,), 0.2)}, "noise_std must be the same for every chain"),
    ],
)
def test_chains_without_a_transition_density_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transition(sampler_of(double_well, **changes), LINE)


def test_wrong_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="finite lo < hi, got 1, 1"):
        Grid(1, 1, 5)
    with pytest.raises(ValueError, match="dim must be 1 or 2, got 3"):
        Grid(0, 1, 5, dim=3)
    with pytest.raises(
        ValueError, match=r"bounds between two of the cells, 0\.25 wide .* got 0\.1"
    ):
        Grid(-4, 4, 32).uniform(0.1, 1)
    clamped = sampler_of(double_well, clamp=(-1.0, 1.0))
    with pytest.raises(ValueError, match="with atoms there unless metropolis=True"):
        transition(clamped, Grid(-1, 1, 40, atoms=True), metropolis=True)


def test_moments_that_no_law_has_are_refused() -> None:
    """A variance below 0; and a learner that cannot make such data, whose weights stay."""
    x = LINE.points[:, 0]
    features = torch.stack([x, x * x], 1)
    with pytest.raises(ValueError, match="no law on the grid has the moments"):
        fit_moments(features, torch.tensor([1.0, 0.5]).double(), LINE)
    energy = Polynomial(1, theta=[0.25])
    with pytest.raises(ValueError, match="no fixed point found in 3 iterations"):
        solve(sampler_of(energy, 2), LINE, x[:, None] + 30, TWO, iterations=3, tolerance=0)
    assert energy.theta.tolist() == [0.25]
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        solve(sampler_of(double_well), LINE, LINE.points, TWO)
