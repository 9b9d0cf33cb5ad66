"""The fused CPU engine on graphs that are no stacks, against autograd in float64."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlangevin as fl
from fastlangevin.gradients import fused_cpu
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.graph.record import recognise
from tests.backends import needs_native
from tests.gradients.bodies import COMMON, Body, block, mean
from tests.gradients.fused_shared import (
    FP32_AND_BF16,
    SHAPE,
    assert_equal,
    check,
    fused,
    numbers,
    record,
    relative,
)

pytestmark = needs_native


BODIES: dict[str, Callable[[Body, Tensor], Tensor]] = COMMON | {
    "residual of an activation": lambda m, x: mean(m.one(block(m, F.elu(m.one(x))))),
    "strided shortcut": lambda m, x: mean(
        F.silu(m.three(F.silu(h := m.one(x))) + m.shortcut(h))
    ),
    "pools": lambda m, x: mean(
        F.avg_pool2d(
            F.silu(m.one(F.avg_pool2d(F.silu(m.two(x)), 2, 1, 1, count_include_pad=False))),
            3, (2, 1), 1, ceil_mode=True,
        ).tanh()
    ),
    "logits": lambda m, x: -m.logits(m.line(F.silu(block(m, x)).mean((2, 3)))).logsumexp(1),
    "logsumexp of an image": lambda m, x: -F.silu(m.one(x)).flatten(1).logsumexp(1),
    "scaled between": lambda m, x: mean(F.silu(m.one(F.silu(m.one(x)) / 1.1) * -2.5)),
    "gated": lambda m, x: mean(F.silu(m.one(torch.sigmoid(m.one(x)) * torch.tanh(m.two(x))))),
    "squared": lambda m, x: mean((h := m.one(x)) * h * torch.tanh(h)),
    "batch norm of a sum": lambda m, x: mean(m.norm(F.silu(m.norm(m.one(x) + x)))),
    "activations on views": lambda m, x: mean(m.one(F.silu(m.two(x).flatten(1)).view(x.shape))),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_graphs_of_every_kind_match_float64(name: str, instruction_set: str) -> None:
    check(Body(BODIES[name]), numbers(SHAPE), FP32_AND_BF16)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_a_piecewise_activation_that_several_layers_read(slope: float) -> None:
    """Its signs are needed until the last part of its gradient has arrived."""
    energy = Body(
        lambda m, x: mean(
            m.one(F.leaky_relu((h := F.leaky_relu(m.one(x), slope)) + m.two(h), slope))
        )
    )
    check(
        energy, numbers(SHAPE), FP32_AND_BF16 | {"bf16": 0.2}
    )  # rounded values are on other sides of kinks


@pytest.mark.parametrize("chains", [1, 5])
def test_instance_norms_match_float64(chains: int) -> None:
    """Torch writes them as batch norms of one image with the channels of all chains."""
    torch.manual_seed(0)
    image = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.SiLU(), nn.InstanceNorm2d(4),
        nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 1),
    )  # fmt: skip
    sequence = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.SiLU(), nn.Flatten(),
        nn.Linear(4 * 9, 1),
    )  # fmt: skip
    for energy, shape in ((image, (3, 6, 6)), (sequence, (3, 9))):
        nn.init.normal_(energy[1].weight)
        nn.init.normal_(energy[1].bias)
        nn.init.ones_(energy[-1].weight)  # no energy near zero, whose relative error says little
        check(energy, numbers((chains, *shape)), FP32_AND_BF16)


def test_a_batch_norm_of_all_chains_is_no_instance_norm() -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    energy = nn.Sequential(norm, nn.SiLU(), nn.Flatten(), nn.Linear(3 * 36, 1)).eval()
    assert recognise(energy, numbers((4, 3, 6, 6))) == ("a batch norm in train mode mixes chains")


def test_layer_norms_of_vectors_match_float64() -> None:
    energy = nn.Sequential(mlp(nn.SiLU, 3, 9)[0], nn.LayerNorm(9), nn.SiLU(), nn.Linear(9, 1))
    nn.init.normal_(energy[1].weight)
    check(energy, numbers((7, 3)), FP32_AND_BF16)


def test_maxima_match_float64() -> None:
    """A rounded value may be another maximum, as of equal values; the first one counts then."""
    energy = Body(
        lambda m, x: mean(
            F.silu(m.one(F.max_pool2d(F.silu(m.two(F.max_pool2d(x, 3, 2, 1))), (2, 1), dilation=2)))
        )
    )
    check(energy, numbers(SHAPE), FP32_AND_BF16 | {"bf16": 0.5})
    check(energy, torch.ones(SHAPE), FP32_AND_BF16 | {"bf16": 0.5})
    whole = Body(lambda m, x: F.max_pool2d(x.relu(), 2).tanh().sum((1, 2, 3)))
    check(whole, numbers(SHAPE).sign(), FP32_AND_BF16)


ACTIVATIONS = (nn.SiLU, nn.Tanh, nn.Softplus, nn.LeakyReLU, nn.ELU, nn.GELU)


def mlp(activation: Callable[[], nn.Module], *sizes: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            layer
            for one, two in itertools.pairwise(sizes)
            for layer in (nn.Linear(one, two), activation())
        ]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_on_vectors_match_float64(
    activation: Callable[[], nn.Module], instruction_set: str
) -> None:
    check(mlp(activation, 2, 128, 33), numbers((7, 2)), FP32_AND_BF16 | {"bf16": 0.1})


@pytest.mark.parametrize("chains", [1, 130])
def test_vectors_fill_tiles_of_chains(chains: int, threads: Callable[[int], None]) -> None:
    energy, x = mlp(nn.SiLU, 3, 20), numbers((chains, 3))
    want = fused(energy, x)(x, True)
    for count in (2, 3):
        threads(count)
        assert_equal(fused(energy, x)(x, True), want)


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "flattened images": (lambda: nn.Sequential(nn.Flatten(), mlp(nn.SiLU, 60, 9)), (3, 4, 5)),
    "vectors viewed as images": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 6, 10)), nn.Conv2d(1, 9, 3), nn.Tanh(), nn.Flatten(),
            nn.Linear(288, 1),
        ),
        (60,),
    ),
    "sequences": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 9, 4, stride=2, padding=3, dilation=2), nn.SiLU(), nn.Conv1d(9, 5, 3),
            nn.Softplus(), nn.Flatten(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1),
        ),
        (3, 12),
    ),
    "a wide kernel over one pixel, viewed as a sequence": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.SiLU(),
            nn.Flatten(), nn.Linear(8, 1),
        ),
        (3, 1, 1),
    ),
    "flattened to a hidden layer": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 5, 3), nn.SiLU(), nn.Flatten(), nn.Linear(60, 20), nn.SiLU(),
            nn.Linear(20, 1),
        ),
        (1, 5, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_states_of_every_shape_match_float64(name: str) -> None:
    make, shape = SHAPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = make()
    x = numbers((4, *shape))
    check(energy, x, FP32_AND_BF16)
    wide = numbers((4, *shape[:-1], 2 * shape[-1]))[..., ::2]
    assert torch.equal(
        fused(energy, wide)(wide, False)[1], fused(energy, x)(wide.clone(), False)[1]
    )


def test_what_is_not_finite_stays_in_its_chain() -> None:
    energy, x = Body(BODIES["residual"]), numbers(SHAPE)
    engine = fused(energy, x, "bf16")
    clean = engine(x, True)
    y = x.clone()
    y[1, 0, 4, 4] = float("inf")
    _, grad = engine(y, True)
    assert torch.equal(grad[0], clean[1][0])
    assert torch.equal(grad[2:], clean[1][2:])
    assert not bool(grad[1].isfinite().all())
    assert_equal(engine(x, True), clean)


@pytest.mark.parametrize("name", ["learned swish", "scaled channels", "batch norm"])
def test_constants_that_change_are_read_again(name: str) -> None:
    energy, x = Body(BODIES[name]), numbers(SHAPE)
    engine = fused(energy, x)
    engine(x, True)
    with torch.no_grad():
        for tensor in (energy.beta, energy.gain, energy.norm.running_var, energy.norm.bias):
            tensor.mul_(1.5)
    for got, want in zip(
        engine(x, True),
        energy_and_grad(copy.deepcopy(energy).double(), x.double(), {}),
        strict=True,
    ):
        assert got is not None
        assert want is not None
        assert relative(got, want.flatten().view(got.shape)) < 1e-6


REFUSED: dict[str, tuple[Callable[[Body, Tensor], Tensor], str]] = {
    "linear": (lambda m, x: mean(m.one(x)), "no activation"),
    "sum over channels": (lambda m, x: mean(F.silu(m.one(x)).sum(1, True).tanh()), "all pixels"),
    "some pixels": (lambda m, x: F.silu(m.one(x)).mean(2).tanh().sum((1, 2)), "all pixels"),
    "partial logsumexp": (lambda m, x: F.silu(m.one(x)).logsumexp(1).sum((1, 2)), "over all"),
    "viewed": (
        lambda m, x: mean(F.silu(m.one(F.silu(m.two(x)).view(-1, 4, 7, 9)))),
        "another shape",
    ),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_why(body: Callable[[Body, Tensor], Tensor], reason: str) -> None:
    x = numbers(SHAPE)
    found = fused_cpu.refusal(record(Body(body), x), x, None)
    assert found is not None
    assert reason in found


def test_a_chain_of_vectors_runs_fused_and_equals_the_explicit_one() -> None:
    energy, x = mlp(nn.SiLU, 2, 16), numbers((8, 2))
    ends = [
        fl.LangevinSampler(energy, 5, 0.1, 0.01, gradient=gradient)(x, seed=0)
        for gradient in ("fused", "explicit")
    ]
    torch.testing.assert_close(*ends)
