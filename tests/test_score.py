"""d energy / d x through autograd, on its own."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastlangevin.scores.general import energy_and_grad, network_dtype


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


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: net.energy, functools.partial], ids=["", "bound", "part"]
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
