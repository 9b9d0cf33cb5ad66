"""What the recorder recognises, what it refuses and why, and graphs as stacks of convolutions."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlangevin as fl
from fastlangevin.gradients.graph.conv_stack import ConvStack, conv_stack
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import recognise, record

X = torch.zeros(4, 3, 8, 8)
SCALE = 2.0
TABLE = {"scale": 2.0}


def graph(energy: Any, x: Tensor = X) -> Graph:
    found = recognise(energy, x)
    assert isinstance(found, Graph), found
    return found


class Custom(nn.Module):
    """Two convolutions, and a forward that the test gives."""

    def __init__(self, body: Callable[["Custom", Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("kernel", torch.ones(4, 3, 3, 3))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def rows(h: Tensor) -> Tensor:
    return h.flatten(1).sum(1)


STACKS = {
    "paper": lambda: fl.ConvEnergy(size=8, width=4),
    "pools": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=1),
        nn.SiLU(inplace=True),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 1),
    ),
    "linear": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3),
        nn.Flatten(),
        nn.GELU("tanh"),
        nn.Linear(216, 5),
        nn.Tanh(),
        nn.Linear(5, 7, bias=False),
        nn.Softplus(2.0),
        nn.Linear(7, 1),
    ),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ELU(0.5), nn.Linear(5, 1)),
    "no activation between": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 4)
    ),
    "last activation on the energy": lambda: nn.Sequential(nn.Conv2d(3, 1, 8), nn.Softplus()),
    "written out": lambda: Custom(
        lambda m, x: -0.5 * F.relu(m.two(F.leaky_relu(m.one(x), 0.1))).mean((1, 2, 3))
    ),
    "tail of two": lambda: Custom(
        lambda m, x: (lambda h: (h + m.two(h)).mean((1, 2, 3)).squeeze() / 3)(F.relu(m.one(x)))
    ),
    "a method": lambda: fl.ConvEnergy(size=8, width=4).forward,
}


def run_stack(stack: ConvStack, x: Tensor) -> Tensor:
    """A stack's energies in plain torch."""
    for conv in stack.convs:
        x = F.conv2d(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        kind, s = conv.activation.kind, conv.activation.settings
        if kind == "gelu":
            x = F.gelu(x, approximate="tanh" if s[0] else "none")
        else:
            x = getattr(F, kind)(x, *s)
    assert x.shape[1:] == stack.features
    v, c = stack.head()
    return (x * v).sum((1, 2, 3)) + c


@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
def test_a_stack_is_its_energy(make: Callable[[], Any]) -> None:
    energy = make()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stack = conv_stack(graph(energy))
    assert isinstance(stack, ConvStack), stack
    with torch.no_grad():
        for parameter in graph(energy).bases:  # read in place: a later change is seen
            parameter.mul_(1.5)
        assert torch.allclose(run_stack(stack, x), energy(x).flatten(), atol=1e-5)


NO_STACKS = {
    "image": (nn.Linear(5, 1), torch.zeros(2, 5), r"shape \[5\] is not an image"),
    "activation": (nn.Conv2d(3, 1, 8), X, "no activation"),
    "residual": (
        Custom(lambda m, x: rows(F.relu((h := F.relu(m.one(x))) + m.two(h)))),
        X,
        "add is not a convolution",
    ),
    "kept": (Custom(lambda m, x: rows((h := m.one(x)) + F.relu(h))), X, "read again after it"),
    "pool": (
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 1, 4), nn.Tanh()),
        X,
        "avg_pool is not a convolution",
    ),
    "logits": (
        Custom(lambda m, x: -F.relu(m.one(x)).flatten(1).logsumexp(1)),
        X,
        "logsumexp is not",
    ),
    "first": (nn.Sequential(nn.Tanh(), nn.Conv2d(3, 1, 8)), X, "does not follow"),
}


@pytest.mark.parametrize(("energy", "x", "reason"), NO_STACKS.values(), ids=NO_STACKS)
def test_graphs_that_are_no_stacks_say_why(energy: nn.Module, x: Tensor, reason: str) -> None:
    found = conv_stack(graph(energy, x))
    assert isinstance(found, str)
    assert reason.replace("\\", "") in found


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Silent(torch.autograd.Function):
    """Shows no operator at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def hooked(m: Custom, x: Tensor) -> Tensor:
    h = m.one(x)
    h.register_hook(lambda grad: 2 * grad)
    return rows(h)


def changed_view(m: Custom, x: Tensor) -> Tensor:
    h = m.one(x)
    torch.relu_(h.flatten(1))
    return rows(h)


def changed_buffer(m: Custom, x: Tensor) -> Tensor:
    m.kernel.add_(1)
    return rows(m.one(x))


def without_grad(m: Custom, x: Tensor) -> Tensor:
    with torch.no_grad():
        offset = rows(m.two(m.one(x)))
    return rows(m.one(x)) + offset


REFUSED: dict[str, tuple[Callable[[Custom, Tensor], Tensor], str]] = {
    "custom function": (lambda m, x: rows(Reversed.apply(m.one(x))), "autograd.Function"),
    "silent function": (lambda m, x: rows(Silent.apply(m.one(x))), "autograd.Function"),
    "tensor hook": (hooked, "hooks"),
    "detach": (lambda m, x: rows(m.one(x.detach())), "detached"),
    "data": (lambda m, x: rows(m.one(x)) + rows(x.data), "detached"),
    "no_grad": (without_grad, "no_grad"),
    "mixed": (lambda m, x: m.one(x).sum(), "sum mixes chains"),
    "mean over chains": (lambda m, x: rows(m.one(x) * m.one(x).mean(0)), "mean mixes chains"),
    "flipped": (lambda m, x: rows(m.one(x.flip(0))), "flip is not supported"),
    "item": (lambda m, x: rows(m.one(x)) * float(x.detach().sum()), "through __float__()"),
    "branch": (lambda m, x: rows(m.one(x)) if x.sum() > 1 else rows(x), "through __bool__()"),
    "random": (lambda m, x: rows(m.one(x) + torch.randn(1)), "randn draws random numbers"),
    "outside": (lambda m, x: rows(F.conv2d(x, OUTSIDE)), "neither a parameter nor a buffer"),
    "factor": (
        lambda m, x: rows(m.one(x)) / m.kernel[0, 0, 0, 0],
        "div is supported only with a",
    ),
    "changed view": (changed_view, "changes a view"),
    "changed buffer": (changed_buffer, "changes a tensor in place"),
    "cast": (lambda m, x: rows(m.one(x)).double(), "keeps all elements and their dtype"),
    "unknown": (lambda m, x: rows(torch.erf(m.one(x))), "erf is not supported"),
    "cube": (lambda m, x: rows(F.avg_pool3d(m.one(x), 2)), "avg_pool3d is not supported"),
    "negative slope": (lambda m, x: rows(F.leaky_relu(m.one(x), -0.1)), "these settings"),
    "selu": (lambda m, x: rows(F.selu(m.one(x))), "these settings"),
    "shape": (lambda m, x: m.one(x), "has shape [4, 4, 8, 8] for 4 chains"),
    "view over chains": (lambda m, x: rows(x).view(1, -1), "view mixes chains"),
    "part": (lambda m, x: m.one(x)[:, 0, 0, 0], "select is supported only if it keeps all"),
    "raises": (lambda m, x: m.missing, "it raises AttributeError"),
    "constant": (lambda m, x: rows(m.kernel[:2]), "its output has shape [2] for 4 chains"),
}
OUTSIDE = torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(body: Callable[[Custom, Tensor], Tensor], reason: str) -> None:
    module = Custom(body)
    torch.manual_seed(3)
    state, kernel = torch.get_rng_state(), module.kernel.clone()
    found = recognise(module, X)
    assert isinstance(found, str)
    assert reason in found
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.kernel, kernel)


def hook(module: nn.Module, register: str) -> nn.Module:
    getattr(module[0], register)(lambda *_: None)
    return module


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 1))


MODULES: dict[str, tuple[Callable[[], Any], str]] = {
    "dropout": (lambda: nn.Sequential(net(), nn.Dropout()), "Dropout '1' is in train mode"),
    "batch norm": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), net()),
        "BatchNorm2d '0' is in train mode",
    ),
    "old spectral norm": (
        lambda: nn.utils.spectral_norm(nn.Conv2d(3, 1, 8)),
        "has hooks of spectral_norm in train mode",
    ),
    "forward hook": (lambda: hook(net(), "register_forward_hook"), "Conv2d '0' has hooks"),
    "pre-hook": (lambda: hook(net(), "register_forward_pre_hook"), "has hooks"),
    "backward hook": (lambda: hook(net(), "register_full_backward_hook"), "has hooks"),
    "function": (lambda: rows, "is a function, not an nn.Module"),
    "script": (lambda: torch.jit.trace(net(), X), "is compiled"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), MODULES.values(), ids=MODULES)
def test_modules_that_are_refused_say_why(make: Callable[[], Any], reason: str) -> None:
    found = recognise(make(), X)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_a_weight_that_is_computed_is_computed_again_when_it_is_read(
    norm: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(0)
    module = norm(nn.Conv2d(3, 1, 8)).eval()
    found = graph(module)
    for _ in range(2):
        found.refresh()
        constant = found.nodes[0].constants[0]
        assert constant is not None
        torch.testing.assert_close(constant.tensor(), module.weight.detach())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.rand_like(parameter))


def test_a_recording_leaves_no_graph_and_no_flags() -> None:
    module = net()
    module[0].weight.requires_grad_(False)
    graph(module)
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in module.parameters())


class Scaled(nn.Module):
    """Code that is not torch's may read anything."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.net, self.factor = net(), 2.0

    def forward(self, x: Tensor, more: list[float] = [1.0]) -> Tensor:  # noqa: B006
        return self.factor * self.scale * SCALE * TABLE["scale"] * more[0] * self.net(x)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "stride": lambda m: setattr(m[0], "padding", (1, 1)),
    "mode": lambda m: m.eval(),
    "hook": lambda m: m[1].register_forward_hook(lambda *_: None),
    "module": lambda m: m.__setitem__(1, nn.Tanh()),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 3, 3, 3))),
    "data": lambda m: setattr(m[0].weight, "data", torch.ones(2, 3, 5, 5)),
    "dtype": lambda m: m.double(),
    "forward": lambda m: setattr(m[1], "forward", torch.tanh),
    "extra": lambda m: setattr(m, "table", {}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change: Callable[[nn.Sequential], Any]) -> None:
    module = net()
    guard = record(module, X)[0].guard
    assert guard is not None
    assert guard.holds(module, X, {})
    with torch.no_grad():
        module[0].weight.mul_(2)
    assert guard.holds(module, X + 1, {})
    change(module)
    assert not guard.holds(module, X, {})


def test_other_states_are_noticed() -> None:
    module = net()
    guard = record(module, X)[0].guard
    assert guard is not None
    assert not guard.holds(module, X[:, :, :7], {})
    assert not guard.holds(module, X.double(), {})
    assert not guard.holds(module, X[:1], {})
    assert not guard.holds(module, X, {"y": 1})


@pytest.mark.parametrize("change", ["attribute", "class", "global", "table", "default", "forward"])
def test_what_other_code_reads_is_never_stale(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Scaled()
    nn.init.ones_(module.net[0].weight)  # no relu is dead everywhere
    run, general = (
        fl.LangevinSampler(module, 1, noise_std=0.0, gradient=gradient)
        for gradient in ("explicit", "autograd")
    )
    x = torch.linspace(-1, 1, X.numel()).view_as(X)
    before = run(x, seed=0)
    if change == "attribute":
        module.factor = 3.0
    elif change == "class":
        monkeypatch.setattr(Scaled, "scale", 3.0)
    elif change == "global":
        monkeypatch.setitem(globals(), "SCALE", 3.0)
    elif change == "table":
        monkeypatch.setitem(TABLE, "scale", 3.0)
    elif change == "default":
        monkeypatch.setattr(Scaled.forward, "__defaults__", ([3.0],))
    else:
        monkeypatch.setattr(Scaled, "forward", lambda m, x: 3.0 * m.net(x))
    moved, want, was = (end - x for end in (run(x, seed=0), general(x, seed=0), before))
    assert (moved - want).norm() < 1e-3 * want.norm()
    assert (moved - was).norm() > 0.1 * want.norm()


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: rows(m.one(x)) * m.one.bias.tolist()[0], "tolist()"),
        (lambda m, x: rows(m.one(x)) * float(m.one.bias.detach().numpy()[0]), "numpy()"),
        (lambda m, x: rows(m.one(x)) * (1 + (random.random() < 2)), "it calls random.random"),
        (
            lambda m, x: rows(m.one(x)) * (1 + (np.random.rand() < 2)),  # noqa: NPY002
            "random numbers outside torch",
        ),
    ],
)
def test_numbers_that_no_operator_shows_are_refused(forward: Callable, reason: str) -> None:
    found = recognise(Custom(forward), X)
    assert isinstance(found, str)
    assert reason in found
