"""The fused CPU engine on permuted values and linear layers over the last dimension."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlangevin as fl
from fastlangevin.gradients import fused_cpu
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.graph.conv_stack import conv_stack
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels import extension
from tests.gradients.fused_shared import (
    CPU,
    assert_equal,
    check,
    fused,
    numbers,
    record,
    relative,
)

pytestmark = pytest.mark.skipif(
    extension.library is None, reason=f"native kernels: {extension.available(CPU)}"
)
FP32_AND_BF16 = {"fp32": 1e-6, "bf16": 0.03}
IMAGE, SEQUENCE = (4, 6, 5, 3), (4, 7, 3)  # of [n, height, width, channels] and [n, length, channels]


class Net(nn.Module):
    """Layers of 3 and 8 channels, and a body that is a function of them and the states."""

    def __init__(self, body: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.sequence = nn.Conv1d(3, 8, 3, padding=1)
            self.lift, self.mix, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)
            self.tokens, self.flat = nn.Linear(7, 7), nn.Linear(56, 8)
            self.flat_image = nn.Linear(240, 8)
            self.position = nn.Parameter(torch.randn(7, 8))
            self.matrix = nn.Parameter(torch.randn(8, 8) / 3)
            self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x).reshape(len(x), -1).sum(1)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def lifted(m: Net, x: Tensor) -> Tensor:
    return F.silu(m.lift(x))


BODIES: dict[str, tuple[Callable[[Net, Tensor], Tensor], tuple[int, ...]]] = {
    "images with channels last": (
        lambda m, x: m.head(F.silu(m.mix(channels_last(F.silu(m.image(channels_first(x))))))),
        IMAGE,
    ),
    "movedim and a flattened result": (
        lambda m, x: F.silu(
            m.flat_image(F.silu(m.image(x.movedim(-1, 1))).movedim(1, -1).flatten(1))
        ),
        IMAGE,
    ),
    "vectors viewed as images": (
        lambda m, x: F.silu(m.wide(F.silu(m.image(channels_first(x.view(-1, 6, 5, 3)))))),
        (4, 90),
    ),
    "images whose height and width are swapped": (
        lambda m, x: F.silu(m.wide(F.silu(m.image(x.mT)))),
        (4, 3, 6, 5),
    ),
    "images stored with equal sizes": (
        lambda m, x: F.silu(m.image(channels_first(x))),
        (4, 3, 3, 3),
    ),
    "sequences": (
        lambda m, x: F.silu(m.mix(swapped(F.silu(m.sequence(swapped(x)))))),
        SEQUENCE,
    ),
    "a perceptron of every token": (lambda m, x: m.head(F.silu(m.mix(lifted(m, x)))), SEQUENCE),
    "a perceptron of every pixel": (lambda m, x: m.head(F.silu(m.mix(lifted(m, x)))), IMAGE),
    "tokens of a convolution": (
        lambda m, x: m.head(
            F.silu(m.mix(F.silu(m.image(x)).flatten(2).transpose(1, 2)))
        ),
        (4, 3, 6, 5),
    ),
    "a residual branch": (
        lambda m, x: m.head(F.silu((h := lifted(m, x)) + m.mix(F.silu(m.mix(h))) * m.gain)),
        SEQUENCE,
    ),
    "positions": (lambda m, x: m.head(F.silu(m.mix(F.silu(m.lift(x) + m.position)))), SEQUENCE),
    "gates": (
        lambda m, x: m.head(F.silu(m.mix(torch.sigmoid(h := m.lift(x)) * torch.tanh(h)))),
        SEQUENCE,
    ),
    "a mean over tokens": (lambda m, x: F.silu(m.mix(lifted(m, x).mean(1))), SEQUENCE),
    "a mean over pixels": (
        lambda m, x: F.silu(m.mix(lifted(m, x).mean((1, 2), keepdim=True))),
        IMAGE,
    ),
    "flattened tokens": (lambda m, x: F.silu(m.flat(lifted(m, x).flatten(1))), SEQUENCE),
    "logsumexp of tokens": (lambda m, x: -lifted(m, x).flatten(1).logsumexp(1), SEQUENCE),
    "raw weights": (lambda m, x: F.silu(lifted(m, x) @ m.matrix), SEQUENCE),
    "raw weights and a bias": (
        lambda m, x: F.silu(lifted(m, x) @ m.matrix + m.head.weight[0]),
        SEQUENCE,
    ),
    "einsum": (lambda m, x: F.silu(torch.einsum("btd,de->bte", lifted(m, x), m.matrix)), SEQUENCE),
    "rows of all tokens": (
        lambda m, x: F.silu(m.lift(x.reshape(-1, 3)).view(len(x), 7, 8)),
        SEQUENCE,
    ),
    "a gradient of the permuted state itself": (
        lambda m, x: F.silu(m.image(channels_first(x))).mean((1, 2, 3)) + (x**2).sum((1, 2, 3)),
        IMAGE,
    ),
    "one channel": (lambda m, x: F.silu(m.mix(F.silu(m.lift(x.unsqueeze(1).expand(-1, 1, 3))))),
                    (4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_permuted_values_match_float64(name: str) -> None:
    body, shape = BODIES[name]
    check(Net(body), numbers(shape), FP32_AND_BF16)
