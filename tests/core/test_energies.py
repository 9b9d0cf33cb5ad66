"""The paper's ConvNets and the Gaussian whose chain is known exactly."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import fastlangevin as fl
from fastlangevin.energies import ACTIVATIONS

# Table 6 of arXiv 1904.09770 at n_f = 32, 64, 128 and, for 64x64, one more 4x4 layer of 8 n_f.
PARAMETERS = {
    (32, 32): 693_569,
    (32, 64): 2_763_393,
    (32, 128): 11_031_809,
    (64, 32): 1_742_401,
    (64, 64): 6_958_209,
    (64, 128): 27_810_049,
}


@pytest.mark.parametrize(("size", "width"), PARAMETERS)
def test_parameter_counts(size: int, width: int) -> None:
    with torch.device("meta"):
        net = fl.ConvEnergy(3, size, width)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[size, width]


def by_hand(w: int, activation: nn.Module) -> nn.Sequential:
    """The 32x32 network layer by layer, from the paper's table."""
    return nn.Sequential(
        *[nn.Conv2d(3, w, kernel_size=3, stride=1, padding=1), activation],
        *[nn.Conv2d(w, 2 * w, kernel_size=4, stride=2, padding=1), activation],
        *[nn.Conv2d(2 * w, 4 * w, kernel_size=4, stride=2, padding=1), activation],
        *[nn.Conv2d(4 * w, 8 * w, kernel_size=4, stride=2, padding=1), activation],
        nn.Conv2d(8 * w, 1, kernel_size=4, stride=1, padding=0),
    )


ACTIVATION_MODULES = {
    "leaky_relu": nn.LeakyReLU(0.05),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "softplus": nn.Softplus(),
    "elu": nn.ELU(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_conv_energy_equals_the_network_built_by_hand(activation: str, n: int) -> None:
    net = fl.ConvEnergy(width=8, leak=0.05, activation=activation)
    hand = by_hand(8, ACTIVATION_MODULES[activation])
    for ours, theirs in zip(net.parameters(), hand.parameters(), strict=True):
        theirs.data.copy_(ours)
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(net(x), hand(x).view(n))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_conv_energy_of_every_size_has_the_papers_widths_and_reads_every_pixel(size: int) -> None:
    """A stride-2 layer per halving from ``size`` to 4, and every pixel counts."""
    net = fl.ConvEnergy(channels=1, size=size, width=2, activation="silu").double()
    convolutions = [layer for layer in net.layers if isinstance(layer, nn.Conv2d)]
    halvings = int(math.log2(size)) - 2
    widths = [2, 4, 8, 16, 16, 16, 16]
    assert [layer.out_channels for layer in convolutions] == [*widths[: halvings + 1], 1]
    assert net.shape == (1, size, size)
    x = torch.zeros(2, *net.shape, dtype=torch.float64, requires_grad=True)
    energy = net(x)
    (grad,) = torch.autograd.grad(energy.sum(), x)
    assert energy.shape == (2,)
    assert bool((grad != 0).all())


def test_the_default_is_the_papers_network() -> None:
    assert fl.ConvEnergy().settings() == {
        "channels": 3,
        "size": 32,
        "width": 64,
        "leak": 0.2,
        "activation": "leaky_relu",
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_settings_rebuild_the_network(activation: str) -> None:
    net = fl.ConvEnergy(channels=1, size=16, width=4, leak=0.01, activation=activation)
    again = fl.ConvEnergy(**json.loads(json.dumps(net.settings())))
    again.load_state_dict(net.state_dict())
    x = torch.randn(3, 1, 16, 16)
    assert torch.equal(again(x), net(x))
    assert again.settings() == net.settings()
    assert f"activation={activation!r}" in repr(net)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"size": 48}, "size must be a power of two in 8..256, got 48"),
        ({"size": 4}, "size must be a power of two"),
        ({"size": 512}, "size must be a power of two"),
        ({"size": 8.0}, "size must be a power of two"),
        ({"channels": 0}, "channels must be an integer >= 1, got 0"),
        ({"channels": 1.5}, "channels must be an integer >= 1"),
        ({"width": -1}, "width must be an integer >= 1, got -1"),
        ({"width": True}, "width must be an integer >= 1, got True"),
        ({"leak": -0.1}, "leak must be finite and >= 0, got -0.1"),
        ({"leak": math.nan}, "leak must be finite and >= 0"),
        ({"activation": "gelu"}, "activation must be one of leaky_relu, relu"),
    ],
    ids=str,
)
def test_constructor_errors(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"ConvEnergy: {match}"):
        fl.ConvEnergy(**wrong)


@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (2, 1, 8, 8), (3, 8, 8), (2, 3, 8, 8, 1)])
def test_images_of_another_shape(shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"ConvEnergy: x must have shape \[n, 3, 8, 8\], got \["):
        fl.ConvEnergy(size=8, width=1)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3, 4), (0, 3)])
def test_gaussian_energy_and_gradient(shape: tuple) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    energy = fl.GaussianEnergy(0.4)(x)
    (grad,) = torch.autograd.grad(energy.sum(), x)
    want = [sum(v * v for v in row.flatten().tolist()) / 0.8 for row in x]
    assert energy.tolist() == pytest.approx(want, rel=1e-14)
    assert torch.allclose(grad, x.detach() / 0.4, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("variance", "h"), [(1.0, 0.1), (0.5, 0.7), (4.0, 7.9)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_stationary_variance(variance: float, h: float, temperature: float) -> None:
    """T s / (1 - h / 2 s), and the fixed point of v <- (1 - h / s)^2 v + b^2."""
    noise_std = math.sqrt(2 * h * temperature)
    got = fl.GaussianEnergy(variance).stationary_variance(h, noise_std)
    assert got == pytest.approx(temperature * variance / (1 - h / (2 * variance)), rel=1e-12)
    assert (1 - h / variance) ** 2 * got + noise_std**2 == pytest.approx(got, rel=1e-12)


@pytest.mark.parametrize("step_size", [2.0, 3.0, 0.0])
def test_no_stationary_variance(step_size: float) -> None:
    with pytest.raises(ValueError, match="GaussianEnergy: step_size must be"):
        fl.GaussianEnergy(1.0).stationary_variance(step_size, 0.1)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_gaussian_variance_must_be_positive(variance: float) -> None:
    with pytest.raises(ValueError, match="GaussianEnergy: variance must be finite and > 0"):
        fl.GaussianEnergy(variance)
