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
from tests.backends import needs_native
from tests.gradients.fused_shared import (
    FP32_AND_BF16,
    assert_equal,
    check,
    fused,
    numbers,
    record,
    relative,
)

pytestmark = needs_native
IMAGE = (4, 6, 5, 3)  # [n, height, width, channels]
SEQUENCE = (4, 7, 3)  # [n, length, channels]


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
    "gains of channels": (
        lambda m, x: m.head(F.silu(m.mix(lifted(m, x)) * m.position[0])),
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
def test_permuted_values_match_float64(name: str, instruction_set: str) -> None:
    body, shape = BODIES[name]
    check(Net(body), numbers(shape), FP32_AND_BF16)


def test_an_einsum_with_a_matrix_matches_float64() -> None:
    energy = Net(
        lambda m, x: F.silu(torch.einsum("btd,de->bte", lifted(m, x), m.matrix) + m.position)
    )
    x = numbers(SEQUENCE)
    _, want = energy_and_grad(copy.deepcopy(energy).double(), x.double(), {})
    assert relative(fused(energy, x)(x, False)[1], want) < 1e-6


@pytest.mark.parametrize(
    "layout",
    [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x.repeat(1, 1, 1, 2)[..., ::2]],
)
def test_states_of_every_layout_give_the_same_bits(layout: Callable[[Tensor], Tensor]) -> None:
    body, shape = BODIES["images with channels last"]
    energy, x = Net(body), numbers(shape)
    want, y = fused(energy, x)(x, True), layout(x)
    y.copy_(x)
    energies, grad = fused(energy, y)(y, True)
    assert grad.shape == x.shape
    assert_equal((energies, grad), want)


@pytest.mark.parametrize("name", ["images with channels last", "vectors viewed as images"])
def test_chains_of_permuted_states_are_the_same_in_parts_and_near_autograd(name: str) -> None:
    body, shape = BODIES[name]
    energy, x = Net(body), numbers((7, *shape[1:]))
    sampler = fl.LangevinSampler(energy, 4, 0.1, 0.01, clamp=(-1, 1), gradient="fused")
    whole = sampler(x, seed=0)
    parts = [sampler(x[:3], seed=0), sampler(x[3:], seed=0, first_chain=3)]
    assert torch.equal(whole, torch.cat(parts))
    # Steps one at a time take the gradient in one call and move the states in another.
    y = x
    for step in range(4):
        y = fl.LangevinSampler(energy, 1, 0.1, 0.01, clamp=(-1, 1), gradient="fused")(
            y, seed=0, first_step=step
        )
    assert torch.equal(whole, y)
    plain = fl.LangevinSampler(energy, 4, 0.1, 0.01, clamp=(-1, 1), gradient="autograd")
    torch.testing.assert_close(whole, plain(x, seed=0), rtol=1e-4, atol=1e-5)


def test_constants_of_chains_are_added_in_the_order_of_the_values() -> None:
    class Observed(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.silu(self.mix(F.silu(self.lift(x) + self.lift(y)))).sum((1, 2))

    energy, x, y = Observed(lambda m, x: x), numbers(SEQUENCE), numbers(SEQUENCE, 1)
    ends = [
        fl.LangevinSampler(energy, 3, 0.1, 0.01, gradient=gradient)(x, seed=0, y=y)
        for gradient in ("fused", "autograd")
    ]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Tensor], tuple[int, ...], str]] = {
    "a linear layer over tokens": (
        lambda m, x: F.silu(m.tokens(swapped(lifted(m, x)))),
        SEQUENCE,
        "linear is supported only over channels",
    ),
    "a convolution in the wrong order": (
        lambda m, x: F.silu(m.wide(swapped(F.silu(m.image(x))))),
        (4, 3, 8, 8),
        "conv reads values whose dimensions have been permuted",
    ),
    "a sum of two orders": (
        lambda m, x: F.silu((h := m.image(x)) + h.mT),
        (4, 3, 6, 6),
        "add reads values whose dimensions have been permuted",
    ),
    "an axis that is split": (
        lambda m, x: F.silu(m.image(x)).view(-1, 8, 3, 2, 5).transpose(2, 3).tanh(),
        (4, 3, 6, 5),
        "permute reads values that have been viewed in another shape",
    ),
    "gains of pixels": (
        lambda m, x: F.silu(lifted(m, x) * m.position[:, :1]),
        SEQUENCE,
        "differs between pixels",
    ),
    "a mean of every token": (
        lambda m, x: F.silu(lifted(m, x).mean(2)),
        SEQUENCE,
        "mean is supported only over all pixels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_layout_is_refused(name: str) -> None:
    body, shape, reason = REFUSED[name]
    x = numbers(shape)
    found = fused_cpu.refusal(record(Net(body), x), x, None)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.lift(F.silu(x.transpose(0, 1))), "transpose mixes chains"),
        (lambda m, x: F.silu(x.reshape(-1, 3)), "silu mixes chains"),
        (lambda m, x: F.silu(x).reshape(-1, 64) @ m.matrix.view(64, 1).expand(64, 8), "mm mixes"),
        (lambda m, x: torch.bmm(F.silu(x), swapped(x)), "bmm reads a tensor that is neither"),
        (lambda m, x: torch.bmm(F.silu(x), m.stack), "the same matrix for all rows"),
    ],
)
def test_products_that_mix_chains_are_not_recorded(
    body: Callable[[Net, Tensor], Tensor], reason: str
) -> None:
    energy = Net(lambda m, x: body(m, x).reshape(len(x), -1))
    energy.stack = nn.Parameter(numbers((8, 3, 3)))
    found = recognise(energy, numbers((8, 8, 3)))
    assert isinstance(found, str)
    assert reason in found


def test_gpus_stacks_have_no_permuted_values() -> None:
    body, shape = BODIES["images with channels last"]
    assert conv_stack(record(Net(body), numbers(shape))) == (
        "permute is not a convolution, a linear layer or an activation"
    )
    body, shape = BODIES["a perceptron of every pixel"]
    stack = conv_stack(record(Net(body), numbers(shape)))
    assert stack == "linear is supported only over channels or all of a chain's values"
