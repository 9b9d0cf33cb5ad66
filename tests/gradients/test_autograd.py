"""d energy / d x through autograd, on its own."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlangevin import LangevinSampler
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.modules import network_dtype, submodules_of, tensors_of
from tests.pairwise import pairwise


def quartic(x: Tensor, scale: float = 1.0) -> Tensor:
    return scale * x.pow(4).flatten(1).sum(1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_analytic_gradient(x: Tensor, create_graph: bool, requires_grad: bool) -> None:
    x.requires_grad_(requires_grad)
    with torch.no_grad():
        energies, grad = energy_and_grad(quartic, x, {"scale": 0.5}, create_graph=create_graph)
    assert torch.allclose(energies, 0.5 * x.pow(4).sum((1, 2)), rtol=1e-14)
    assert torch.allclose(grad, 2 * x.pow(3), rtol=1e-14)
    assert x.grad is None
    if create_graph and requires_grad:
        (second,) = torch.autograd.grad(grad.sum(), x)
        assert torch.allclose(second, 6 * x.detach().square(), rtol=1e-14)
    assert create_graph or not energies.requires_grad
    assert create_graph or not grad.requires_grad


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_gradient_of_the_gradient_reaches_the_weights(x: Tensor, create_graph: bool) -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    _, grad = energy_and_grad(quartic, x, {"scale": weight}, create_graph=create_graph)
    assert grad.requires_grad == create_graph
    if create_graph:
        (d_weight,) = torch.autograd.grad(grad.sum(), weight)
        assert torch.allclose(d_weight, (4 * x.pow(3)).sum(), rtol=1e-13)


class Half(nn.Module):
    """A network of bfloat16 weights behind an integer buffer and a frozen integer parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros((), dtype=torch.int64), requires_grad=False)
        self.linear = nn.Linear(5, 1, dtype=dtype)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return self.linear(x).tanh().flatten(1).sum(1)

    energy = forward


@pytest.mark.parametrize(
    ("wrap", "dtype", "state"),
    [
        (lambda net: net, torch.bfloat16, torch.float64),
        (lambda net: net, torch.float64, torch.float32),
        (lambda net: net.energy, torch.bfloat16, torch.float32),
        (functools.partial, torch.float32, torch.float64),
    ],
)
def test_the_state_enters_in_the_networks_dtype(
    x: Tensor, wrap: Callable, dtype: torch.dtype, state: torch.dtype
) -> None:
    net = Half(dtype)
    energies, grad = energy_and_grad(wrap(net), x.to(state), {})
    assert net.seen[-1] == dtype
    assert (energies.dtype, grad.dtype) == (dtype, state)
    assert network_dtype(wrap(net), state) == dtype


def test_callables_get_the_states_dtype(x: Tensor) -> None:
    assert network_dtype(quartic, torch.float64) == torch.float64
    assert network_dtype(nn.Flatten(), torch.float32) == torch.float32
    assert energy_and_grad(quartic, x, {})[1].dtype == torch.float64


# How x enters ------------------------------------------------------------------------------------

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Mixed(nn.Module):
    """A body in one dtype beside a term of x and a tensor in another, in the order given."""

    def __init__(self, body: torch.dtype, beside: torch.dtype, buffer: bool, casts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        scale = torch.tensor(0.7, dtype=beside)
        if buffer:
            self.register_buffer("scale", scale)
        else:
            self.scale = nn.Parameter(scale)
        self.linear = nn.Linear(5, 1, dtype=body)
        self.casts = casts

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.linear.weight.dtype) if self.casts else x
        out = self.linear(h).tanh().flatten(1).sum(1)
        return out + self.scale * x.square().flatten(1).sum(1)


@pytest.mark.parametrize(
    ("state", "body", "beside", "casts", "buffer"),
    pairwise([torch.float32, torch.float64], DTYPES, DTYPES, [False, True], [False, True]),
    ids=str,
)
def test_x_enters_as_in_a_plain_loop_or_the_error_says_what_to_do(
    x: Tensor, state: torch.dtype, body: torch.dtype, beside: torch.dtype, casts: bool, buffer: bool
) -> None:
    net, x = Mixed(body, beside, buffer, casts), x.to(state)
    start = x.clone()
    if not casts and body != state:
        if body != beside:
            with pytest.raises(RuntimeError, match="cast x inside the network, or use precision="):
                energy_and_grad(net, x, {})
            return
        start = x.to(body)  # a network of one dtype, which takes no other
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(net(leaf.to(start.dtype)).sum(), leaf)
    energies, grad = energy_and_grad(net, x, {})
    assert torch.equal(energies, net(start))
    assert torch.equal(grad, want)
    sampler = LangevinSampler(net, steps=1, step_size=1.0, noise_std=0.0)
    torch.testing.assert_close(sampler(x, seed=0), x - want)  # by any engine


def test_a_network_that_refuses_the_states_dtype_is_asked_once_a_call(x: Tensor) -> None:
    net = Half(torch.bfloat16)
    LangevinSampler(net, steps=3, gradient="autograd")(x.float(), seed=0)
    assert net.seen == [torch.float32, *[torch.bfloat16] * 3]


def test_modules_and_tensors_of_a_network_are_torchs_in_their_order() -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net = nn.Sequential(nn.Sequential(nn.ELU(), shared), nn.BatchNorm1d(2), shared, nn.Linear(2, 1))
    net.register_module("none", None)
    tensors = [*net.parameters(), *net.buffers()]
    for energy in (net, net.forward, functools.partial(net, extra=1)):
        assert submodules_of(energy) == list(net.modules())
        assert list(map(id, tensors_of(energy))) == list(map(id, tensors))


def test_errors_of_a_networks_own_pass_unchanged(x: Tensor) -> None:
    def energy(x: Tensor) -> Tensor:
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match=r"^of its own$"):
        energy_and_grad(energy, x, {})


# The backward pass -------------------------------------------------------------------------------

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[n]": lambda x: x.tanh().flatten(1).sum(1),
    "[n, 1]": lambda x: F.linear(x.flatten(1), torch.linspace(-1, 1, 10, dtype=x.dtype)[None]),
    "[n, 1, 1, 1]": lambda x: F.avg_pool2d(x.exp()[:, None], (2, 5)),
    "expanded": lambda x: x.square().mean().expand(len(x)),
    "every other one": lambda x: x.pow(3).flatten(1).sum(1).repeat_interleave(2)[::2],
    "[] for one chain": lambda x: x[:1].sin().sum() if len(x) == 1 else x.sin().sum((1, 2)),
    "the states": lambda x: x[:, 0, 0],
}


@pytest.mark.parametrize(("own", "chains"), [(True, 1), (True, 3), (False, 1)])
@pytest.mark.parametrize("energy", OUTPUTS.values(), ids=OUTPUTS)
def test_the_gradient_has_the_bits_of_the_sums(
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    energy: Callable[[Tensor], Tensor],
    own: bool,
    chains: int,
) -> None:
    """Torch's engine gets the gradient of the sum, as torch.autograd.grad would compute it."""
    if not own:
        monkeypatch.setattr("fastlangevin.gradients.autograd._run_backward", None)
    x = x[:chains].float()
    leaf = x.clone().requires_grad_()
    out = energy(leaf)
    (want,) = torch.autograd.grad(out.sum(), leaf)
    energies, grad = energy_and_grad(energy, x, {})
    assert torch.equal(grad, want)
    assert torch.equal(energies, out.detach().reshape(-1))


def test_an_energy_that_is_its_state() -> None:
    x = torch.linspace(-1, 1, 4)
    energies, grad = energy_and_grad(lambda x: x, x, {})
    assert torch.equal(energies, x)
    assert torch.equal(grad, torch.ones(4))


class Overwrites(torch.autograd.Function):
    """A function whose backward pass writes to the gradient that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad *= 2
        return grad[:, None].expand(-1, 5)


def test_a_backward_pass_may_write_to_its_gradient() -> None:
    x = torch.zeros(1, 5)
    sampler = LangevinSampler(Overwrites.apply, 3, noise_std=0.0, gradient="autograd")
    assert torch.equal(sampler(x, seed=0), x - 3 * 2)


def test_the_output_is_checked_at_every_step(x: Tensor) -> None:
    calls = []

    def energy(x: Tensor) -> Tensor:
        calls.append(x)
        return x.square() if len(calls) == 2 else x.square().sum((1, 2))

    with pytest.raises(ValueError, match=r"one value per chain, .*got shape \[3, 2, 5\]"):
        LangevinSampler(energy, 3, gradient="autograd")(x, seed=0)
    assert len(calls) == 2


def test_a_function_mode_sees_the_backward_pass(x: Tensor) -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    want = energy_and_grad(quartic, x, {})
    with Mode():
        got = energy_and_grad(quartic, x, {})
    assert torch.autograd.grad in seen
    assert all(map(torch.equal, got, want))


# Attention ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention written with torch's fused function, or by hand."""

    def __init__(self, fused: bool, causal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.fused, self.causal = nn.Linear(8, 24, dtype=dtype), fused, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (2, 4)).transpose(1, 2) for h in self.qkv(x).chunk(3, -1))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            logits = q @ k.mT / 2
            if self.causal:
                logits = logits + torch.full_like(logits, -torch.inf).triu(1)
            out = logits.softmax(-1) @ v
        return out.square().flatten(1).sum(1)


@pytest.mark.parametrize(
    ("causal", "checkpoint", "grad_through"),
    [(False, "none", "exact"), (True, "step", "straight"), (True, 2, "exact")],
)
def test_chains_of_energies_with_fused_attention_can_be_differentiated(
    causal: bool, checkpoint: str | int, grad_through: str
) -> None:
    found = []
    for fused in (True, False):
        net = Attention(fused, causal, torch.float64)
        x0 = torch.linspace(-1, 1, 96, dtype=torch.float64).reshape(2, 6, 8).requires_grad_()
        out = LangevinSampler(net, steps=3, step_size=0.05)(
            x0, seed=0, differentiable=True, checkpoint=checkpoint, grad_through=grad_through
        )
        out.square().sum().backward()
        found.append([out.detach(), *(t.grad for t in (x0, *net.parameters()))])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_chains_that_are_not_differentiated_keep_the_fused_attention() -> None:
    net = Attention(True, False, torch.float32)
    x0 = torch.linspace(-1, 1, 96).reshape(2, 6, 8)
    leaf = x0.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(leaf).sum(), leaf)
    sampler = LangevinSampler(net, steps=1, step_size=1.0, noise_std=0.0)
    assert torch.equal(sampler(x0, seed=0), x0 - grad)
