"""The lean score against autograd in float64, and what it must notice and keep."""

import copy
import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlangevin as fl
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels.signs import apply_signs_, apply_signs_ref_, pack_signs, pack_signs_ref
from tests.gradients.bodies import COMMON, Body, block, mean

SHAPE = (3, 4, 9, 7)  # odd and unequal, so that strides leave rows over


def numbers(shape: tuple, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lean(energy: Any, x: Tensor, precision: str | None = None) -> ExplicitGradient:
    graph = recognise(energy, x)
    assert isinstance(graph, Graph), graph
    return ExplicitGradient(graph, x, precision)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(energy: nn.Module, x: Tensor, smooth: bool, bound: float = 1e-6) -> None:
    """Both passes, in float32 and float64, against autograd in float64."""
    exact = copy.deepcopy(energy).double()
    energies, grad = energy_and_grad(exact, x.double(), {})
    _, plain = energy_and_grad(energy, x, {})
    allowed = bound if smooth else max(2 * error(plain, grad), 1e-7)
    for net, state, most in ((energy, x, allowed), (exact, x.double(), 1e-13)):
        score = lean(net, state)
        for want_energies in (True, False, True):
            got_energies, got = score(state, want_energies)
            assert error(got, grad) <= most
            assert got.dtype == state.dtype
            assert got.shape == x.shape
            if want_energies:
                assert got_energies is not None
                assert error(got_energies, energies) <= max(10 * most, 1e-5 * (most > 1e-10))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


ACTIVATIONS = {
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "leaky_relu in place": lambda: nn.LeakyReLU(0.05, inplace=True),
    "leaky_relu 0": lambda: nn.LeakyReLU(0.0),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "softplus": nn.Softplus,
    "softplus sharp": lambda: nn.Softplus(3.0, 2.0),
    "elu": nn.ELU,
    "elu half": lambda: nn.ELU(0.5, inplace=True),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
# softplus sharp: torch's derivative jumps at the threshold.
KINKED = [name for name in ACTIVATIONS if "relu" in name or "sharp" in name]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    make = ACTIVATIONS[name]
    energy = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1), make(), nn.Conv2d(6, 8, 4, 2, 1), make(),
            nn.Flatten(), nn.Linear(96, 10), make(), nn.Linear(10, 1),
        )
    )  # fmt: skip
    check(energy, 2 * numbers(SHAPE), smooth=name not in KINKED)


@pytest.mark.parametrize(
    ("logits", "keepdim"),
    [(lambda h: h.flatten(1), False), (lambda h: h[:, :, 0, 0], True), (lambda h: h, True)],
)
def test_logsumexp(logits: Callable[[Tensor], Tensor], keepdim: bool) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, (7, 5))

        def forward(self, x: Tensor) -> Tensor:
            found = logits(4 * self.second(torch.nn.functional.silu(self.first(x))))
            return -found.logsumexp(tuple(range(1, found.ndim)), keepdim)

    check(seeded(Energy), 2 * numbers(SHAPE), smooth=True)


CONVOLUTIONS = [
    {"kernel_size": k, "stride": s, "padding": p, "dilation": d, "groups": g}
    for k, s, p, d, g in [
        (1, 1, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 0, 1, 1), (3, 2, 1, 1, 2), (4, 2, 1, 1, 4),
        (3, 1, 2, 2, 1), (3, 3, 4, 2, 2), ((3, 2), (2, 3), (1, 2), (1, 2), 1), (5, 1, 2, 1, 4),
        (2, 4, 0, 1, 1), ((9, 7), 1, 0, 1, 1), (3, (1, 2), "valid", 1, 1), (3, 1, "same", 2, 1),
    ]
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "chains", "bias"),
    [(options, 1 + 2 * (i % 2), i % 3 > 0) for i, options in enumerate(CONVOLUTIONS)],
    ids=str,
)
def test_convolutions(options: dict, chains: int, bias: bool) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 8, **options, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.first(x)).mean((1, 2, 3))

    check(seeded(Energy), numbers((chains, *SHAPE[1:])), smooth=True)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 3, "dilation": 2}, {"groups": 3}])
def test_convolutions_of_sequences(options: dict) -> None:
    energy = seeded(
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 4, **options), nn.SiLU(), nn.Conv1d(6, 4, 3, bias=False), nn.Tanh(),
            nn.Flatten(), nn.LazyLinear(1),
        )
    )  # fmt: skip
    energy(numbers((1, 3, 13)))
    check(energy, numbers((3, 3, 13)), smooth=True)


@pytest.mark.parametrize(
    ("activation", "layout", "mkldnn"),
    [
        ("leaky_relu", torch.contiguous_format, True),
        ("leaky_relu", torch.channels_last, False),
        ("silu", torch.channels_last, True),
        ("silu", torch.contiguous_format, False),
    ],
)
def test_the_papers_net(activation: str, layout: torch.memory_format, mkldnn: bool) -> None:
    energy = seeded(lambda: fl.ConvEnergy(size=16, width=6, activation=activation))
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        x = numbers((5, 3, 16, 16)).to(memory_format=layout)
        check(energy, x, smooth=activation == "silu")


BODIES: dict[str, Callable[[Body, Tensor], Tensor]] = COMMON | {
    "residual of an activation": lambda m, x: mean(m.three(block(m, F.elu(m.one(x))))),
    "energy in the tail and after": lambda m, x: F.softplus(mean(h := F.silu(m.one(x)))) + mean(h),
    "linear": lambda m, x: m.three(m.one(x)).flatten(1).sum(-1),
    "last activation on the energy": lambda m, x: F.softplus(mean(m.one(x))),
    "pools": lambda m, x: F.adaptive_avg_pool2d(
        F.avg_pool2d(F.silu(m.one(F.avg_pool2d(F.silu(m.two(x)), 2, 1, 1, count_include_pad=False)))
        , 3, (2, 1), 1, ceil_mode=True), 1).sum(1),
    "views": lambda m, x: mean(
        m.one(F.silu(m.two(x).flatten(1)).view(-1, 7, 4, 9).reshape(x.shape))
    ),
    "gated": lambda m, x: mean(m.one(torch.sigmoid(m.one(x)) * torch.tanh(m.two(x)))),
    "squared": lambda m, x: mean((h := m.one(x)) * h * F.silu(h)),
    "multiplied before an activation in place": lambda m, x: mean(
        m.one(F.relu_(h := m.one(x)) * m.two(x)) + torch.tanh(h)
    ),
    "batch norm in the tail": lambda m, x: mean(m.norm(F.silu(m.one(x)))),
    "max pool": lambda m, x: mean(
        m.one(F.max_pool2d(F.silu(m.two(F.max_pool2d(x, 3, 2, 1))), (2, 1), dilation=2))
    ),
    "sums kept": lambda m, x: F.silu(m.one(x).sum((1, 3), keepdim=True)).mean((1, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_graphs(body: Callable[[Body, Tensor], Tensor]) -> None:
    check(seeded(lambda: Body(body)), numbers(SHAPE), smooth=True)


def test_activations_in_place_that_autograd_refuses() -> None:
    """An in-place relu on what a tanh has saved is refused for autograd's own reason."""
    energy, x = Body(lambda m, x: mean(F.relu_(torch.tanh(m.one(x))))), numbers(SHAPE)
    refusal = recognise(energy, x)
    assert isinstance(refusal, str)
    assert "modified by an inplace operation" in refusal
    with pytest.raises(RuntimeError, match="inplace"):
        fl.LangevinSampler(energy, 2)(x, seed=0)


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[n]": lambda e: e.flatten(),
    "[n, 1]": lambda e: e,
    "[n, 1, 1, 1]": lambda e: e[:, :, None, None],
    "negated": lambda e: -e,
    "squeezed": lambda e: e.squeeze(),
    "scaled": lambda e: -e * 0.3 / 7,
    "selected": lambda e: e[:, 0],
}


@pytest.mark.parametrize("shape", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(shape: Callable[[Tensor], Tensor]) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(252, 20), nn.Tanh(), nn.Linear(20, 1, bias=False)
            )

        def forward(self, x: Tensor) -> Tensor:
            return shape(self.net(x))

    for chains in (1, 3):
        check(seeded(Energy), numbers((chains, *SHAPE[1:])), smooth=True)


def test_an_empty_batch() -> None:
    energies, grad = lean(fl.ConvEnergy(size=8, width=2), torch.zeros(0, 3, 8, 8))(
        torch.zeros(0, 3, 8, 8), True
    )
    assert energies is not None
    assert energies.shape == (0,)
    assert grad.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_goes_where_autograds_goes(name: str) -> None:
    energy = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3), ACTIVATIONS[name](), nn.Conv2d(6, 1, (7, 5)), nn.Flatten()
        )
    )
    x = numbers(SHAPE)
    x[1, 2, 3, 4] = float("nan")
    score = lean(energy, x)
    energies, grad = score(x, True)
    _, again = score(x, False)
    want_energies, want = energy_and_grad(energy, x, {})
    assert energies is not None
    assert torch.allclose(energies, want_energies, equal_nan=True, rtol=1e-5)
    for got in (grad, again):
        assert torch.allclose(got, want, equal_nan=True, rtol=1e-4, atol=1e-6)
    assert bool(energies.isnan()[1])
    assert not bool(energies.isnan()[0])


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda net: net.layers[0].weight.mul_(-1.5),
    "bias": lambda net: net.layers[2].bias.add_(1.0),
    "head": lambda net: net.layers[-1].weight.mul_(-1.5),
    "replaced data": lambda net: setattr(net.layers[0].weight, "data", -1.5 * net.layers[0].weight),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_weights_that_change_are_read_again(write: Callable[[nn.Module], Any]) -> None:
    energy, x = seeded(lambda: fl.ConvEnergy(size=8, width=4)), numbers((3, 3, 8, 8))
    score = lean(energy, x)
    before = [score(x, False)[1], score(x, True)[1]]
    with torch.no_grad():
        write(energy)
    _, want = energy_and_grad(energy, x, {})
    for want_energies, old in itertools.product((True, False), before):
        got = score(x, want_energies)[1]
        assert torch.allclose(got, want, atol=1e-6)
        assert not torch.allclose(got, old, atol=1e-4)


def test_begin_reads_what_leaves_no_version() -> None:
    energy, x = seeded(lambda: fl.ConvEnergy(size=8, width=4)), numbers((3, 3, 8, 8))
    score = lean(energy, x)
    score(x, False)
    energy.layers[0].weight.data.mul_(-1.5)
    score.begin()
    assert torch.allclose(score(x, False)[1], energy_and_grad(energy, x, {})[1], atol=1e-6)


def test_the_state_and_the_weights_are_left_alone() -> None:
    energy = seeded(lambda: nn.Sequential(nn.ELU(inplace=False), fl.ConvEnergy(size=8, width=4)))
    x = numbers((3, 3, 8, 8)).to(memory_format=torch.channels_last)
    before, state = x.clone(), copy.deepcopy(energy.state_dict())
    first = lean(energy, x)
    one = first(x, True)[1].clone()
    two = first(x, True)[1]
    assert torch.equal(one, two)
    assert torch.equal(x, before)
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), energy.state_dict().values(), strict=True)
    )
    assert all(p.grad is None and p.requires_grad for p in energy.parameters())


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_bf16_is_as_good_as_autocast(activation: str) -> None:
    """The state comes and its gradient goes in float32, rounded once on each way."""
    energy = seeded(lambda: fl.ConvEnergy(size=16, width=8, activation=activation))
    x = numbers((4, 3, 16, 16))
    _, exact = energy_and_grad(copy.deepcopy(energy).double(), x.double(), {})
    _, plain = energy_and_grad(energy, x, {}, "bf16")
    grad = lean(energy, x, "bf16")(x, True)[1]
    assert grad.dtype == torch.float32
    assert error(grad, exact) <= 2 * error(plain, exact)
    assert error(grad, exact) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_signs(dtype: torch.dtype) -> None:
    """Native against plain torch, which is checked by hand below."""
    for size in (0, 1, 7, 8, 9, 1023, 65600):
        check_signs(size, dtype)


def check_signs(size: int, dtype: torch.dtype) -> None:
    values, grad = numbers((size,)), numbers((size,), 1)
    for k, special in enumerate((0.0, -0.0, float("nan"), float("inf"), -float("inf"))):
        values[k::11], grad[2 * k :: 13] = special, special
    values, grad = values.to(dtype), grad.to(dtype)
    for unordered in (False, True):
        bits = pack_signs(values, unordered)
        assert torch.equal(bits, pack_signs_ref(values, unordered))
        for slope in (0.2, 0.0):
            got, want = (f(grad.clone(), bits, slope) for f in (apply_signs_, apply_signs_ref_))
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
            assert torch.equal(got.isnan(), want.isnan())


def test_signs_by_hand() -> None:
    values = torch.tensor([1.0, -1.0, 0.0, float("nan"), 2.0, -2.0, -3.0, 4.0, 5.0])
    for pack in (pack_signs, pack_signs_ref):
        assert pack(values).tolist() == [0b10010001, 1]
        assert pack(values, True).tolist() == [0b10011001, 1]
    for apply in (apply_signs_, apply_signs_ref_):
        got = apply(torch.ones(9), pack_signs(values), 0.5)
        assert got.tolist() == [1.0, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 1.0, 1.0]
    image = numbers((2, 3, 5, 4)).to(memory_format=torch.channels_last)
    got = apply_signs_(torch.ones_like(image), pack_signs(image), 0.5)
    assert torch.equal(got, torch.where(image > 0, 1.0, 0.5))


def test_threads_share_a_score() -> None:
    energy = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3),
            nn.GELU(), nn.Flatten(), nn.Linear(32, 1),
        )
    )  # fmt: skip
    run = fl.LangevinSampler(energy, steps=3, gradient="explicit")
    starts = [numbers((2, 3, 8, 8), seed) for seed in range(4)]
    want = [run(x, seed=0) for x in starts]
    found: list[list[Tensor]] = [[] for _ in starts]

    def work(k: int) -> None:
        found[k] += [run(starts[k], seed=0) for _ in range(8)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(starts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for ends, end in zip(found, want, strict=True):
        assert len(ends) == 8
        assert all(torch.equal(x, end) for x in ends)
