"""Transposed convolutions and interpolations on the fused CPU engine, against float64."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlangevin.gradients import fused_cpu
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import recognise
from tests.backends import needs_native

CPU = torch.device("cpu")

pytestmark = needs_native
SHAPE = (5, 4, 5, 7)  # odd and unequal, so that strides leave rows over


class Decoder(nn.Module):
    """A layer under test between two convolutions, and the square of what comes out."""

    def __init__(self, layer: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.act = nn.Conv2d(4, 6, 3, padding=1), layer, act
        self.last = nn.LazyConv2d(3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.layer(F.silu(self.first(x))))
        return self.last(h).square().mean(dim=(1, 2, 3))


class Spread(nn.Module):
    """A vector that becomes an image, whose norm in eval mode and mean follow."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 5)
        self.up = nn.ConvTranspose2d(5, 6, (4, 3))
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.ConvTranspose2d(6, 2, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(F.silu(self.project(x))[:, :, None, None])
        return torch.tanh(self.last(F.relu(self.norm(h)))).mean(dim=(1, 2, 3))


class Viewed(nn.Module):
    """A linear layer whose result is viewed as an image."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.project = nn.Linear(3, 6 * 2 * 4, bias=bias)
        self.last = nn.ConvTranspose2d(6, 2, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.project(x).view(-1, 6, 2, 4))
        return torch.tanh(self.last(h)).mean(dim=(1, 2, 3)) + 0.1 * x.square().sum(1)


class Linear(nn.Module):
    """A linear end of a transposed convolution and an interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 2, 3, 2)
        self.weights = nn.Conv2d(2, 1, (14, 22))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.tanh(self.first(x)))
        return self.weights(F.interpolate(h, scale_factor=2.0)).flatten()


def case(layer: nn.Module, act: nn.Module | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    return Decoder(layer, act or nn.SiLU()), SHAPE


CASES = {
    "3x3": lambda: case(nn.ConvTranspose2d(6, 8, 3, padding=1)),
    "doubling": lambda: case(nn.ConvTranspose2d(6, 24, 4, 2, 1), nn.LeakyReLU(0.2)),
    "padded output": lambda: case(nn.ConvTranspose2d(6, 3, 3, 2, 1, output_padding=1)),
    "gaps": lambda: case(nn.ConvTranspose2d(6, 3, 2, 3), nn.Tanh()),
    "dilated": lambda: case(nn.ConvTranspose2d(6, 3, (2, 3), (1, 2), (0, 1), dilation=(2, 1))),
    "no bias": lambda: case(nn.ConvTranspose2d(6, 8, 3, bias=False)),
    "nearest": lambda: case(nn.Upsample(scale_factor=2)),
    "nearest to a size": lambda: case(nn.Upsample((7, 15)), nn.LeakyReLU(0.2)),
    "bilinear": lambda: case(nn.Upsample(scale_factor=2, mode="bilinear")),
    "aligned": lambda: case(nn.Upsample((8, 11), mode="bilinear", align_corners=True)),
    "of a vector": lambda: (Spread(), (5, 3)),
    "of a viewed vector": lambda: (Viewed(True), (5, 3)),
    "of a viewed vector, no bias": lambda: (Viewed(False), (5, 3)),
    "at a linear end": lambda: (Linear(), (5, 4, 5, 7)),
}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_energies_are_those_of_float64_for_any_split_of_the_batch(name: str) -> None:
    torch.manual_seed(0)
    energy, shape = CASES[name]()
    x = torch.randn(shape)
    energy(x)
    energy.eval()
    energies, grad = energy_and_grad(copy.deepcopy(energy).double(), x.double(), {})
    for precision, bound in (("fp32", 1e-6), ("bf16", 0.1)):
        whole = None
        for size in (x.shape[0], 1):
            graph = recognise(energy, x[:size])
            assert isinstance(graph, Graph), graph
            assert fused_cpu.refusal(graph, x[:size], precision) is None
            engine = fused_cpu.ConvNetGradient(graph, size, precision)
            parts = [engine(part, True) for part in x.split(size)]
            found = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            whole = whole or found
            assert torch.equal(whole[0], found[0])
            assert torch.equal(whole[1], found[1])
        assert error(whole[1], grad) <= bound
        assert error(whole[0], energies.flatten()) <= bound


def test_a_bias_is_stored_once_for_all_chains() -> None:
    held = []
    for chains in (16, 64):
        graph = recognise(Viewed(True), torch.randn(chains, 3))
        assert isinstance(graph, Graph), graph
        engine = fused_cpu.ConvNetGradient(graph, chains)
        held.append(engine.held_bytes() - engine.workspace.nbytes)
    assert held[0] == held[1]


def test_a_transposed_convolution_with_groups_is_refused() -> None:
    energy, shape = case(nn.ConvTranspose2d(6, 4, 3, groups=2))
    x = torch.randn(shape)
    energy(x)
    graph = recognise(energy, x)
    assert isinstance(graph, Graph), graph
    assert fused_cpu.refusal(graph, x, None) == "a convolution has 2 groups"
