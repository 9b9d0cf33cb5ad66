"""MALA against a plain float64 loop, and against the laws that it samples."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl

N, K = 5, 20
SHAPE = (N, 2, 3)
LIMIT = 5.0  # of a z-value


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def quartic(x: Tensor) -> Tensor:
    return (x**4 / 4 - x**2 / 2 + 0.3 * x).flatten(1).sum(1)


def column(value: Any, x: Tensor) -> Any:
    """A coefficient so that it broadcasts over x; floats as they are."""
    chains = isinstance(value, Tensor) and value.ndim == 1
    return value.view(-1, *[1] * (x.ndim - 1)) if chains else value


def clip(grad: Tensor, by: Any) -> Tensor:
    if by is None:
        return grad
    if isinstance(by, float):
        return grad.clamp(-by, by)
    norms = grad.flatten(1).norm(dim=1)
    return grad * column((by[1] / norms).clamp(max=1), grad)


def reference(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    z: Tensor,
    u: Tensor,
    a: Any,
    b: Any,
    grad_clip: Any = None,
    clamp: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[Tensor, Tensor]:
    """The textbook's MALA for exp(-E / T), T = b^2 / (2 a): the last state, and accepted [K, n]."""

    def mean(x: Tensor, a: Any) -> Tensor:
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        return x - column(a, x) * clip(grad, grad_clip)

    def log_q(to: Tensor, at: Tensor, a: Any, b: Any) -> Tensor:
        return -(to - mean(at, a)).square().flatten(1).sum(1) / (2 * b**2)

    taken = []
    for k in range(len(z)):
        ak, bk = (v[k] if isinstance(v, list) or getattr(v, "ndim", 0) == 2 else v for v in (a, b))
        y = mean(x, ak) + column(bk, x) * z[k]
        temperature = bk**2 / (2 * ak)
        ratio = (energy(x) - energy(y)) / temperature + log_q(x, y, ak, bk) - log_q(y, x, ak, bk)
        inside = ((y >= clamp[0]) & (y <= clamp[1])).flatten(1).all(1)
        taken.append((u[k].log() < ratio) & inside)
        x = torch.where(column(taken[-1], x), y, x)
    return x, torch.stack(taken)


def uniforms(seed: int, chains: int, steps: int = K) -> Tensor:
    return torch.stack(
        [fl.noise.uniform((chains,), seed=seed, step=k, stream=3).double() for k in range(steps)]
    )


PER_CHAIN = torch.linspace(0.02, 0.3, N, dtype=torch.float64)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"noise_std": 0.2},
    "element clip": {"grad_clip": 0.4},
    "chain clip": {"grad_clip": ("chain_norm", 0.8)},
    "box": {"clamp": (-1.7, 1.5)},
    "per chain": {"step_size": PER_CHAIN, "noise_std": PER_CHAIN + 0.3},
    "sequence": {"step_size": fl.anneal.geometric(0.4, 0.1, K), "noise_std": [0.5] * K},
    "[K, n]": {"step_size": 0.1 + numbers(K, N).abs() / 5, "noise_std": 0.6},
}


@pytest.mark.parametrize(("case", "maximize"), [(case, i % 2 > 0) for i, case in enumerate(CASES)])
def test_mala_matches_the_textbook_reference(case: str, maximize: bool) -> None:
    settings: dict[str, Any] = {"step_size": 0.25, "noise_std": 0.6} | CASES[case]
    x0, z = numbers(*SHAPE, seed=1).clamp(-0.8, 0.8), numbers(K, *SHAPE, seed=2)
    want, accepted = reference(
        quartic, x0, z, uniforms(7, N), settings["step_size"], settings["noise_std"],
        settings.get("grad_clip"), settings.get("clamp", (-math.inf, math.inf)),
    )  # fmt: skip
    run = fl.LangevinSampler(
        (lambda x: -quartic(x)) if maximize else quartic,
        steps=K, maximize=maximize, metropolis=True, **settings,
    )  # fmt: skip
    found = run.diagnose(x0, seed=7, noise=z)
    assert 0.1 < float(accepted.double().mean()) < 0.95  # the case bites both ways
    assert torch.equal(found.accepted.bool(), accepted)
    for x in (found.x, run(x0, seed=7, noise=z), run.trajectory(x0, seed=7, noise=z)[-1]):
        torch.testing.assert_close(x, want, atol=1e-9, rtol=0)
    assert bool((found.displacement[~accepted] == 0).all())
    assert bool((found.displacement[accepted] > 0).all())
    first = quartic(x0) * (-1 if maximize else 1)
    torch.testing.assert_close(found.energy[0], first)


# Laws: chains that start in the law that they should keep, so that nothing hangs on burn-in. ------


def score_of(values: Tensor, expected: float) -> float:
    """z-value of a mean over independent chains."""
    return float((values.mean() - expected) / values.std() * len(values) ** 0.5)


def test_acceptance_and_moments_on_a_gaussian() -> None:
    """At h = a / variance MALA in two dimensions accepts 1 - sqrt(h^3 / (8 + h^3)) of its steps.

    With |x|^2 - |y|^2 the log ratio's sign, it accepts 2 P(|y| < |x|), and that difference is one
    of two exponentials whose rates are the eigenvalues (h^2 +- sqrt(h^4 + 8 h)) / 2.
    """
    variance, temperature, h, n = 0.7, 1.6, 1.2, 20_000
    a = h * variance
    settings: dict[str, Any] = {
        "steps": 10, "step_size": a, "noise_std": math.sqrt(2 * a * temperature)
    }  # fmt: skip
    energy = fl.GaussianEnergy(variance)
    x0 = math.sqrt(temperature * variance) * numbers(n, 2, seed=3)
    found = fl.LangevinSampler(energy, metropolis=True, **settings).diagnose(x0, seed=1)
    rate = 1 - math.sqrt(h**3 / (8 + h**3))
    assert abs(score_of(found.accepted.mean(0), rate)) < LIMIT
    square = found.x.square().sum(1) / (temperature * variance)
    assert abs(score_of(found.x[:, 0], 0.0)) < LIMIT
    assert abs(score_of(found.x.prod(1), 0.0)) < LIMIT
    assert abs(score_of(square, 2.0)) < LIMIT
    assert abs(score_of(square**2, 8.0)) < LIMIT
    # Without adjustment it is the discrete chain's own variance, T variance / (1 - h / 2).
    plain = fl.LangevinSampler(energy, **settings | {"steps": 60})(x0, seed=1)
    square = plain.square().sum(1) / (temperature * variance)
    assert abs(score_of(square, 2 / (1 - h / 2))) < LIMIT
    assert abs(score_of(square, 2.0)) > 10


def double_well(x: Tensor) -> Tensor:
    return ((x * x - 1).square() + 0.2 * x).flatten(1).sum(1)


def test_acceptance_and_moments_on_a_double_well() -> None:
    """Against integrals over a grid: of the law, and of what a step from it accepts."""
    a, temperature, n = 0.08, 0.6, 20_000
    b = math.sqrt(2 * a * temperature)
    grid = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    law = torch.exp(-double_well(grid[:, None]) / temperature)
    law /= law.sum()
    z = torch.linspace(-6, 6, 601, dtype=torch.float64)
    normal = torch.exp(-z * z / 2)
    normal /= normal.sum()

    def drift(x: Tensor) -> Tensor:
        return x - a * (4 * x * (x * x - 1) + 0.2)

    def energy(x: Tensor) -> Tensor:
        return (x * x - 1) ** 2 + 0.2 * x

    x, y = grid[:, None], drift(grid)[:, None] + b * z
    back = ((x - drift(y)) ** 2 - (b * z) ** 2) / (2 * b * b)
    ratio = (energy(x) - energy(y)) / temperature - back
    rate = float(law @ ratio.exp().clamp(max=1) @ normal)

    u = torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    cdf = law.cumsum(0)
    place = torch.searchsorted(cdf, u).clamp(max=len(grid) - 1)
    x0 = (grid[place] + (grid[1] - grid[0]) * ((u - cdf[place]) / law[place] + 0.5))[:, None]
    settings: dict[str, Any] = {"steps": 25, "step_size": a, "noise_std": b}
    found = fl.LangevinSampler(double_well, metropolis=True, **settings).diagnose(x0, seed=5)
    assert 0.5 < rate < 0.95
    assert abs(score_of(found.accepted.mean(0), rate)) < LIMIT
    end = found.x[:, 0]
    for moment in (lambda x: x, lambda x: x**2, lambda x: x**4, lambda x: (x > 0).double()):
        assert abs(score_of(moment(end), float(law @ moment(grid)))) < LIMIT
    plain = fl.LangevinSampler(double_well, **settings)(x0, seed=5)[:, 0]
    assert abs(score_of(plain**2, float(law @ grid**2))) > 10


def test_clamped_chains_sample_the_truncated_law_without_atoms_at_its_bounds() -> None:
    """exp(-c x) in [0, 1], started from it. Clamped chains have mass on the walls."""
    c, n, a = 2.0, 20_000, 0.05
    settings: dict[str, Any] = dict(
        steps=10, step_size=a, noise_std=math.sqrt(2 * a), clamp=(0.0, 1.0)
    )

    def energy(x: Tensor) -> Tensor:
        return c * x.sum(1)

    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x0 = -torch.log1p(u * math.expm1(-c)) / c
    x = fl.LangevinSampler(energy, metropolis=True, **settings)(x0, seed=8)[:, 0]
    mean = 1 / c - 1 / math.expm1(c)
    assert abs(score_of(x, mean)) < LIMIT
    upper = (1 - math.exp(-c * 0.75)) / (1 - math.exp(-c))
    assert abs(score_of((x < 0.75).double(), upper)) < LIMIT
    assert bool(((x > 0) & (x < 1)).all())
    assert bool((fl.LangevinSampler(energy, **settings)(x0, seed=8) == 0).any())


def test_per_chain_temperatures() -> None:
    """Row i at T_i by noise_std = sqrt(2 a T): the discrete chain's variance, and MALA's T."""
    temperatures = torch.tensor([0.25, 1.0, 4.0]).repeat(3000)
    a = 0.4
    for metropolis, inflation in ((False, 1 / (1 - a / 2)), (True, 1.0)):
        run = fl.LangevinSampler(
            fl.GaussianEnergy(), steps=50, step_size=a, metropolis=metropolis,
            noise_std=(2 * a * temperatures).sqrt(),
        )  # fmt: skip
        x = run(torch.zeros(9000, 2), seed=3).double()
        for t in (0.25, 1.0, 4.0):
            square = x[temperatures == t].square().sum(1) / t
            assert abs(score_of(square, 2 * inflation)) < LIMIT


# Promises ----------------------------------------------------------------------------------------


def mala(energy: Any = quartic, **settings: Any) -> fl.LangevinSampler:
    settings = {"steps": K, "step_size": 0.25, "noise_std": 0.6} | settings
    return fl.LangevinSampler(energy, metropolis=True, **settings)


def test_a_batch_is_its_shards_and_a_chain_its_parts() -> None:
    x0 = numbers(*SHAPE, seed=1)
    whole = mala()(x0, seed=3, first_chain=4)
    parts = [mala()(x0[i:j], seed=3, first_chain=4 + i) for i, j in ((0, 1), (1, 4), (4, 5))]
    assert torch.equal(torch.cat(parts), whole)
    half = mala(steps=8)(x0, seed=3, first_chain=4)
    assert torch.equal(mala(steps=12)(half, seed=3, first_chain=4, first_step=8), whole)
    assert not torch.equal(mala()(x0, seed=3), whole)


def test_one_evaluation_a_step_and_one_before() -> None:
    calls = []

    def energy(x: Tensor) -> Tensor:
        calls.append(len(x))
        return quartic(x)

    mala(energy)(numbers(*SHAPE), seed=0)
    assert calls == [N] * (K + 1)


def make_net() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4)
    ).double()
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(0.5 * numbers(*parameter.shape, seed=100 + i))
    return net


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_short_loop_gives_the_chain_of_the_general_loop(layout: torch.memory_format) -> None:
    x0 = numbers(N, 2, 4, 4).to(memory_format=layout)
    runs = [mala(make_net(), gradient=gradient) for gradient in ("autograd", "explicit")]
    general, lean = (run.diagnose(x0, seed=1) for run in runs)
    assert 0.2 < float(general.accepted.mean()) < 0.95
    assert torch.equal(general.accepted, lean.accepted)
    torch.testing.assert_close(lean.x, general.x, atol=1e-9, rtol=0)
    torch.testing.assert_close(lean.energy, general.energy, atol=1e-9, rtol=0)
    assert lean.x.is_contiguous(memory_format=layout)


def test_the_score_chosen_for_convolutions_is_the_same_chain() -> None:
    """The fused score where there is a compiler, in float32."""
    net = fl.ConvEnergy(channels=1, size=8, width=4)
    x0 = torch.zeros(3, 1, 8, 8)
    names = [mala(net).choose_engine(x0, {}).name, "autograd"]
    runs = [mala(net, gradient=name, step_size=0.5, noise_std=0.05) for name in names]
    found = [run.diagnose(x0, seed=1) for run in runs]
    assert torch.equal(found[0].accepted, found[1].accepted)
    torch.testing.assert_close(found[0].x, found[1].x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_proposals_without_a_finite_energy_are_rejected(value: float) -> None:
    def energy(x: Tensor) -> Tensor:
        return torch.where((x > 0.5).flatten(1).any(1), value, quartic(x))

    found = mala(energy).diagnose(torch.zeros(SHAPE), seed=0)
    assert bool((found.x <= 0.5).all())
    assert bool(found.energy.isfinite().all())
    assert 0 < float(found.accepted.mean()) < 1


def test_a_start_without_an_energy_is_reported() -> None:
    with pytest.raises(FloatingPointError, match="5 of 5 chains"):
        mala(lambda x: quartic(x) * math.nan)(numbers(*SHAPE), seed=0)


def test_one_chain_with_a_scalar_energy() -> None:
    x0 = numbers(1, 2, 3)
    squeezed = mala(lambda x: quartic(x).squeeze())(x0, seed=1)
    assert torch.equal(squeezed, mala()(x0, seed=1))
    assert torch.equal(mala(lambda x: quartic(x)[:, None])(x0, seed=1), squeezed)


def test_a_bf16_module_and_no_trace_of_a_call() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
    net[0].weight.requires_grad_(False)
    before, x0 = copy.deepcopy(net.state_dict()), numbers(N, 6).float()
    kept = x0.clone()
    with pytest.warns(UserWarning, match="BatchNorm"):
        x = mala(net)(x0, seed=0)
    assert x.dtype == torch.float32
    assert not torch.equal(x, x.bfloat16().float())
    assert torch.equal(x0, kept)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    assert net.training


def test_copies_settings_and_explain() -> None:
    run, x0 = mala(), numbers(*SHAPE)
    assert run.settings()["metropolis"] is True
    assert "metropolis=True" in repr(run)
    for other in (copy.deepcopy(run), fl.LangevinSampler(quartic, **run.settings())):
        assert torch.equal(other(x0, seed=0), run(x0, seed=0))
    net = pickle.loads(pickle.dumps(mala(make_net())))
    assert torch.equal(
        net(numbers(1, 2, 4, 4), seed=0), mala(make_net())(numbers(1, 2, 4, 4), seed=0)
    )
    assert "accepted or rejected (MALA)" in run.explain()
    assert "gradients  not through steps that are accepted" in run.explain(x0)


def test_an_empty_batch() -> None:
    assert mala()(torch.zeros(0, 2), seed=0).shape == (0, 2)


WRONG = [
    ({"noise_std": 0.0}, "needs noise_std > 0, got 0"),
    ({"step_size": 0}, "needs step_size > 0, got 0"),
    ({"noise_std": fl.anneal.linear(1.0, K)}, "needs noise_std > 0, got 0"),
    ({"step_size": torch.tensor([0.1, 0.0])}, "needs step_size > 0, got 0"),
    ({"noise_order": "before"}, "needs noise_order \"after\", got 'before'"),
    ({"noise_order": "last"}, 'needs noise_order "after"'),
    ({"grad_clip": ("batch_norm", 1.0)}, '"batch_norm" clip ties them'),
    ({"gradient": "network"}, "a score network has none"),
]


@pytest.mark.parametrize(("settings", "match"), WRONG, ids=[w[1] for w in WRONG])
def test_settings_that_cannot_be_adjusted(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        mala(**settings)


CALLS: list[tuple[dict[str, Any], str]] = [
    ({"differentiable": True}, "differentiable=True is not supported with metropolis=True"),
    ({"step_kwargs": {"scale": [1.0] * K}}, "step_kwargs are not supported with metropolis=True"),
]


@pytest.mark.parametrize(("options", "match"), CALLS, ids=["differentiable", "step_kwargs"])
def test_calls_that_cannot_be_adjusted(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        mala()(numbers(*SHAPE).requires_grad_(), seed=0, **options)


def test_a_start_outside_the_box_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x0 must lie within clamp=\(-1.0, 1.0\)"):
        mala(clamp=(-1.0, 1.0))(torch.full(SHAPE, 1.5), seed=0)
