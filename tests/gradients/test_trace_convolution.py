"""Convolutions by minimal filtering as operators of a replayed trace, against float64."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlangevin as fl
from fastlangevin.gradients.trace.convolution import Convolution, faster
from tests.backends import needs_native

pytestmark = needs_native
KERNELS = {  # kernel, stride, padding
    "3x3": ((3, 3), (1, 1), (1, 1)),
    "3x3 without padding": ((3, 3), (1, 1), (0, 0)),
    "4x4 of stride 2": ((4, 4), (2, 2), (1, 1)),
}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def convolution(x: Tensor, out: Tensor, weight: Tensor, name: str, gradient: bool) -> Convolution:
    _, stride, padding = KERNELS[name]
    found = faster(x.shape, out.shape, weight.shape, (stride, padding, (1, 1), 1), gradient)
    assert found is not None
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_convolutions_and_their_input_gradients(name: str, instruction_set: str) -> None:
    kernel, stride, padding = KERNELS[name]
    # Any number of channels is read, but whole vectors of channels are written.
    for (height, width), chains in itertools.product(((8, 8), (20, 14)), (1, 11)):
        x, weight, bias = numbers(chains, 87, height, width), numbers(64, 87, *kernel), numbers(64)
        want = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
        conv = convolution(x, want, weight, name, False)
        packed = conv.pack(weight)
        assert error(conv(x, packed, bias), want) < 1e-6
        assert error(conv(x, packed, bias, 0.2), F.leaky_relu(want, 0.2)) < 1e-6
        strided = torch.stack([bias, -bias], 1)[:, 0]
        assert torch.equal(conv(x, packed, strided), conv(x, packed, bias))
        plain = want - bias.double()[:, None, None]
        assert error(conv(x, packed, None), plain) < 1e-6
        assert error(conv(x, packed, None, 0.2), F.leaky_relu(plain, 0.2)) < 1e-6

        x, weight = numbers(chains, 48, height, width), numbers(87, 48, *kernel)
        leaf = x.double().requires_grad_()
        out = F.conv2d(leaf, weight.double(), None, stride, padding)
        grad = numbers(*out.shape)
        (want,) = torch.autograd.grad(out, leaf, grad.double())
        conv = convolution(grad, x, weight, name, True)
        assert error(conv(grad, conv.pack(weight), None), want) < 1e-6


def test_a_chain_has_the_same_bits_in_every_batch_and_for_every_number_of_threads() -> None:
    x, weight = numbers(19, 32, 6, 6), numbers(32, 32, 3, 3)
    conv = convolution(x, x, weight, "3x3", False)
    whole = conv(x, conv.pack(weight), None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for first, last in ((0, 1), (5, 19), (0, 19)):
                part = conv(x[first:last], conv.pack(weight), None)
                assert torch.equal(part, whole[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("channels", "kernel", "groups", "dilation"),
    [
        ((32, 33), (3, 3), 1, (1, 1)),
        ((16, 16), (3, 3), 1, (1, 1)),
        ((32, 32), (1, 1), 1, (1, 1)),
        ((32, 32), (5, 5), 1, (1, 1)),
        ((32, 32), (3, 3), 2, (1, 1)),
        ((32, 32), (3, 3), 1, (2, 2)),
    ],
)
def test_other_convolutions_are_left_to_torch(
    channels: tuple[int, int], kernel: tuple[int, int], groups: int, dilation: tuple[int, int]
) -> None:
    read, written = ((4, c, 8, 8) for c in channels)
    padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    weight = (channels[1], channels[0] // groups, *kernel)
    assert faster(read, written, weight, ((1, 1), padding, dilation, groups), False) is None


class Labelled(nn.Module):
    """An energy of images given labels, which only a trace holds, with a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 64, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1)
        self.embedding = nn.Embedding(4, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv(F.leaky_relu(self.stem(x), 0.2)), 0.2)
        h = F.silu(self.up(F.silu(self.down(h) * 2)))
        return (h * self.embedding(y)[:, :, None, None]).mean((1, 2, 3))


def test_a_chain_of_a_labelled_energy_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    energy, x, y = Labelled(), numbers(6, 3, 10, 8), torch.arange(6) % 4
    chains = []
    for gradient in ("explicit", "autograd"):
        sampler = fl.LangevinSampler(energy, 4, 1.0, 0.01, gradient=gradient)
        chains.append(sampler(x, y=y, seed=3))
    assert error(chains[0] - x, (chains[1] - x).double()) < 1e-5
