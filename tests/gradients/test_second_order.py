"""The explicit second-order pass: against plain loops through autograd, and where it is left."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import fastlangevin as fl
from fastlangevin.adjoint.storage import Allocations
from fastlangevin.gradients.derivatives import derivatives
from fastlangevin.gradients.graph.ir import Node
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.gradients.layers import Activation
from fastlangevin.gradients.second_order import SecondOrderGradient

N, K = 3, 4
SHAPE = (N, 2, 8, 8)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": lambda: nn.Softplus(2.0, 1.0),  # a threshold that values reach
    "elu": lambda: nn.ELU(0.7),
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def numbers(shape: Any, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Parts(nn.Module):
    """An energy of some modules, with weights of its own."""

    def __init__(self, run: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(parts)
        for i, parameter in enumerate(self.parameters()):
            size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.data = size * numbers(parameter.shape, 100 + i)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.run(x, *self.parts, **kwargs)


def stack(act: nn.Module) -> Parts:
    """Strides, groups, dilation and, at its end, a large weight for few places."""
    return Parts(
        lambda x, net: net(x).flatten(),
        nn.Sequential(
            nn.Conv2d(2, 4, 3, 1, 1), act, nn.Conv2d(4, 6, 4, 2, 1, groups=2), act,
            nn.Conv2d(6, 6, 3, 1, 2, dilation=2), act, nn.Conv2d(6, 20, (4, 3), (2, 3), (1, 0)),
            act, nn.Conv2d(20, 1, (2, 1)),
        ),
    )  # fmt: skip


def residual(act: nn.Module) -> Parts:
    """Values that several read: before activations, after them, and the state itself."""

    def run(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
        h = a(x) - 0.5 * b(x)
        h = h + c(act(h))
        h = F.avg_pool2d(act(c(act(h)) + h), 2) / 3
        return -d(h.mean((2, 3))).sum(1)

    return Parts(run, *(nn.Conv2d(i, 4, 3, 1, 1) for i in (2, 2, 4)), nn.Linear(4, 5))


def classifier(act: nn.Module) -> Parts:
    """Logits, as energies by JEM have them, and the state read by an activation itself."""

    def run(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        h = act(a(act(x)))
        return -b(h.flatten(1)).logsumexp(1) + 0.1 * h.sum((1, 2, 3))

    return Parts(run, nn.Conv2d(2, 3, 4, 2, 1), nn.Linear(48, 5))


def plain(
    energy: nn.Module, x: Tensor, z: Tensor, a: Any = 0.3, b: Any = 0.2, clamp: Any = None,
    grad_clip: Any = None, noise_order: str = "after", straight: bool = False,
) -> Tensor:  # fmt: skip
    """The loop that people write, with all of its graph."""
    lo, hi = clamp or (-float("inf"), float("inf"))
    for noise in z:
        if noise_order == "before":
            x = (x + b * noise).clamp(lo, hi)
        at = x.detach().requires_grad_() if straight or not x.requires_grad else x
        (g,) = torch.autograd.grad(energy(at).sum(), at, create_graph=True)
        if isinstance(grad_clip, tuple):
            g = g * (grad_clip[1] / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
        elif grad_clip is not None:
            g = g.clamp(-grad_clip, grad_clip)
        x = (x - a * g + b * noise * (noise_order == "after")).clamp(lo, hi)
        if noise_order == "last":
            x = x + b * noise
    return x


def check(
    energy: nn.Module, checkpoint: Any = "step", dtype: torch.dtype = torch.float64,
    explicit: bool = True, x_grad: bool = True, coefficients: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Gradients are those of the plain loop, those that are None too, by the pass that is meant."""
    energy.to(dtype)
    x0 = (0.7 * numbers(SHAPE)).to(dtype).requires_grad_(x_grad)
    z, weight = numbers((K, *SHAPE), 1).to(dtype), numbers(SHAPE, 2).to(dtype)
    a, b = (torch.tensor(v, dtype=dtype, requires_grad=coefficients) for v in (0.3, 0.2))
    tensors = (x0, a, b, *energy.parameters())
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    call = {"differentiable": True, "checkpoint": checkpoint, "noise": z}
    straight = options.pop("straight", False)
    sampler = fl.LangevinSampler(energy, K, a, b, **options)
    begin = SecondOrderGradient.begin
    with mock.patch.object(SecondOrderGradient, "begin", autospec=True, side_effect=begin) as begun:
        out = sampler(x0, **call, grad_through="straight" if straight else "exact")
        ours = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    assert begun.called == explicit
    for name in ("gradient", "precision"):
        options.pop(name, None)
    want = plain(energy, x0, z, a, b, straight=straight, **options)
    wanted = torch.autograd.grad((want * weight).sum(), leaves, allow_unused=True)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    for got, to in zip(ours, wanted, strict=True):
        assert (got is None) == (to is None)
        if got is not None:
            assert got.shape == to.shape
            assert float((got - to).abs().max()) <= rtol * float(to.abs().max())


@pytest.mark.parametrize(
    ("activation", "make", "dtype"),
    [
        (name, (stack, residual, classifier)[i % 3], (torch.float64, torch.float32)[i % 2])
        for i, name in enumerate([*ACTIVATIONS, "silu", "relu", "tanh"])
    ],
)
def test_gradients_of_a_plain_loop(activation: str, make: Callable, dtype: torch.dtype) -> None:
    check(make(ACTIVATIONS[activation]()), dtype=dtype)


OPTIONS = [
    {"noise_order": "before", "clamp": (-0.9, 0.8)},
    {"noise_order": "last", "clamp": (-0.9, 0.8), "grad_clip": 0.1},
    {"clamp": (-0.9, 0.8), "grad_clip": ("chain_norm", 0.5), "coefficients": True},
    {"straight": True, "clamp": (-0.9, 0.8)},
    {"straight": True, "noise_order": "before", "coefficients": True},
    {"x_grad": False, "noise_order": "last"},
    {"gradient": "explicit", "precision": "fp32", "coefficients": True},
]


@pytest.mark.parametrize(
    ("options", "make", "checkpoint"),
    [
        (options, each, ("step", 2, 1)[(i + j) % 3])
        for i, options in enumerate(OPTIONS)
        for j, each in enumerate((lambda: stack(nn.LeakyReLU(0.2)), lambda: residual(nn.SiLU())))
        if j or i % 2
    ],
)
def test_gradients_by_options(options: dict, make: Callable, checkpoint: Any) -> None:
    check(make(), checkpoint, **options)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_some_weights_frozen(activation: Callable) -> None:
    """Those of either end, weights alone, biases alone, all; and x0 beside them."""
    each = ("0", "8", "none") if activation is nn.ReLU else ("weight", "bias", "none")
    for trained in each:
        energy = stack(activation())
        for name, parameter in energy.named_parameters():
            parameter.requires_grad_(trained in name.split("."))
        if activation is nn.SiLU or trained != "none":
            check(energy, checkpoint=2)
        if trained in ("0", "weight"):
            check(energy, x_grad=False)


def test_swish_and_batch_norms_that_are_not_trained() -> None:
    def run(x: Tensor, one: nn.Module, two: nn.Module, norm: nn.Module) -> Tensor:
        h = norm(one(x))
        h = norm(two(h * torch.sigmoid(h)))
        return norm(h * torch.sigmoid(1.7 * h)).sum((1, 2, 3))

    norm = nn.BatchNorm2d(4).eval()
    energy = Parts(run, nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), norm)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.requires_grad_(False)
    check(energy)
    norm.requires_grad_(True)
    check(energy, explicit=False)
    product = Parts(lambda x, one: (one(x) * torch.tanh(x)).sum((1, 2, 3)), nn.Conv2d(2, 2, 1))
    check(product, explicit=False)
    pool = Parts(lambda x, one: F.max_pool2d(one(x), 2).tanh().sum((1, 2, 3)), nn.Conv2d(2, 2, 1))
    check(pool, explicit=False)


def test_sequences() -> None:
    energy = Parts(
        lambda x, net: net(x.flatten(2)).sum((1, 2)),
        nn.Sequential(nn.Conv1d(2, 4, 5, 2, 1), nn.SiLU(), nn.Conv1d(4, 3, 3), nn.Tanh()),
    )
    check(energy)
    check(energy, x_grad=False, straight=True)


class Views(nn.Module):
    """Weights that are views of parameters: turned, cut out, spread and shared."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 3, 2, 4), (4, 1, 3, 3), (1,), (9, 64))
        self.all = nn.ParameterList(0.3 * numbers(size, i) for i, size in enumerate(sizes))

    def forward(self, x: Tensor) -> Tensor:
        turned, spread, bias, long = self.all
        h = F.silu(F.conv2d(x, turned.permute(3, 2, 0, 1), bias.expand(4), padding=1))
        for _ in range(2):
            h = F.silu(F.conv2d(h, spread.expand(4, 4, 3, 3), padding=1))
        return F.silu(F.linear(h.mean(1).flatten(1), long[2:8])).sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_views_come_to_what_they_view(dtype: torch.dtype) -> None:
    check(Views(), dtype=dtype)


def test_an_energy_without_activations() -> None:
    """Its gradient is the same everywhere, and its weights' derivative that of x's shift alone."""
    linear = Parts(lambda x, a, b: b(a(x).flatten(1)), nn.Conv2d(2, 3, 4, 2, 1), nn.Linear(48, 1))
    check(linear)
    check(linear, x_grad=False, straight=True)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if "relu" not in name])
def test_derivatives_far_out(activation: str) -> None:
    """First and second, in float32, against autograd in float64; past where exp overflows, too."""
    x = torch.cat([torch.linspace(-200, 200, 400), torch.linspace(-6, 6, 500), torch.zeros(1)])
    module, at = ACTIVATIONS[activation](), x.double().requires_grad_()
    (first,) = torch.autograd.grad(module(at).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), at)
    kind, settings = {
        "softplus": ("softplus", (2.0, 1.0)),
        "elu": ("elu", (0.7,)),
        "gelu": ("gelu", (0.0,)),
        "gelu by tanh": ("gelu", (1.0,)),
    }.get(activation, (activation, ()))
    layer = Activation(Node(kind, (0,), x.shape, settings), x.device, wanted=True)
    layer.forward(x)
    slope, turn = derivatives(layer)
    torch.testing.assert_close(slope.double(), first.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(turn.double(), second, rtol=1e-5, atol=1e-5)


def test_what_a_step_keeps() -> None:
    """Of a piecewise linear net its gradients, and a bit a value in place of activations."""
    net, x = fl.ConvEnergy(width=8), torch.zeros(4, 3, 32, 32)
    graph = recognise(net, x)
    assert not isinstance(graph, str)
    score = SecondOrderGradient(graph, x)
    score.begin()
    with Allocations() as memory:
        energies, grad, kept = score.first(x + 0.1)
        values = 4 * sum(8 * 2**i * (32 // 2**i) ** 2 for i in range(4))
        assert memory.live <= 4 * values + values / 8 + 4 * grad.numel() + 4096
        back, *parts = score.second(kept, grad, want_x=True)
        assert back is None
        assert all(bool(part.any()) for part in parts[::2])
        del back, parts, kept, energies, grad
    assert memory.live == 0


@pytest.mark.parametrize(
    ("checkpoint", "gradient"), [("step", "auto"), (2, "autograd"), (2, "auto")]
)
def test_gradients_to_given_noise(checkpoint: Any, gradient: str) -> None:
    """To its own entry from each step; zero where b is, or before grad_steps."""
    energy, x0 = stack(nn.SiLU()).double(), numbers(SHAPE).requires_grad_()
    base = numbers((K, *SHAPE), 1).requires_grad_()
    for options in ({}, {"noise_std": [0.0, 0.1, 0.0, 0.3]}, {"grad_steps": 2}):
        call = {key: options[key] for key in options if key == "grad_steps"}
        std = options.get("noise_std", 0.2)
        run = fl.LangevinSampler(energy, K, 0.3, std, gradient=gradient)
        grads = []
        for schedule in (checkpoint, "none"):
            out = run(x0, noise=2 * base, differentiable=True, checkpoint=schedule, **call)
            out = (out * numbers(SHAPE, 2)).sum()
            grads.append(torch.autograd.grad(out, [base, *energy.parameters()][:-1]))
        for ours, want in zip(*grads, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)


def test_gradients_to_given_noise_take_no_room_of_their_own() -> None:
    """Beside the noise's one gradient a step has no other that grows with the chain."""
    peaks = []
    for steps in (10, 20):
        energy, x0 = fl.GaussianEnergy(), torch.zeros(2, 500)
        noise = torch.zeros(steps, 2, 500, requires_grad=True)
        out = fl.LangevinSampler(energy, steps, 0.1)(
            x0, noise=noise, differentiable=True, checkpoint=1
        ).sum()
        with Allocations() as memory:
            torch.autograd.grad(out, noise)
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] <= 1.2 * 10 * 1000 * 4


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_energies_when_computed_again_are_the_same(activation: str) -> None:
    """Bit for bit: what the backward pass compares may be small beside what it sums."""
    energy, x = stack(ACTIVATIONS[activation]()).float(), numbers(SHAPE).float()
    graph = recognise(energy, x)
    assert not isinstance(graph, str)
    score = SecondOrderGradient(graph, x)
    score.begin()
    (one, grad), (again, differentiable) = score(x, want_energies=True), score.differentiable(x)
    assert one is not None
    assert torch.equal(one, again)
    torch.testing.assert_close(grad, differentiable)


# Where autograd differentiates -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "options", "reason"),
    [
        (lambda: stack(nn.SiLU()), {"gradient": "autograd"}, 'the gradient is "autograd"'),
        (lambda: stack(nn.Hardtanh(-0.5, 0.5)), {}, "hardtanh is not supported"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 1)).bfloat16(), {}, "half precision"),
        (lambda: stack(nn.SiLU()), {"precision": "bf16"}, "half precision"),
    ],
)
def test_explain_says_which_pass(energy: Callable, options: dict, reason: str) -> None:
    text = fl.LangevinSampler(energy(), K, **options).explain(torch.zeros(SHAPE))
    assert "a recomputed step is differentiated twice by autograd: " in text
    assert reason in text
    text = fl.LangevinSampler(stack(nn.SiLU()), K).explain(torch.zeros(SHAPE))
    assert "differentiated by an explicit second-order pass" in text


def test_the_general_way_where_it_is_asked_for_or_needed() -> None:
    check(stack(nn.SiLU()), gradient="autograd", explicit=False)
    check(stack(nn.Hardtanh(-0.5, 0.5)), explicit=False)
    computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    check(Parts(lambda x, net: F.silu(net(x)).sum((1, 2, 3)), computed), explicit=False)
    energy = stack(nn.SiLU())
    hook = energy.register_forward_pre_hook(lambda module, inputs: None)
    check(energy, explicit=False)
    hook.remove()
    check(energy)


def test_energies_that_are_given_more() -> None:
    energy, y = classifier(nn.SiLU()).double(), numbers((N,), 5).requires_grad_()
    run = energy.run
    energy.run = lambda x, *parts, y: y * run(x, *parts)
    x0, grads = numbers(SHAPE), []
    for checkpoint in ("step", "none"):
        sampler = fl.LangevinSampler(energy, K, 0.3)
        out = sampler(x0, seed=0, y=y, differentiable=True, checkpoint=checkpoint)
        grads.append(torch.autograd.grad(out.square().sum(), [y, *energy.parameters()][:-1]))
    for ours, want in zip(*grads, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)


def test_backward_under_autocast_changes_nothing() -> None:
    """A chain that has run in float32 is differentiated in float32."""
    energy = stack(nn.SiLU()).float()
    x0, grads = numbers(SHAPE).float().requires_grad_(), []
    for enabled in (False, True):
        out = fl.LangevinSampler(energy, K, 0.3)(x0, seed=0, differentiable=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(out.sum(), [x0, *energy.parameters()][:-1]))
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


@pytest.mark.parametrize("checkpoint", ["step", 2])
def test_weights_changed_between_the_passes(checkpoint: Any) -> None:
    """Packed weights of the forward pass must not hide it: they are read again."""
    energy, x0 = stack(nn.SiLU()).double(), numbers(SHAPE).requires_grad_()
    for change in (lambda p: p.data.mul_(1.1), lambda p: p.detach().mul_(1.1)):
        run = fl.LangevinSampler(energy, K, 0.3)
        out = run(x0, seed=0, differentiable=True, checkpoint=checkpoint)
        change(energy.parts[0][2].weight)
        match = "or with other weights now|modified by an inplace operation"
        with pytest.raises(RuntimeError, match=match):
            torch.autograd.grad(out.sum(), x0)


def test_a_checkpoint_around_the_first_chain_of_a_sampler() -> None:
    """It counts saved tensors: those of the recording, which is made once, must not be among."""
    for energy, differentiable in (
        (stack(nn.SiLU()).double(), True),
        (fl.ConvEnergy(2, 8, 2, activation="silu").double(), False),
    ):
        x0 = numbers(SHAPE).requires_grad_()
        run = fl.LangevinSampler(energy, K, 0.3)

        def loss(x: Tensor, run: Any = run, how: bool = differentiable) -> Tensor:
            return x.square().sum() * run(x, seed=0, differentiable=how).sum()

        out = torch.utils.checkpoint.checkpoint(loss, x0, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(out, x0), torch.autograd.grad(loss(x0), x0))
