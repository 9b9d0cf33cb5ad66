"""The plain unroll that gradients through a chain are compared with, and its energies."""

from typing import Any

import torch
from torch import Tensor, nn

import fastlangevin as fl

N, K = 3, 7
SHAPE = (N, 2, 8, 8)
ACTIVATIONS = ["leaky_relu", "relu", "silu", "softplus", "elu"]


def numbers(shape: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_net(activation: str = "silu", dtype: torch.dtype = torch.float64) -> nn.Module:
    net = fl.ConvEnergy(channels=2, size=8, width=2, activation=activation).to(dtype)
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(0.3 * numbers(parameter.shape, 100 + i))
    return net


def starts(dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.7 * numbers(SHAPE)).to(dtype).requires_grad_()


def sampler(energy: Any, **options: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy, **{"steps": K, "step_size": 0.3, "noise_std": 0.2} | options)


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = numbers(out.shape, 2).to(out)
    found = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)]


def assert_close(got: list[Tensor], want: list[Tensor], rtol: float) -> None:
    """To rtol of each tensor's largest number."""
    for ours, plain in zip(got, want, strict=True):
        assert float((ours - plain).abs().max()) <= rtol * float(plain.abs().max())


class Calls:
    """Counts an energy's evaluations."""

    def __init__(self, net: nn.Module) -> None:
        self.count = 0
        net.register_forward_pre_hook(self._call)

    def _call(self, module: nn.Module, inputs: tuple) -> None:
        self.count += 1

    def since(self) -> int:
        count, self.count = self.count, 0
        return count
