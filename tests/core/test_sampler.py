"""LangevinSampler against a loop in plain torch, and the promises of a call."""

import copy
import functools
import itertools
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.kernels import extension
from fastlangevin.step import backend_status, choose_backend

N, K = 4, 5
SHAPE = (N, 2, 5, 3)
A, B = 0.3, 0.2
ORDERS = ["after", "before", "last"]
# With the net below these clips and this clamp act on some elements or chains and spare others:
# test_the_cases_bite holds them to it.
CLIPS = [None, 0.4, ("chain_norm", 1.9), ("batch_norm", 2.0)]
CLAMPS = [None, (-0.9, 0.8)]
GRID = [
    {"noise_order": order, "clamp": clamp, "grad_clip": clip}
    for order, clamp, clip in itertools.product(ORDERS, CLAMPS, CLIPS)
]


needs_extension = pytest.mark.skipif(extension.library is None, reason="the extension is not built")


def numbers(shape: tuple, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_net(activation: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small conv net [n, 2, 5, 3] -> [n, 1] with the same weights in every test."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), activation, nn.Flatten(), nn.Linear(60, 1)
    ).to(dtype)
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(0.5 * numbers(parameter.shape, dtype, 100 + i))
    return net


@pytest.fixture
def net() -> nn.Sequential:
    return make_net(nn.Tanh())


@pytest.fixture
def x0() -> Tensor:
    return 0.7 * numbers(SHAPE)


def double_well(x: Tensor, depth: float | Tensor = 1.0) -> Tensor:
    """(x^2 - 1)^2 in products alone: the same bits wherever an element lies in a batch."""
    return (depth * (x * x - 1).square()).flatten(1).sum(1)


def plain_clip(grad: Tensor, clip: Any) -> Tensor:
    if clip is None:
        return grad
    if not isinstance(clip, tuple):
        return grad.clamp(-clip, clip)
    kind, bound = clip
    if kind == "batch_norm":
        return grad * (bound / grad.square().sum().sqrt()).clamp(max=1)
    norms = grad.square().flatten(1).sum(1).sqrt()
    return grad * (bound / norms).clamp(max=1).view(-1, *[1] * (grad.ndim - 1))


def plain_chain(
    energy: Callable[..., Tensor],
    x: Tensor,
    z: Tensor,
    *,
    step_size: Any = A,
    noise_std: Any = B,
    maximize: bool = False,
    clamp: tuple[float, float] | None = None,
    grad_clip: Any = None,
    noise_order: str = "after",
    detached: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """The loop that people write, z [K, n, ...] given; coefficients broadcast over x or are lists.

    Yields every step's state, energy and gradient. ``detached=False`` keeps the graph of it all.
    """
    lo, hi = clamp or (-math.inf, math.inf)
    for k in range(len(z)):
        a = step_size[k] if isinstance(step_size, list) else step_size
        b = noise_std[k] if isinstance(noise_std, list) else noise_std
        kick = b * z[k]
        if noise_order == "before":
            x = (x + kick).clamp(lo, hi)
        if detached or not x.requires_grad:
            x = x.detach().requires_grad_()
        energies = energy(x).flatten()
        (raw,) = torch.autograd.grad(energies.sum(), x, create_graph=not detached)
        grad = plain_clip(raw, grad_clip)
        moved = x + a * grad if maximize else x - a * grad
        if noise_order == "after":
            x = (moved + kick).clamp(lo, hi)
        elif noise_order == "last":
            x = moved.clamp(lo, hi) + kick
        else:
            x = moved.clamp(lo, hi)
        if detached:
            x = x.detach()
        yield {"x": x, "energy": energies, "grad": raw}


def last(chain: Iterator[dict[str, Tensor]]) -> Tensor:
    *_, step = chain
    return step["x"]


def sampler(energy: Any, **options: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy, **{"steps": K, "step_size": A, "noise_std": B} | options)


def contract_noise(shape: tuple, seed: int, steps: int = K, **first: int) -> Tensor:
    """z of every step in float64: test_noise.py holds these to the contract."""
    first_step, first_chain = first.get("first_step", 0), first.get("first_chain", 0)
    address = {"seed": seed, "first_chain": first_chain, "dtype": torch.float64}
    return torch.stack(
        [fl.noise.normal(shape, step=first_step + k, **address) for k in range(steps)]
    )


# Against the plain loop --------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("options", GRID, ids=str)
def test_every_option(net: nn.Module, x0: Tensor, options: dict, maximize: bool) -> None:
    """With supplied noise, and with the contract's."""
    options = options | {"maximize": maximize}
    z = numbers((K, *SHAPE), seed=1)
    run = sampler(net, **options)
    assert torch.allclose(run(x0, noise=z), last(plain_chain(net, x0, z, **options)), atol=1e-12)
    first = {"first_chain": 1000, "first_step": 2000}
    z = contract_noise(SHAPE, seed=7, **first)
    want = last(plain_chain(net, x0, z, **options))
    assert torch.allclose(run(x0, seed=7, **first), want, atol=1e-12)


def test_the_cases_bite(net: nn.Module, x0: Tensor) -> None:
    """Orders, clamp, clips and sign all change the chain, so that the test above can fail."""
    z = numbers((K, *SHAPE), seed=1)
    variants = [{"noise_order": order, "clamp": CLAMPS[1]} for order in ORDERS]
    variants += [{"grad_clip": clip} for clip in CLIPS] + [{"maximize": True}]
    ends = [last(plain_chain(net, x0, z, **options)) for options in variants]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(ends) for b in ends[:i])
    grads = [step["grad"] for step in plain_chain(net, x0, z)]
    norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads])
    assert norms.min() < CLIPS[2][1] < norms.max()
    assert grads[0].abs().min() < CLIPS[1] < grads[0].abs().max()


SCHEDULES = {
    "float": lambda: 0.3,
    "integer": lambda: 1,
    "0-d tensor": lambda: torch.tensor(0.3),
    "list": lambda: [0.1, 0.0, 0.5, 0.2, 0.4],
    "tuple": lambda: (0.1, 0.0, 0.5, 0.2, 0.4),
    "numpy": lambda: np.linspace(0, 0.5, K),
    "[n]": lambda: torch.linspace(0, 0.6, N),
    "[K, n]": lambda: torch.linspace(0, 0.6, K * N, dtype=torch.float64).view(K, N),
    "[K, 1]": lambda: torch.linspace(0, 0.6, K, dtype=torch.float64).view(K, 1),
}


def spelled_out(schedule: Any) -> list[Tensor]:
    """A schedule as K tensors that broadcast over [n, 2, 5, 3]."""
    if isinstance(schedule, Tensor) and schedule.ndim > 0:
        rows = schedule if schedule.ndim == 2 else schedule[None].expand(K, -1)
    else:
        rows = torch.as_tensor(schedule, dtype=torch.float64).expand(K)[:, None]
    return [row.double().view(-1, 1, 1, 1) for row in rows]


@pytest.mark.parametrize("noise_order", ORDERS)
@pytest.mark.parametrize("form", SCHEDULES)
@pytest.mark.parametrize("name", ["step_size", "noise_std"])
def test_schedules(net: nn.Module, x0: Tensor, name: str, form: str, noise_order: str) -> None:
    schedule, z = SCHEDULES[form](), numbers((K, *SHAPE), seed=1)
    got = sampler(net, **{name: schedule}, noise_order=noise_order)(x0, noise=z)
    plain = {name: spelled_out(schedule)}
    want = last(plain_chain(net, x0, z, **plain, noise_order=noise_order))
    assert torch.allclose(got, want, atol=1e-12)


def test_one_sampler_serves_several_batch_sizes(net: nn.Module) -> None:
    run = sampler(net, step_size=torch.linspace(0.1, 0.5, K, dtype=torch.float64).view(K, 1))
    for n in (1, 3):
        z, x = numbers((K, n, *SHAPE[1:]), seed=1), numbers((n, *SHAPE[1:]))
        want = last(plain_chain(net, x, z, step_size=spelled_out(run.step_size)))
        assert torch.allclose(run(x, noise=z), want, atol=1e-12)


@pytest.mark.parametrize("noise_order", ORDERS)
def test_without_noise_it_is_gradient_descent_exactly(noise_order: str) -> None:
    x = x0 = 0.3 * numbers((3, 37), torch.float32)
    for _ in range(K):
        x = x - 0.0625 * (4 * x * (x * x - 1))
    run = sampler(double_well, step_size=0.0625, noise_std=0, noise_order=noise_order)
    ends = [run(x0, seed=seed) for seed in (0, 1)]
    assert torch.equal(*ends)
    assert torch.allclose(ends[0], x, atol=1e-6)


def test_the_papers_defaults(net: nn.Module, x0: Tensor) -> None:
    run = fl.LangevinSampler(net)
    z = contract_noise(SHAPE, seed=3, steps=100)
    want = last(plain_chain(net, x0, z, step_size=1.0, noise_std=0.01))
    assert torch.allclose(run(x0, seed=3), want, atol=1e-11)


# States and energies -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.clone(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: torch.cat((x, x), 3)[..., 3:],
        lambda x: x[:1].expand(N, -1, -1, -1),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["contiguous", "channels_last", "sliced", "expanded", "requires grad"],
)
@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose"])
def test_x0_is_read_only(layout: Callable, method: str) -> None:
    x0 = layout(numbers(SHAPE, torch.float32))
    before, flag = x0.detach().clone(), x0.requires_grad
    got = getattr(sampler(double_well, step_size=0.01), method)(x0, seed=0)
    assert torch.equal(x0.detach(), before)
    assert x0.requires_grad == flag
    assert x0.grad is None
    x = {"__call__": got, "trajectory": got[-1], "diagnose": got[0]}[method]
    want = sampler(double_well, step_size=0.01)(before.contiguous(), seed=0)
    assert torch.equal(x, want)
    assert not x.requires_grad
    assert x.data_ptr() != x0.data_ptr()


def test_the_memory_format_is_kept(net: nn.Module, x0: Tensor) -> None:
    z = numbers((K, *SHAPE), seed=1)
    got = sampler(net)(x0.to(memory_format=torch.channels_last), noise=z)
    assert got.stride() == x0.to(memory_format=torch.channels_last).stride() != x0.stride()
    assert torch.allclose(got, last(plain_chain(net, x0, z)), atol=1e-12)


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("network", [torch.bfloat16, torch.float32, torch.float64])
def test_the_state_is_float32_or_wider(state: torch.dtype, network: torch.dtype) -> None:
    """Steps far below bfloat16's resolution add up: the state is not kept in it."""
    energy = nn.Linear(3, 1, bias=False, dtype=network)
    energy.weight.data.fill_(1.0)
    x0 = torch.ones(N, 3, dtype=state)
    got = sampler(energy, steps=64, step_size=2**-12, noise_std=0)(x0, seed=0)
    assert got.dtype == (torch.float64 if state == torch.float64 else torch.float32)
    assert torch.equal(got, torch.full_like(got, 1 - 64 * 2**-12))


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("n", [1, 2, N])
def test_energy_output_shapes(net: nn.Module, x0: Tensor, n: int, shape: tuple) -> None:
    want = sampler(net, gradient="autograd")(x0[:n], seed=0)
    assert torch.equal(sampler(lambda x: net(x).view(shape))(x0[:n], seed=0), want)


def test_one_chain_may_have_a_scalar_energy(net: nn.Module, x0: Tensor) -> None:
    want = sampler(net, gradient="autograd")(x0[:1], seed=0)
    assert torch.equal(sampler(lambda x: net(x).sum())(x0[:1], seed=0), want)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (3, 2, 2, 2, 2)], ids=str)
def test_states_of_any_rank(shape: tuple) -> None:
    def energy(x: Tensor) -> Tensor:
        return (x * x - 1).square().reshape(len(x), -1).sum(1)

    x0, z = numbers(shape), numbers((K, *shape), seed=1)
    want = last(plain_chain(energy, x0, z, step_size=0.05))
    assert torch.allclose(sampler(energy, step_size=0.05)(x0, noise=z), want, atol=1e-12)


class Conditional(nn.Module):
    """E(x, y) with a class embedding; ``tempered`` is the same energy as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net(nn.Tanh())
        self.label = nn.Embedding(10, 30, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor | int = 0, scale: float = 1.0) -> Tensor:
        labels = self.label(torch.as_tensor(y).expand(len(x)))
        return scale * (self.net(x)[:, 0] + (labels * x.flatten(1)).sum(1))

    def tempered(self, x: Tensor, y: Tensor) -> Tensor:
        return self(x, y, scale=0.5)


LABELS = torch.tensor([3, 1, 4, 1])


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose", "differentiable"])
def test_conditional_energies(x0: Tensor, method: str) -> None:
    model, z = Conditional(), numbers((K, *SHAPE), seed=1)
    want = last(plain_chain(lambda x: model(x, LABELS, 0.7), x0, z))
    options = {"noise": z, "y": LABELS, "scale": 0.7}
    if method == "differentiable":
        got = sampler(model)(x0, **options, differentiable=True)
    else:
        got = getattr(sampler(model), method)(x0, **options)
    x = {"trajectory": lambda: got[-1], "diagnose": lambda: got.x}.get(method, lambda: got)()
    assert torch.allclose(x, want, atol=1e-12)


@pytest.mark.parametrize(
    ("wrap", "scale"),
    [
        (lambda model: lambda x: model(x, LABELS), 1.0),
        (lambda model: functools.partial(model, y=LABELS, scale=0.7), 0.7),
        (lambda model: functools.partial(functools.partial(model, y=LABELS), scale=0.7), 0.7),
        (lambda model: functools.partial(model.tempered, y=LABELS), 0.5),
        (lambda model: model.forward, 1.0),
    ],
    ids=["lambda", "partial", "partial of partial", "partial of method", "bound method"],
)
def test_callables_of_all_kinds(x0: Tensor, wrap: Callable, scale: float) -> None:
    model, z = Conditional(), numbers((K, *SHAPE), seed=1)
    energy = wrap(model)
    y = 0 if energy == model.forward else LABELS
    want = last(plain_chain(lambda x: model(x, y, scale), x0, z))
    assert torch.allclose(sampler(energy)(x0, noise=z), want, atol=1e-12)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0,), (3, 0)], ids=str)
def test_empty_batches(shape: tuple, differentiable: bool) -> None:
    run = sampler(fl.GaussianEnergy())
    got = run(torch.zeros(shape), seed=0, differentiable=differentiable)
    assert got.shape == shape
    assert run.trajectory(torch.zeros(shape), seed=0).shape == (1 + K, *shape)
    assert run.diagnose(torch.zeros(shape), seed=0).energy.shape == (K, shape[0])
    assert sampler(fl.ConvEnergy(size=8, width=1))(n=0, seed=0).shape == (0, 3, 8, 8)


# Seeds, starts, shards and resumed chains, bit for bit -------------------------------------------


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose"])
@pytest.mark.parametrize("by", ["default generator", "generator"])
def test_a_missing_seed_is_one_draw_of_the_generator(by: str, method: str) -> None:
    x0, run = torch.zeros(3, 5), sampler(fl.GaussianEnergy())

    def sample() -> Tensor:
        options = {} if by == "default generator" else {"generator": generator}
        got = getattr(run, method)(x0, **options)
        return got if isinstance(got, Tensor) else got.x

    generator = torch.Generator()
    first = torch.default_generator if by == "default generator" else generator
    first.manual_seed(3)
    one, two = sample(), sample()
    after = first.get_state()
    first.manual_seed(3)
    assert torch.equal(sample(), one)
    assert torch.equal(sample(), two)
    assert (one == two).double().mean() < 0.5
    first.manual_seed(3)
    seeds = fl.noise.draw_seed(first), fl.noise.draw_seed(first)
    assert torch.equal(first.get_state(), after)
    if method == "__call__":
        assert torch.equal(run(x0, seed=seeds[0]), one)
        assert torch.equal(run(x0, seed=seeds[1]), two)


def test_a_generator_leaves_the_default_one_alone() -> None:
    before = torch.get_rng_state()
    sampler(fl.GaussianEnergy())(torch.zeros(3, 5), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, np.int64(12), np.uint64(2**63)], ids=repr)
def test_legal_seeds(x0: Tensor, net: nn.Module, seed: Any) -> None:
    want = last(plain_chain(net, x0, contract_noise(SHAPE, int(seed))))
    assert torch.allclose(sampler(net)(x0, seed=seed), want, atol=1e-12)


@pytest.mark.parametrize("first_chain", [0, 5])
@pytest.mark.parametrize("method", ["__call__", "trajectory"])
def test_chains_from_the_papers_p0(method: str, first_chain: int) -> None:
    """x0 = 2 u - 1 from the seed's own stream of initial states."""
    energy = fl.ConvEnergy(channels=1, size=8, width=2)
    u = fl.noise.uniform((6, 1, 8, 8), seed=9, step=0, stream=1, first_chain=first_chain)
    options = {"seed": 9, "first_chain": first_chain}
    run = getattr(sampler(energy), method)
    got, want = run(n=6, **options), run(2 * u - 1, **options)
    assert torch.equal(got, want)
    if method == "trajectory":
        assert torch.equal(got[0], 2 * u - 1)
    assert got.dtype == torch.float32


OPTIONS = [
    {},
    {"noise_order": "before", "clamp": (-0.9, 0.8)},
    {"noise_order": "last", "clamp": (-0.9, 0.8), "grad_clip": 0.4},
    {"grad_clip": ("chain_norm", 5.0), "maximize": True, "clamp": (-1.0, 1.0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_is_its_shards(options: dict) -> None:
    run = sampler(double_well, steps=7, step_size=0.02, **options)
    x0 = numbers((64, 3, 5, 7), torch.float32)
    whole = run(x0, seed=4, first_chain=32)
    parts = [run(x0[i : i + 16], seed=4, first_chain=32 + i) for i in range(0, 64, 16)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_chain_is_its_parts(options: dict) -> None:
    """100 steps are 60 and then 40 more."""
    run = functools.partial(sampler, double_well, step_size=0.02, **options)
    x0 = numbers((N, 3, 5, 7), torch.float32)
    whole = run(steps=100)(x0, seed=4, first_step=10)
    part = run(steps=60)(x0, seed=4, first_step=10)
    assert torch.equal(run(steps=40)(part, seed=4, first_step=70), whole)


@pytest.mark.parametrize("spectral", [False, True], ids=["", "spectral norm"])
def test_a_chain_is_its_parts_in_train_mode(x0: Tensor, spectral: bool) -> None:
    """Batch statistics, dropout and power iteration, too, do not remember where a run was cut."""
    energy = everything(spectral=spectral)
    run = functools.partial(sampler, energy, step_size=0.02)
    whole, part = run(steps=10)(x0, seed=4), run(steps=6)(x0, seed=4)
    assert torch.equal(run(steps=4)(part, seed=4, first_step=6), whole)


@pytest.mark.parametrize("spectral", [False, True], ids=["", "spectral norm"])
@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_the_same_numbers_with_and_without_a_graph(
    x0: Tensor, checkpoint: str, spectral: bool
) -> None:
    run = sampler(everything(spectral=spectral), step_size=0.02)
    got = run(x0, seed=4, differentiable=True, checkpoint=checkpoint)
    assert torch.allclose(got, run(x0, seed=4), rtol=0, atol=1e-12)


# trajectory and diagnose -------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "kept"), [(1, 6), (2, 3), (3, 2), (5, 2), (6, 1), (100, 1)])
def test_trajectory(net: nn.Module, x0: Tensor, every: int, kept: int) -> None:
    z = numbers((K, *SHAPE), seed=1)
    states = [x0, *(step["x"] for step in plain_chain(net, x0, z))]
    got = sampler(net).trajectory(x0, noise=z, every=every)
    assert got.shape == (kept, *SHAPE)
    assert torch.equal(got[0], x0)
    assert torch.allclose(got, torch.stack(states[::every]), atol=1e-12)
    assert (K % every != 0) or torch.equal(got[-1], sampler(net)(x0, noise=z))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_diagnose(net: nn.Module, x0: Tensor, options: dict) -> None:
    z = numbers((K, *SHAPE), seed=1)
    steps = list(plain_chain(net, x0, z, **options))
    states = torch.stack([x0, *(step["x"] for step in steps)])
    lo, hi = options.get("clamp", (-1.0, 1.0))
    want = fl.Diagnostics(
        x=states[-1],
        energy=torch.stack([step["energy"] for step in steps]),
        grad_norm=torch.stack([step["grad"].flatten(1).norm(dim=1) for step in steps]),
        displacement=(states[1:] - states[:-1]).flatten(2).norm(dim=2),
        saturation=((states[1:] <= lo) | (states[1:] >= hi)).double().flatten(2).mean(2),
        accepted=torch.ones(K, N, dtype=torch.float64),
    )
    got = sampler(net, **options).diagnose(x0, noise=z)
    for name, value in want._asdict().items():
        assert torch.allclose(getattr(got, name), value, atol=1e-12), name
    assert want.saturation.max() > 0


def test_diagnose_reports_where_a_chain_is_lost() -> None:
    run = sampler(lambda x: x.pow(6).sum(1), steps=12, step_size=1.0, noise_std=0)
    stats = run.diagnose(torch.tensor([[0.1], [3.0]]), seed=0)
    lost = ~torch.isfinite(stats.displacement)
    assert not lost[:, 0].any()
    assert 0 < int(lost[:, 1].int().argmax()) < 11
    with pytest.raises(FloatingPointError, match="1 of 2 chains"):
        run(torch.tensor([[0.1], [3.0]]), seed=0)


def test_explain_says_what_runs() -> None:
    run = sampler(fl.GaussianEnergy(), noise_order="last", maximize=True, precision="bf16")
    text = run.explain(torch.zeros(4, 3, 32, 32))
    serving = choose_backend("auto", torch.device("cpu"))
    words = [f"{K} steps", "after the clamp", "ascending", "bf16", f"{serving} on cpu"]
    for word in [*words, "[4, 3, 32, 32]"]:
        assert word in text
    for name, reason in backend_status(torch.device("cpu")).items():
        assert reason is None or f"{name}: {reason}" in text
    assert "descending" in sampler(fl.GaussianEnergy()).explain()


# The score ---------------------------------------------------------------------------------------


def test_auto_takes_the_fastest_score_and_says_why_not_another(net: nn.Module, x0: Tensor) -> None:
    run = sampler(net)
    text = run.explain(x0)
    assert "gradient   explicit" in text
    assert "not fused: " in text
    assert "autograd" in sampler(net, gradient="autograd").explain(x0)
    text = sampler(everything()).explain(x0)
    assert "gradient   autograd" in text
    assert "not fused, explicit: BatchNorm2d '1' is in train mode" in text
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert 'precision="bf16" needs no autocast' in run.explain(x0)


@needs_extension
def test_auto_takes_the_native_kernels_for_a_stack_of_convolutions() -> None:
    assert "gradient   fused" in sampler(fl.ConvEnergy(size=8, width=1)).explain()
    x0 = numbers((5, 3, 8, 8), torch.float32)
    text = sampler(fl.ConvEnergy(size=8, width=4)).explain(x0)
    # 3x3 on 64 pixels, 3 to 4 channels; 4x4 on 16, 4 to 8: a multiply-add is two, both ways.
    assert f"work       {5 * 4 * (64 * 27 * 4 + 16 * 64 * 8) / 1e9:.3g} GFLOP a step" in text
    assert "MiB held by the engine" in text


@needs_extension
@pytest.mark.parametrize("noise_order", ["after", "before", "last"])
@pytest.mark.parametrize("given", [True, False])
def test_fused_steps_are_steps_along_the_gradient(noise_order: str, given: bool) -> None:
    net = make_net(nn.SiLU(), torch.float32)
    x0 = numbers(SHAPE, torch.float32)
    ends = []
    for gradient in ("autograd", "fused"):
        run = sampler(
            net, gradient=gradient, noise_order=noise_order, steps=4, clamp=(-0.9, 0.9),
            grad_clip=("chain_norm", 1.0), step_size=[0.1, 0.2, 0.3, 0.4], noise_std=0.1,
        )  # fmt: skip
        noise = numbers((4, *SHAPE), torch.float32) if given else None
        ends.append(run.diagnose(x0, seed=3, first_step=7, first_chain=2, noise=noise))
        end = run(x0, seed=3, first_step=7, first_chain=2, noise=noise)
        assert torch.equal(end, ends[-1].x)
    for one, two in zip(*ends, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_explain_checks_its_states(net: nn.Module) -> None:
    with pytest.raises(TypeError, match="x0 must be a tensor, got ndarray"):
        sampler(net).explain(np.zeros(SHAPE))
    with pytest.raises(TypeError, match="x0 must be of floating dtype"):
        sampler(net).explain(torch.zeros(SHAPE, dtype=torch.int64))


@needs_extension
def test_fused_chains_are_the_same_bits_in_every_batch() -> None:
    run = sampler(fl.ConvEnergy(size=8, width=4), steps=20, step_size=1.0, noise_std=0.01)
    x0 = numbers((9, 3, 8, 8), torch.float32)
    whole = run(x0, seed=3)
    for first, last in ((0, 1), (1, 4), (4, 9)):
        assert torch.equal(run(x0[first:last], seed=3, first_chain=first), whole[first:last])


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose"])
def test_lean_and_general_are_the_same_chain(method: str, net: nn.Module, x0: Tensor) -> None:
    ends = []
    for gradient in ("autograd", "explicit"):
        got = getattr(sampler(net, gradient=gradient, maximize=True), method)(x0, seed=0)
        ends.append(got if isinstance(got, tuple) else (got,))
    for one, two in zip(*ends, strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-13)


def test_a_recording_is_kept_until_the_energy_changes(x0: Tensor) -> None:
    net = make_net(nn.Tanh())
    run, general = sampler(net), sampler(net, gradient="autograd")
    for change in (
        lambda: net[0].weight.data.mul_(-2.0),
        lambda: net.__setitem__(1, nn.SiLU()),
        lambda: setattr(net[0], "weight", nn.Parameter(net[0].weight.data.flip(0))),
        lambda: net[0].register_forward_hook(lambda module, inputs, out: 2 * out),
        lambda: net[0]._forward_hooks.clear(),
    ):
        before = run(x0, seed=0)
        change()
        after = run(x0, seed=0)
        assert torch.allclose(after, general(x0, seed=0), rtol=1e-12, atol=1e-13)
        assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize(
    ("gradient", "energy", "match"),
    [
        ("explicit", double_well, 'gradient "explicit" cannot run: the energy is a function'),
        ("explicit", fl.GaussianEnergy(), 'gradient "explicit" cannot run: '),
        ("fused", double_well, 'gradient "fused" cannot run: the energy is a function'),
        ("fused", nn.Sequential(nn.Flatten(), nn.Linear(30, 1)), "it has no activation"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*in train mode Dropout:UserWarning")
@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose", "explain"])
def test_a_score_that_cannot_run_says_why(
    method: str, gradient: str, energy: Callable, match: str
) -> None:
    run = getattr(sampler(energy, gradient=gradient), method)
    with pytest.raises(RuntimeError, match=match):
        run(X0) if method == "explain" else run(X0, seed=0)


def test_labels_that_the_energy_multiplies_by_need_the_general_score(x0: Tensor) -> None:
    with pytest.raises(RuntimeError, match="mul is supported with a number alone"):
        sampler(Conditional(), gradient="explicit")(x0, seed=0, y=LABELS)


def test_train_mode_is_warned_of_once(x0: Tensor) -> None:
    run = sampler(everything(), step_size=0.01)
    with pytest.warns(UserWarning, match=r"BatchNorm2d '1' makes every chain.*and 1 more") as seen:
        run(x0, seed=0)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x0, seed=0)
        sampler(everything().eval(), step_size=0.01)(x0, seed=0)


@pytest.mark.parametrize("gradient", ["autograd", "explicit"])
def test_an_overflow_of_fp16_is_reported(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clamp would turn the infinite gradient into a state like any other."""
    monkeypatch.setattr("fastlangevin.sampler.check_precision", lambda *_: None)
    net, x0 = make_net(nn.ReLU(), torch.float32), numbers(SHAPE, torch.float32)
    run = sampler(net, precision="fp16", clamp=(-1.0, 1.0), gradient=gradient)
    assert run(x0, seed=0).isfinite().all()
    net[3].weight.data.mul_(1e7)
    with pytest.raises(FloatingPointError, match='with precision="fp16" at step 0 the gradient'):
        run(x0, seed=0)


def test_a_sampler_can_be_copied(net: nn.Module, x0: Tensor) -> None:
    run = sampler(net)
    want = run(x0, seed=0)
    for again in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert torch.equal(again(x0, seed=0), want)


# A call leaves no trace --------------------------------------------------------------------------


class Reassigning(nn.Module):
    """A running mean that is a new tensor after every forward, as many people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().double().mean()
        return x


def everything(reassigning: bool = False, spectral: bool = True) -> nn.Sequential:
    """Batch and spectral norm and dropout in train mode, batch norm in eval mode; partly frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(2, 4, 3, padding=1)
        energy = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(first) if spectral else first,
            nn.BatchNorm2d(4),
            nn.SiLU(),
            nn.Dropout(0.3),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            Reassigning() if reassigning else nn.Identity(),
            nn.Flatten(),
            nn.Linear(60, 1),
        ).double()
    if spectral:  # The constructor's 15 power iterations hide what a further one changes.
        for vector in energy[0].parametrizations.weight[0].buffers():
            vector.copy_(nn.functional.normalize(torch.ones_like(vector), dim=0))
    energy.train()[5].eval()
    energy[4].requires_grad_(False)
    energy[8].bias.requires_grad_(False)
    energy[8].weight.grad = torch.ones(1, 60, dtype=torch.float64)
    return energy


def trace(energy: nn.Module) -> dict[str, Any]:
    """All that a call could have changed, as comparable values."""
    return {
        "state": {name: value.tolist() for name, value in energy.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in energy.named_parameters()},
        "grad": {
            name: p.grad is not None and p.grad.tolist() for name, p in energy.named_parameters()
        },
        "identity": [id(p) for p in energy.parameters()],
        "training": {name: module.training for name, module in energy.named_modules()},
        "rng": torch.get_rng_state().tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def backward(run: fl.LangevinSampler, x0: Tensor, checkpoint: str, **options: Any) -> None:
    x = x0.clone().requires_grad_()
    out = run(x, differentiable=True, checkpoint=checkpoint, **options)
    weights = [p for p in run.energy.parameters() if p.requires_grad]
    torch.autograd.grad(out.sum(), [x, *weights], allow_unused=True)


RUNS = {
    "call": lambda run, x0, **options: run(x0, **options),
    "trajectory": lambda run, x0, **options: run.trajectory(x0, **options),
    "diagnose": lambda run, x0, **options: run.diagnose(x0, **options),
    "none": functools.partial(backward, checkpoint="none"),
    "step": functools.partial(backward, checkpoint="step"),
}


@pytest.mark.parametrize("reassigning", [False, True], ids=["", "reassigned buffer"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_no_trace(x0: Tensor, run: Callable, reassigning: bool) -> None:
    energy = everything(reassigning)
    before = trace(energy)
    run(sampler(energy, step_size=0.01), x0, seed=0)
    assert trace(energy) == before


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_no_trace_beyond_one_draw_without_a_seed(x0: Tensor, run: Callable) -> None:
    energy = everything()
    torch.manual_seed(1)
    fl.noise.draw_seed()
    after = trace(energy)
    torch.manual_seed(1)
    run(sampler(energy, step_size=0.01), x0)
    assert trace(energy) == after


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_no_trace_of_a_chain_that_raises(x0: Tensor, run: Callable) -> None:
    energy, calls = everything(), []

    def raise_at_step_3(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third step")

    energy.register_forward_hook(raise_at_step_3)
    before, start = trace(energy), x0.clone()
    with pytest.raises(RuntimeError, match="the third step"):
        run(sampler(energy, step_size=0.01), x0, seed=0)
    assert trace(energy) == before
    assert torch.equal(x0, start)


@pytest.mark.parametrize("wrap", [lambda net: net.forward, functools.partial], ids=["m", "partial"])
def test_no_trace_of_a_wrapped_module(x0: Tensor, wrap: Callable) -> None:
    energy = everything()
    before = trace(energy)
    sampler(wrap(energy), step_size=0.01)(x0, seed=0)
    assert trace(energy) == before


@pytest.mark.parametrize("differentiable", [False, True])
def test_dropout_is_a_function_of_the_seed(x0: Tensor, differentiable: bool) -> None:
    run = sampler(everything(), step_size=0.05, noise_std=0)
    options = {"differentiable": differentiable}
    torch.manual_seed(1)
    first = run(x0, seed=0, **options)
    torch.manual_seed(2)
    assert torch.equal(run(x0, seed=0, **options), first)
    assert not torch.equal(run(x0, seed=1, **options), first)


@pytest.mark.parametrize("differentiable", [False, True])
def test_dropout_is_drawn_anew_at_every_step(x0: Tensor, differentiable: bool) -> None:
    energy, masks = everything(), []
    energy[3].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    options = {"differentiable": differentiable, "checkpoint": "none" if differentiable else "auto"}
    sampler(energy)(x0, seed=0, **options)
    assert len(masks) == K
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose"])
def test_callers_modes(net: nn.Module, x0: Tensor, mode: Callable, method: str) -> None:
    """The same numbers in any mode of the caller, and a result that autograd can use after it."""
    want = sampler(net)(x0, seed=0)
    with mode():
        got = getattr(sampler(net), method)(x0, seed=0)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert modes == (mode is torch.enable_grad, mode is torch.inference_mode)
    x = {"__call__": got, "trajectory": got[-1], "diagnose": got[0]}[method]
    assert torch.equal(x, want)
    x.clone().requires_grad_().square().sum().backward()
    assert not x.is_inference()


def test_x0_made_in_inference_mode(net: nn.Module, x0: Tensor) -> None:
    with torch.inference_mode():
        start = x0.clone()
    assert torch.equal(sampler(net)(start, seed=0), sampler(net)(x0, seed=0))


# Precision of the network ------------------------------------------------------------------------


def make_mlp() -> nn.Sequential:
    """A linear layer's gradient is a product that autocast rounds, unlike a convolution's."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 1))
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(0.2 * numbers(parameter.shape, torch.float32, 100 + i))
    return net


NETS = {"conv": lambda: make_net(nn.Tanh(), torch.float32), "linear": make_mlp}


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_fp32_is_strict_inside_autocast(make: Callable, differentiable: bool) -> None:
    """In the forward and in the gradient, which runs inside the caller's region as well."""
    net, x0, options = make(), numbers(SHAPE, torch.float32), {"differentiable": differentiable}
    want = sampler(net)(x0, seed=0, **options)
    assert torch.equal(sampler(net, precision="fp32")(x0, seed=0, **options), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sampler(net, precision="fp32")(x0, seed=0, **options), want)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_no_precision_is_what_the_callers_loop_would_do(make: Callable[[], nn.Module]) -> None:
    net, x0, z = make(), numbers(SHAPE, torch.float32), numbers((K, *SHAPE), torch.float32, 1)
    outside = sampler(net)(x0, noise=z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sampler(net)(x0, noise=z)
        want = last(plain_chain(net, x0, z))
    assert inside.dtype == torch.float32
    assert torch.allclose(inside, want, atol=1e-6)
    assert not torch.allclose(outside, want, atol=1e-6)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_bf16_rounds_the_network_and_not_the_state(make: Callable[[], nn.Module]) -> None:
    net, x0 = make(), numbers(SHAPE, torch.float32)
    exact = sampler(net.double())(x0.double(), seed=0)
    net.float()
    seen = []
    net[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    error = {}
    for precision in ("fp32", "bf16"):
        got = sampler(net, precision=precision)(x0, seed=0)
        assert got.dtype == torch.float32
        error[precision] = float((got - exact).abs().max())
    assert set(seen[:K]) == {torch.float32}
    assert set(seen[K:]) == {torch.bfloat16}
    assert error["fp32"] < 1e-5 < error["bf16"] < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_leaves_the_callers_autocast_as_it_was(precision: str) -> None:
    net, x0 = make_mlp(), numbers(SHAPE, torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        sampler(net, precision=precision)(x0, seed=0)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16
    sampler(net, precision=precision)(x0, seed=0)
    assert not torch.is_autocast_enabled("cpu")


# The differentiable chain ------------------------------------------------------------------------


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = numbers(out.shape, out.dtype, 2)
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [g if g is not None else torch.zeros_like(v) for g, v in zip(grads, leaves, strict=True)]


def assert_same_chain(ours: Tensor, plain: Tensor, leaves: list[Tensor]) -> None:
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    pairs = zip(gradients(ours, leaves), gradients(plain, leaves), strict=True)
    for got, want in pairs:
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-11)
        assert bool(want.any())


@pytest.mark.parametrize("checkpoint", ["auto", "none", "step"])
@pytest.mark.parametrize("options", GRID, ids=str)
def test_gradients_of_a_plain_unroll(
    net: nn.Module, x0: Tensor, options: dict, checkpoint: str
) -> None:
    """To x0, the parameters, step_size and noise_std, with the contract's noise."""
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (A, B))
    options = options | {"step_size": a, "noise_std": b, "maximize": True}
    x0.requires_grad_()
    got = sampler(net, **options)(x0, seed=6, differentiable=True, checkpoint=checkpoint)
    want = last(plain_chain(net, x0, contract_noise(SHAPE, 6), detached=False, **options))
    # All but the head's bias, which shifts the energy and so no chain.
    assert_same_chain(got, want, [x0, net[0].weight, net[0].bias, net[3].weight, a, b])


@pytest.mark.parametrize("form", ["0-d tensor", "[n]", "[K, n]", "[K, 1]"])
@pytest.mark.parametrize("noise_order", ORDERS)
def test_learnable_schedules(net: nn.Module, x0: Tensor, form: str, noise_order: str) -> None:
    a = SCHEDULES[form]().double().requires_grad_()
    b = SCHEDULES[form]().double().flip(0).requires_grad_() if form != "0-d tensor" else a
    z, options = numbers((K, *SHAPE), seed=1), {"noise_order": noise_order}
    run = sampler(net, step_size=a, noise_std=b, **options)
    plain = {"step_size": spelled_out(a), "noise_std": spelled_out(b)}
    want = last(plain_chain(net, x0, z, detached=False, **plain, **options))
    got = run(x0, noise=z, differentiable=True)
    assert_same_chain(got, want, [a] if a is b else [a, b])


@pytest.mark.parametrize("checkpoint", ["none", "step"])
@pytest.mark.parametrize("grad_steps", [1, 3, K])
def test_grad_steps(net: nn.Module, x0: Tensor, grad_steps: int, checkpoint: str) -> None:
    """Through the last steps alone: the state before them is a constant."""
    z = numbers((K, *SHAPE), seed=1)
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    x0.requires_grad_()
    options = {"grad_steps": grad_steps, "checkpoint": checkpoint}
    run = functools.partial(sampler(net, step_size=a), x0, noise=z, differentiable=True, **options)
    states = [x0, *(step["x"] for step in plain_chain(net, x0, z, step_size=A))]
    start = states[K - grad_steps]
    tail = plain_chain(net, start, z[K - grad_steps :], step_size=a, detached=False)
    assert_same_chain(run(), last(tail), [a, net[0].weight, net[3].weight])
    (dx0,) = torch.autograd.grad(run().sum(), x0, allow_unused=True)
    assert (dx0 is None) == (grad_steps < K)


@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_gradients_with_dropout_and_norms_in_train_mode(x0: Tensor, checkpoint: str) -> None:
    """Recomputed steps draw the same dropout: central differences of the call itself agree."""
    energy = everything()
    run = functools.partial(
        sampler(energy, steps=3, step_size=0.05), seed=0, differentiable=True, checkpoint=checkpoint
    )
    x, v = x0.clone().requires_grad_(), numbers(SHAPE, seed=5)
    (dx,) = gradients(run(x), [x])
    h, weight = 1e-5, numbers(SHAPE, seed=2)
    ends = [run(x0 + e * v).detach() for e in (h, -h)]
    assert float((dx * v).sum()) == pytest.approx(
        float(((ends[0] - ends[1]) * weight).sum()) / (2 * h), rel=1e-6
    )


@pytest.mark.parametrize(
    ("checkpoint", "forward", "backward"), [("none", K, 0), ("step", K, K)], ids=["none", "step"]
)
def test_checkpoints_cost_one_evaluation_a_step(
    net: nn.Module, x0: Tensor, checkpoint: str, forward: int, backward: int
) -> None:
    calls = []
    net.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    x0.requires_grad_()
    out = sampler(net)(x0, seed=0, differentiable=True, checkpoint=checkpoint)
    assert len(calls) == forward
    gradients(out, [x0])
    assert len(calls) == forward + backward


def test_checkpoints_keep_the_states_alone(net: nn.Module, x0: Tensor) -> None:
    """What autograd holds between the forward and the backward pass, in elements of the state."""

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    kept = {}
    for checkpoint in ("none", "step"):
        held: weakref.WeakSet[Held] = weakref.WeakSet()

        def pack(tensor: Tensor, held: weakref.WeakSet[Held] = held) -> Held:
            # Detached where it has a graph: that holds this item, and would live for ever.
            held.add(item := Held(tensor if tensor.grad_fn is None else tensor.detach()))
            return item

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
            out = sampler(net)(x0, seed=0, differentiable=True, checkpoint=checkpoint)
        kept[checkpoint] = sum(item.tensor.numel() for item in held)
        del out
    weights = sum(p.numel() for p in net.parameters())
    assert kept["step"] <= K * (x0.numel() + weights) < kept["none"]


class Tilted(nn.Module):
    """A net plus a linear term whose coefficient comes from outside, not as a parameter."""

    def __init__(self, tilt: Tensor | None = None) -> None:
        super().__init__()
        self.net, self.tilt = make_net(nn.Tanh()), tilt

    def forward(self, x: Tensor, tilt: Any = None) -> Tensor:
        tilt = self.tilt if tilt is None else tilt["tilt"] if isinstance(tilt, dict) else tilt
        return self.net(x)[:, 0] + (tilt * x).flatten(1).sum(1)


WAYS_IN = {
    "keyword": lambda tilt: (Tilted(), {"tilt": tilt}),
    "keyword, nested": lambda tilt: (Tilted(), {"tilt": {"tilt": tilt}}),
    "partial": lambda tilt: (functools.partial(Tilted(), tilt=tilt), {}),
    "attribute": lambda tilt: (Tilted(tilt), {}),
    "closure": lambda tilt: ((lambda net: lambda x: net(x, tilt))(Tilted()), {}),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_no_schedule_loses_a_gradient(x0: Tensor, way: str) -> None:
    """A tensor that requires grad gets the plain unroll's, however it came into the energy."""
    tilt = numbers(SHAPE[1:], seed=8).requires_grad_()
    energy, options = WAYS_IN[way](tilt)
    run = functools.partial(sampler(energy), x0, seed=0, differentiable=True, **options)
    assert_same_chain(run(checkpoint="auto"), run(checkpoint="none"), [tilt])


def test_no_schedule_loses_the_gradient_of_the_noise(net: nn.Module, x0: Tensor) -> None:
    z = numbers((K, *SHAPE), seed=1).requires_grad_()
    run = functools.partial(sampler(net), x0, noise=z, differentiable=True)
    assert_same_chain(run(checkpoint="auto"), run(checkpoint="none"), [z])


def test_coefficients_may_be_computed(net: nn.Module, x0: Tensor) -> None:
    """step_size = exp(log_a), the usual way to learn one: gradients go on to log_a."""
    log_a = torch.tensor(math.log(A), dtype=torch.float64, requires_grad=True)
    z, a = numbers((K, *SHAPE), seed=1), log_a.exp()
    got = sampler(net, step_size=a)(x0, noise=z, differentiable=True)
    want = last(plain_chain(net, x0, z, step_size=log_a.exp(), detached=False))
    assert_same_chain(got, want, [log_a])


def test_recomputed_steps_run_in_the_same_autocast_as_the_forward_pass(x0: Tensor) -> None:
    """The backward pass is outside the region, as torch's own documentation has it."""
    net, x = make_mlp(), x0.float().requires_grad_()
    grads = []
    for checkpoint in ("none", "step"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = sampler(net)(x, seed=0, differentiable=True, checkpoint=checkpoint)
        grads += gradients(out, [x])
    assert torch.allclose(*grads, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpoint", ["none", "step"])
@pytest.mark.parametrize("trainable", [False, True])
def test_weights_that_change_before_the_backward_pass_are_noticed(
    net: nn.Module, x0: Tensor, trainable: bool, checkpoint: str
) -> None:
    net.requires_grad_(trainable)
    out = sampler(net)(x0.requires_grad_(), seed=0, differentiable=True, checkpoint=checkpoint)
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, [x0])


@pytest.mark.parametrize("noise_order", ORDERS)
@pytest.mark.parametrize("grad_clip", [None, ("chain_norm", 0.5), ("batch_norm", 0.5)], ids=str)
def test_gradcheck(noise_order: str, grad_clip: Any) -> None:
    def chain(x0: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options = {"steps": 3, "step_size": a, "noise_std": b, "grad_clip": grad_clip}
        run = fl.LangevinSampler(
            lambda x: torch.tanh(x @ w).square().sum(1), **options, noise_order=noise_order
        )
        return run(x0, seed=0, differentiable=True)

    inputs = (
        numbers((2, 3)),
        numbers((3, 4), seed=1),
        torch.tensor(A).double(),
        torch.ones(2).double(),
    )
    assert torch.autograd.gradcheck(chain, tuple(v.requires_grad_() for v in inputs))


@pytest.mark.parametrize("kind", ["chain_norm", "batch_norm"])
def test_norm_clips_at_a_zero_gradient_are_differentiable(kind: str) -> None:
    """A chain at rest is not clipped, and d x_1 / d x_0 = 1 - a there."""
    x0 = torch.zeros(2, 3, requires_grad=True)
    x0.data[1] = 0.01 * (kind == "chain_norm")
    run = sampler(fl.GaussianEnergy(), steps=1, step_size=0.25, grad_clip=(kind, 1.0))
    (grad,) = torch.autograd.grad(run(x0, seed=0, differentiable=True).sum(), x0)
    assert torch.allclose(grad, torch.full((2, 3), 0.75))


@pytest.mark.parametrize("checkpoint", ["none", "step"])
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.5)])
def test_piecewise_linear_energies_pass_the_gradient_on(
    clamp: tuple | None, checkpoint: str
) -> None:
    """d x_K / d x_0 is the identity, and zero where a step was clamped."""
    net = make_net(nn.LeakyReLU(0.2), torch.float32)
    x0, z = 0.3 * numbers(SHAPE, torch.float32), numbers((K, *SHAPE), torch.float32, 1)
    options = {"step_size": 0.05, "noise_std": 0.05, "clamp": clamp}
    run = sampler(net, **options)
    free = torch.ones(SHAPE)
    for state in run.trajectory(x0, noise=z)[1:]:
        free *= 1 if clamp is None else ((state > clamp[0]) & (state < clamp[1])).float()
    x0.requires_grad_()
    out = run(x0, noise=z, differentiable=True, checkpoint=checkpoint)
    weight = numbers(SHAPE, torch.float32, 2)
    (grad,) = torch.autograd.grad((out * weight).sum(), x0)
    assert torch.equal(grad, weight * free)
    assert (0 < free.mean() < 1) or clamp is None


def test_weights_alone_may_require_grad(net: nn.Module, x0: Tensor) -> None:
    z = numbers((K, *SHAPE), seed=1)
    got = sampler(net)(x0, noise=z, differentiable=True)
    want = last(plain_chain(net, x0, z, detached=False))
    assert_same_chain(got, want, [net[0].weight, net[0].bias, net[3].weight])
    assert not x0.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_low_precision_x0_gets_its_gradient(dtype: torch.dtype) -> None:
    x0 = numbers((3, 5), dtype).requires_grad_()
    run = sampler(fl.GaussianEnergy(), step_size=0.5, noise_std=0)
    out = run(x0, seed=0, differentiable=True)
    (grad,) = torch.autograd.grad(out.sum(), x0)
    assert out.dtype == torch.float32
    assert torch.equal(grad, torch.full_like(grad, 0.5**K))


def test_without_differentiable_there_is_no_graph(net: nn.Module, x0: Tensor) -> None:
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    run = sampler(net, step_size=a)
    x0.requires_grad_()
    for out in (run(x0, seed=0), run.trajectory(x0, seed=0), *run.diagnose(x0, seed=0)):
        assert not out.requires_grad


# The exact law -----------------------------------------------------------------------------------

CHAINS = (64, 2**14)


def stationary_score(noise: float, noise_order: str = "after") -> float:
    """Standard errors between a chain's variance, of N = 2^20, and the law's for b = 0.5.

    From x0 = 0 the variance is its limit times 1 - (1 - a / s)^2K: here 1 - 4e-8.
    """
    energy, a, b = fl.GaussianEnergy(2.0), 1.0, 0.5
    run = fl.LangevinSampler(energy, 12, a, noise * b, noise_order=noise_order)
    x = run(torch.zeros(CHAINS), seed=0).double()
    limit = energy.stationary_variance(a, b)
    if noise_order == "before":
        limit *= (1 - a / 2.0) ** 2  # the chain is looked at after the move, not after the noise
    return float(x.square().mean() / limit - 1) / math.sqrt(2 / x.numel())


@pytest.mark.parametrize("noise_order", ORDERS)
def test_stationary_variance(noise_order: str) -> None:
    assert abs(stationary_score(1.0, noise_order)) <= 5


def test_one_percent_too_much_noise_fails() -> None:
    assert stationary_score(1.01) > 5


# Errors ------------------------------------------------------------------------------------------

SETTINGS = [
    ({"energy": 3}, TypeError, "energy must be callable, got int"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": -1}, ValueError, "steps must be at least 1, got -1"),
    ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
    ({"clamp": (1.0, -1.0)}, ValueError, r"clamp must have lo < hi, got \(1.0, -1.0\)"),
    ({"clamp": (0.0, 0.0)}, ValueError, "clamp must have lo < hi"),
    ({"clamp": 1.0}, TypeError, r"clamp must be a pair \(lo, hi\) or None"),
    ({"grad_clip": 0}, ValueError, "grad_clip must have a bound > 0, got 0"),
    ({"grad_clip": ("l2", 1.0)}, ValueError, "grad_clip must be a number"),
    ({"noise_order": "first"}, ValueError, "noise_order must be one of after, before, last, got"),
    ({"precision": "half"}, ValueError, 'precision must be None, "fp32"'),
    ({"gradient": "fast"}, ValueError, "gradient must be one of auto, autograd, explicit, fused"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, native, triton, reference"),
]
SETTINGS += [
    ({name: value}, error, f"LangevinSampler: {name} {match}")
    for name in ("step_size", "noise_std")
    for value, error, match in [
        (math.nan, ValueError, "must be finite and >= 0, got nan"),
        (-1.0, ValueError, "must be finite and >= 0, got -1.0"),
        (None, TypeError, "must be a number or a tensor, got None"),
        ([0.1] * (K - 1), ValueError, f"as a sequence must have steps={K} numbers, got {K - 1}"),
        ([0.1] * (K - 1) + [math.nan], ValueError, "must be finite and >= 0, got nan"),
        (torch.tensor([0.1, -0.1]), ValueError, "must be finite and >= 0, got -0.1"),
        (torch.ones(3, dtype=torch.int64), TypeError, "must be of floating dtype"),
        (torch.ones(K + 1, N), ValueError, f"must be a number, a sequence of steps={K} numbers"),
        (torch.ones(K, N, 1), ValueError, f"must be a number, a sequence of steps={K} numbers"),
    ]
]


@pytest.mark.parametrize(("wrong", "error", "match"), SETTINGS, ids=[s[2] for s in SETTINGS])
def test_settings_that_do_not_fit(wrong: dict, error: type[Exception], match: str) -> None:
    arguments = {"energy": make_mlp(), "steps": K} | wrong
    with pytest.raises(error, match=match):
        fl.LangevinSampler(**arguments)


X0 = torch.zeros(SHAPE)


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose"])
@pytest.mark.parametrize("energy", [fl.GaussianEnergy(), double_well], ids=["module", "callable"])
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_that_need_a_gpu(precision: str, energy: Callable, method: str) -> None:
    """Of the device at the call: energies move, and a callable has none before it."""
    run = sampler(energy, precision=precision)
    with pytest.raises(ValueError, match=f'precision "{precision}" needs a CUDA device'):
        getattr(run, method)(X0, seed=0)


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose", "explain"])
def test_a_backend_that_cannot_run_says_why(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"native": "no compiler was found", "triton": "needs a GPU", "reference": None}
    monkeypatch.setattr("fastlangevin.step._why_not", lambda name, device: reasons[name])
    run = getattr(sampler(double_well, backend="native"), method)
    with pytest.raises(RuntimeError, match='"native" cannot run on cpu: no compiler was found'):
        run(X0) if method == "explain" else run(X0, seed=0)


CALLS = [
    ({"x0": X0.long()}, TypeError, "x0 must be of floating dtype, got torch.int64"),
    ({"x0": X0.to(torch.complex64)}, TypeError, "x0 must be of floating dtype"),
    ({"x0": torch.tensor(1.0)}, ValueError, "x0 must have a leading chain dimension"),
    ({"x0": [[1.0]]}, TypeError, r"x0\[0\] must be a tensor, got list"),
    ({"x0": np.zeros(SHAPE)}, TypeError, "x0 must be a tensor, got ndarray"),
    ({"x0": X0.to("meta")}, ValueError, "x0 is on meta, the energy on cpu"),
    ({"x0": None}, ValueError, "give either x0 or n"),
    ({"n": 4}, ValueError, "give either x0 or n"),
    ({"x0": None, "n": 4}, ValueError, "n needs an energy with an attribute shape"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, ValueError, "seed must be in"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    ({"generator": torch.Generator()}, ValueError, "give seed or generator, not both"),
    ({"first_chain": -1}, ValueError, "first_chain must be in"),
    ({"first_chain": 2**32 - 3}, ValueError, "last chain must be in"),
    ({"first_chain": 1.5}, TypeError, "first_chain must be an integer"),
    ({"first_step": -1}, ValueError, "step must be in"),
    ({"first_step": 2**32 - 4}, ValueError, "last step must be in"),
    ({"first_step": 1.5}, TypeError, "step must be an integer"),
    ({"noise": torch.zeros(K - 1, *SHAPE)}, ValueError, r"noise must have shape \[steps, \*x0.sh"),
    ({"noise": torch.zeros(SHAPE)}, ValueError, "noise must have shape"),
    ({"noise": torch.zeros(K, *SHAPE, device="meta")}, ValueError, "noise must be on x0's device"),
    ({"noise": torch.zeros(K, *SHAPE).long()}, TypeError, "noise must be of floating dtype"),
    ({"noise": np.zeros((K, *SHAPE))}, TypeError, "noise must be a tensor, got ndarray"),
    ({"noise": [0.0]}, TypeError, "noise must be a tensor, got list"),
    ({"checkpoint": "none"}, ValueError, "checkpoint and grad_steps need differentiable=True"),
    ({"grad_steps": 2}, ValueError, "checkpoint and grad_steps need differentiable=True"),
    ({"differentiable": True, "checkpoint": "all"}, ValueError, "checkpoint must be"),
    ({"differentiable": True, "grad_steps": 0}, ValueError, "grad_steps must be at least 1"),
    ({"differentiable": True, "grad_steps": K + 1}, ValueError, f"at most steps={K}, got {K + 1}"),
    ({"differentiable": True, "grad_steps": 1.5}, TypeError, "grad_steps must be an integer"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), CALLS, ids=[c[2] for c in CALLS])
def test_calls_that_do_not_fit(wrong: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sampler(make_mlp())(**{"x0": X0.clone(), "seed": 0} | wrong)


@pytest.mark.parametrize("n", [-1, 1.5, "four"])
def test_n_must_be_a_count(n: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="n must be"):
        sampler(fl.ConvEnergy(size=8, width=1))(n=n, seed=0)


@pytest.mark.parametrize("name", ["step_size", "noise_std"])
@pytest.mark.parametrize("shape", [(N + 1,), (1,), (K, N + 1)])
def test_coefficients_for_other_chains(name: str, shape: tuple) -> None:
    run = sampler(make_mlp(), **{name: torch.ones(shape)})
    with pytest.raises(ValueError, match=f"{name} has values for {shape[-1]} chains, x0 has {N}"):
        run(X0, seed=0)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_must_be_a_count(every: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="every must be"):
        sampler(make_mlp()).trajectory(X0, seed=0, every=every)


ENERGIES = [
    (lambda x: x.flatten(1).sum(1)[:-1], ValueError, r"must return one value per chain, \[4\]"),
    (lambda x: x.flatten(1).sum(1)[None], ValueError, r"got shape \[1, 4\]"),
    (lambda x: x, ValueError, r"got shape \[4, 2, 5, 3\]"),
    (lambda x: x.sum(), ValueError, r"got shape \[\]"),
    (lambda x: x.flatten(1).sum(1).long(), TypeError, "must return a floating dtype, got torch.in"),
    (lambda x: x.flatten(1).sum(1) + 0j, TypeError, "must return a floating dtype, got torch.com"),
    (lambda x: torch.zeros(len(x)), ValueError, "does not depend on x"),
    (lambda x: torch.ones(len(x), requires_grad=True), ValueError, "does not depend on x"),
    (lambda x: x.detach().flatten(1).sum(1), ValueError, "does not depend on x"),
    (lambda x: 1.0, TypeError, "must return a tensor, got float"),
    (lambda x: float(x.detach().sum()), TypeError, "must return a tensor, got float"),
    (lambda x: (x.flatten(1).sum(1), x), TypeError, "must return a tensor, got tuple"),
    (lambda x: None, TypeError, "must return a tensor, got NoneType"),
]


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize(("energy", "error", "match"), ENERGIES, ids=[e[2] for e in ENERGIES])
def test_energies_that_do_not_fit(
    energy: Callable, error: type[Exception], match: str, differentiable: bool
) -> None:
    with pytest.raises(error, match=match):
        sampler(energy)(X0, seed=0, differentiable=differentiable)


@pytest.mark.parametrize("method", ["__call__", "trajectory", "differentiable"])
@pytest.mark.parametrize("at", ["value", "gradient"])
def test_chains_that_are_not_finite(method: str, at: str) -> None:
    """A NaN energy of one chain of four is not returned in silence."""

    def energy(x: Tensor) -> Tensor:
        spoilt = torch.tensor([0.0, 0.0, math.nan, 0.0])
        clean = x.square().flatten(1).sum(1)
        return clean + spoilt if at == "value" else clean * (1 + spoilt)

    run = sampler(energy, clamp=(-1.0, 1.0))
    options = {"differentiable": True} if method == "differentiable" else {}
    call = run.trajectory if method == "trajectory" else run
    x0 = X0.clone().requires_grad_(bool(options))
    with pytest.raises(FloatingPointError, match="1 of 4 chains are not finite after 5 steps"):
        call(x0, seed=0, **options)
