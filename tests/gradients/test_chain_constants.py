"""Networks that read labels, observations and other constants, on the fused engine of the CPU."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlangevin as fl
from benchmarks.chain import peak_bytes
from benchmarks.networks import conditional, dense

N, CLASSES = 5, conditional.CLASSES


class LogitOfLabel(nn.Module):
    """JEM's joint energy: minus the label's logit, plus the log of their sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.linear(F.silu(self.conv(x)).mean(dim=(2, 3)))
        return logits.logsumexp(1) - 2 * logits.gather(1, y[:, None])[:, 0]


class Offsets(nn.Module):
    """Constants of every rank: positions of all chains, a bias, a prior of the label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.positions = nn.Parameter(0.1 * torch.randn(width, 8, 8))
        self.offset = nn.Parameter(torch.randn(1, width, 1, 1))
        self.prior = nn.Embedding(CLASSES, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.silu(self.conv(x) + self.positions)
        h = torch.tanh(h.mul(1 + 0.1 * self.prior(y)[:, :, None, None]) - self.offset)
        return h.sum(dim=(1, 2, 3)) + self.prior(y)[:, 0]


class Planes(nn.Module):
    """An image and a condition of the same size, joined with the condition first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.linear = nn.Linear(width + 2, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.elu(self.conv(torch.cat([condition, x], 1))).mean(dim=(2, 3))
        h = torch.cat([F.softplus(h), condition.mean(dim=(2, 3))], 1)
        return self.linear(h)


def labels() -> dict[str, Tensor]:
    return {"y": torch.randint(CLASSES, (N,))}


def observation() -> dict[str, Tensor]:
    return {"observation": torch.randn(N, 20)}


def condition() -> dict[str, Tensor]:
    return {"condition": torch.randn(N, 2, 8, 8)}


CASES = {
    "scale and shift": (conditional.ScaleShiftEnergy, (3, 16, 16), labels),
    "projection": (conditional.ProjectionEnergy, (1, 8, 8), labels),
    "logit of a label": (LogitOfLabel, (1, 8, 8), labels),
    "offsets": (Offsets, (1, 8, 8), labels),
    "observation": (conditional.ActionGivenVector, (4,), observation),
    "planes": (Planes, (1, 8, 8), condition),
    "two branches": (dense.TwoBranches, (3, 16, 16), dict),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    module, shape, kwargs = CASES[request.param]
    energy = module(6)
    for parameter in energy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return energy, torch.rand(N, *shape) - 0.5, kwargs


def exact_gradient(energy, x, kwargs):
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    x = x.double().requires_grad_()
    return torch.autograd.grad(copy.deepcopy(energy).double()(x, **kwargs).sum(), x)[0]


def step_of(energy, gradient="fused"):
    return fl.LangevinSampler(energy, 1, 2.0**30, 0.0, gradient=gradient)


def gradient_of(sampler, x, kwargs):
    return (x.double() - sampler(x, seed=0, **kwargs).double()) / 2.0**30


def assert_close(grad, exact):
    assert (grad - exact).norm() <= 3e-6 * exact.norm()


def test_the_fused_engine_has_the_gradient_of_float64_for_every_call(case):
    energy, x, make = case
    assert fl.LangevinSampler(energy, 2).choose_engine(x, make()).name == "fused"
    sampler = step_of(energy)
    for _ in range(2):
        kwargs = make()
        assert_close(gradient_of(sampler, x, kwargs), exact_gradient(energy, x, kwargs))
        for parameter in energy.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_the_explicit_engine_replays_the_energy(case):
    energy, x, make = case
    kwargs = make()
    grad = gradient_of(step_of(energy, "explicit"), x, kwargs)
    assert_close(grad, exact_gradient(energy, x, kwargs))


def test_energies_are_those_of_float64(case):
    energy, x, make = case
    kwargs = make()
    engine = fl.LangevinSampler(energy, 2).choose_engine(x, kwargs).engine
    engine.begin()
    energies, _ = engine(x, True)
    exact = energy(x, **kwargs).detach().reshape(-1)
    torch.testing.assert_close(energies, exact, rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_the_split_of_the_batch(case):
    energy, x, make = case
    size = 2
    kwargs = make()
    sampler = fl.LangevinSampler(energy, 3, 0.1, 0.1, gradient="fused")
    whole = sampler(x, seed=0, **kwargs)
    parts = [
        sampler(
            x[k : k + size],
            seed=0,
            first_chain=k,
            **{n: v[k : k + size] for n, v in kwargs.items()},
        )
        for k in range(0, N, size)
    ]
    assert torch.equal(torch.cat(parts), whole)


def planes_of(chains):
    """Return the fused engine of an energy whose constants pass a convolution, and its call."""
    torch.manual_seed(0)
    energy, x = conditional.LabelPlanes(4), torch.rand(chains, 1, 28, 28)
    kwargs = {"y": torch.randint(CLASSES, (chains,))}
    engine = fl.LangevinSampler(energy, 2).choose_engine(x, kwargs).engine
    engine.begin()
    return engine, energy, x, kwargs


def test_constants_of_many_chains_are_those_of_each():
    engine, energy, x, kwargs = planes_of(37)
    _, grad = engine(x, False)
    assert_close(grad, exact_gradient(energy, x, kwargs))


def test_more_chains_do_not_need_more_memory_to_compute_constants():
    few, many = (peak_bytes(planes_of(chains)[0].begin) for chains in (16, 48))
    assert many < 1.5 * few


def test_calls_of_two_threads_do_not_share_labels():
    torch.manual_seed(0)
    energy, x = conditional.ProjectionEnergy(6), torch.rand(N, 1, 8, 8)
    sampler = fl.LangevinSampler(energy, 30, 0.1, 0.1, gradient="fused")
    calls = [{"y": torch.full((N,), label)} for label in range(4)]
    alone = [sampler(x, seed=0, **call) for call in calls]
    found = [None] * len(calls)

    def run(k):
        found[k] = sampler(x, seed=0, **calls[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_a_chain_that_keeps_its_graph_is_differentiated_by_autograd():
    torch.manual_seed(0)
    energy, x, y = LogitOfLabel(4).double(), torch.rand(N, 1, 8, 8).double(), labels()["y"]
    grads = []
    for gradient in ("auto", "autograd"):
        sampler = fl.LangevinSampler(energy, 2, 0.1, 0.1, gradient=gradient)
        out = sampler(x, seed=0, differentiable=True, y=y)
        grads.append(torch.autograd.grad(out.square().sum(), energy.conv.weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def after_its_read(x: Tensor, y: Tensor) -> Tensor:
    scale = y * 1.0
    h = torch.tanh(x) + scale
    scale.add_(1)
    return (h * scale).sum(1)


def by_the_state(x: Tensor, y: Tensor) -> Tensor:
    scale = y * 1.0
    h = torch.tanh(x) + scale
    scale.mul_(x)
    return (h.sin() + scale).sum(1)


@pytest.mark.parametrize("change", [after_its_read, by_the_state])
def test_memory_that_changes_later_is_left_to_the_trace(change):
    class Changing(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return change(x, y)

    x, y = torch.rand(N, 3), torch.rand(N, 3)
    sampler = step_of(Changing(), "auto")
    assert "in place" in sampler.choose_engine(x, {"y": y}).why_not[0].reason
    assert_close(gradient_of(sampler, x, {"y": y}), exact_gradient(Changing(), x, {"y": y}))


class Viewed(nn.Module):
    """Reads an argument and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.outer = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x) + y)
        return (torch.tanh(self.outer(h)) * y[:, 1:4]).sum(1) + h.sum(1)


LAYOUTS = {
    "rows of a larger tensor": lambda make: make(100, 8)[5:10],
    "columns of a larger tensor": lambda make: make(5, 16)[:, 8:],
    "transposed": lambda make: make(8, 5).t(),
    "contiguous": lambda make: make(5, 8),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [(a, list(LAYOUTS)[i - k]) for i, a in enumerate(LAYOUTS) for k in (1, 2)],
)
def test_a_view_of_an_argument_is_read_where_each_call_has_it(first: str, second: str) -> None:
    """The first argument has equal rows, so that no comparison could find a wrong one."""
    torch.manual_seed(0)
    energy, x = Viewed(), torch.randn(5, 6)
    ours = fl.LangevinSampler(energy, steps=3, step_size=0.1)
    want = fl.LangevinSampler(energy, steps=3, step_size=0.1, gradient="autograd")
    for y in (LAYOUTS[first](torch.zeros), LAYOUTS[second](torch.randn)):
        torch.testing.assert_close(ours(x, seed=0, y=y), want(x, seed=0, y=y))


class Embedded(nn.Module):
    """Adds an embedding of an argument to its hidden values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embed, self.last = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.tanh(self.linear(x) + self.embed(y))).flatten()


def test_a_callers_autocast_does_not_reach_what_is_computed_from_arguments() -> None:
    torch.manual_seed(0)
    energy = Embedded()
    x, y = torch.randn(N, 6), torch.randn(N, 4)
    sampler = fl.LangevinSampler(energy, steps=3, step_size=0.1, precision="fp32")
    want = sampler(x, seed=0, y=y)
    with torch.autocast("cpu", torch.bfloat16):
        got = fl.LangevinSampler(energy, steps=3, step_size=0.1, precision="fp32")(x, seed=0, y=y)
    assert torch.equal(got, want)
