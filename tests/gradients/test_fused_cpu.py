"""The CPU's conv-net kernels against autograd in float64."""

import pytest
import torch
from torch import Tensor, nn

from fastlangevin.gradients import fused_cpu
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels import extension
from tests.backends import needs_native
from tests.gradients.fused_shared import fused, relative
from tests.pairwise import pairwise

pytestmark = needs_native


def net(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """The layers with weights of their own, and a head over what they leave of a state."""
    torch.manual_seed(seed)
    module = nn.Sequential(*layers)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def with_head(body: nn.Sequential, shape: tuple[int, ...]) -> nn.Sequential:
    features = body(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 1))


def states(*shape: int, seed: int = 1) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def by_autograd(energy: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    leaf = x.to(dtype).requires_grad_()
    energies = energy.to(dtype)(leaf).flatten()
    (grad,) = torch.autograd.grad(energies.sum(), leaf)
    energy.to(torch.float32)
    return energies.detach(), grad


def by_autocast(energy: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        energies = energy(leaf).flatten()
    (grad,) = torch.autograd.grad(energies.sum(), leaf)
    return energies.detach().float(), grad


def check(energy: nn.Module, x: Tensor, smooth: bool) -> None:
    energies, grad = fused(energy, x)(x, want_energies=True)
    exact_energies, exact = by_autograd(energy, x, torch.float64)
    plain_energies, plain = by_autograd(energy, x, torch.float32)
    assert energies is not None
    assert energies.shape == (x.shape[0],)
    error = relative(grad, exact)
    # Where there are kinks, a rounding may fall on the other side of one, for autograd as for us.
    assert error <= 1e-6 or (not smooth and error <= 2 * relative(plain, exact))
    scale = exact_energies.abs().max()
    assert (energies - exact_energies).abs().max() <= 1e-6 * scale + 2 * float(
        (plain_energies - exact_energies).abs().max()
    )
    _, grad = fused(energy, x, "bf16")(x, False)
    assert relative(grad, exact) <= 2 * relative(by_autocast(energy, x)[1], exact)


ACTIVATIONS = {
    "leaky_relu": (lambda: nn.LeakyReLU(0.2), False),
    "relu": (nn.ReLU, False),
    "silu": (nn.SiLU, True),
    "softplus": (nn.Softplus, True),
    "softplus of other settings": (lambda: nn.Softplus(2.0, 1.0), True),
    "elu": (lambda: nn.ELU(0.7), True),
    "tanh": (nn.Tanh, True),
    "gelu": (nn.GELU, True),
    "gelu by tanh": (lambda: nn.GELU("tanh"), True),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_matches_autograd(name, instruction_set):
    activation, smooth = ACTIVATIONS[name]
    body = net(nn.Conv2d(3, 9, 3, 1, 1), activation(), nn.Conv2d(9, 20, 4, 2, 1), activation())
    check(with_head(body, (3, 8, 8)), states(5, 3, 8, 8), smooth)


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 5, "stride": 2, "padding": 4},
    {"kernel_size": 3, "stride": 3, "padding": 0},
    {"kernel_size": 2, "stride": 3, "padding": 1},  # pixels that no output reads
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
]


SIZES = [(8, 8), (7, 11)]
CHANNELS = [(1, 1, 1), (2, 17, 33), (5, 16, 40)]


@pytest.mark.parametrize(
    ("geometry", "size", "channels"), pairwise(GEOMETRIES, SIZES, CHANNELS), ids=str
)
def test_convolutions_of_every_geometry_match_autograd(geometry, size, channels, instruction_set):
    first, second, third = channels
    body = net(
        nn.Conv2d(first, second, **geometry), nn.SiLU(), nn.Conv2d(second, third, 1), nn.SiLU()
    )
    check(with_head(body, (first, *size)), states(3, first, *size), smooth=True)


def test_linear_layers_and_layers_without_activation(instruction_set):
    energy = net(
        nn.Conv2d(2, 6, 3, 1, 1, bias=False),
        nn.Conv2d(6, 16, 4, 4),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64, 9),
        nn.Tanh(),
        nn.Linear(9, 1),
    )
    # Smooth, but so small that what autograd itself loses is above 1e-6.
    check(energy, states(4, 2, 8, 8), smooth=False)


def test_weights_that_fill_several_blocks(instruction_set):
    # More products to a pixel than are summed at a time: 16 x 300 channels.
    body = net(nn.Conv2d(3, 300, 1), nn.SiLU(), nn.Conv2d(300, 24, 4, 2, 1), nn.SiLU())
    check(with_head(body, (3, 8, 8)), states(2, 3, 8, 8), smooth=True)


@pytest.mark.parametrize("channels", [1, 2, 3, 17])
def test_bfloat16_is_exact_where_its_numbers_are(channels, instruction_set):
    # Sums of few small integers and halves: nothing to round anywhere.
    torch.manual_seed(channels)
    energy = nn.Sequential(
        nn.Conv2d(channels, 5, 3, 1, 1), nn.LeakyReLU(0.5), nn.Conv2d(5, 3, 2, 2),
        nn.LeakyReLU(0.5), nn.Flatten(), nn.Linear(48, 1),
    )  # fmt: skip
    for parameter in energy.parameters():
        keep = torch.rand(parameter.shape) < (2 / channels if parameter.shape[1:2] else 1)
        parameter.data = torch.randint(-1, 2, parameter.shape) * keep.float()
    x = torch.randint(-1, 2, (4, channels, 8, 8)).float()
    energies, grad = fused(energy, x, "bf16")(x, want_energies=True)
    exact_energies, exact = by_autograd(energy, x, torch.float64)
    assert torch.equal(energies.double(), exact_energies)
    assert torch.equal(grad.double(), exact)


def test_a_padded_channel_does_not_carry_a_nan_into_the_next_call():
    energy = with_head(net(nn.Conv2d(3, 8, 3, 1, 1), nn.SiLU()), (3, 6, 6))
    x = states(2, 3, 6, 6)
    engine = fused(energy, x, "bf16")
    expected = engine(x, False)[1]
    engine(torch.full_like(x, float("nan")), False)
    assert torch.equal(engine(x, False)[1], expected)


@pytest.mark.parametrize("chains", [0, 2, 17])
def test_chains_do_not_know_of_each_other(chains, threads):
    body = net(nn.Conv2d(3, 8, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1), nn.SiLU())
    energy = with_head(body, (3, 8, 8))
    x = states(17, 3, 8, 8)
    expected = [fused(energy, x[k : k + 1])(x[k : k + 1], True) for k in range(chains)]
    for count in (1, 2, 7):
        threads(count)
        energies, grad = fused(energy, x[:chains])(x[:chains], want_energies=True)
        assert grad.shape == (chains, 3, 8, 8)
        assert energies.shape == (chains,)
        for k in range(chains):
            assert torch.equal(grad[k : k + 1], expected[k][1])
            assert torch.equal(energies[k : k + 1], expected[k][0])


def test_layouts_are_read_and_written_as_they_are():
    energy = with_head(net(nn.Conv2d(3, 8, 3, 1, 1), nn.LeakyReLU(0.2)), (3, 6, 6))
    x = states(4, 3, 6, 6)
    expected = fused(energy, x)(x, False)[1]
    images = x.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(4, 3, 6, 12)[..., ::2]
    wide.copy_(x)
    for other in (images, wide):
        grad = fused(energy, other)(other, False)[1]
        assert torch.equal(grad, expected)
    assert fused(energy, images)(images, False)[1].is_contiguous(memory_format=torch.channels_last)


def test_calls_do_not_leak_into_each_other():
    body = net(nn.Conv2d(1, 8, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.SiLU())
    energy = with_head(body, (1, 8, 8))
    engine = fused(energy, states(9, 1, 8, 8))
    first, second = states(9, 1, 8, 8), 1e3 * states(9, 1, 8, 8, seed=5)
    expected = engine(first, True)
    engine(second, False)
    again = engine(first, True)
    for one, other in zip(expected, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("through", ["version", "begin"])
def test_changed_weights_are_read_again(through):
    energy = with_head(net(nn.Conv2d(1, 8, 3, 1, 1), nn.SiLU()), (1, 8, 8))
    x = states(2, 1, 8, 8)
    engine = fused(energy, x)
    engine(x, True)
    with torch.no_grad():
        for parameter in energy.parameters():
            if through == "version":
                parameter.mul_(1.1)
            else:
                parameter.data = 1.1 * parameter
    if through == "begin":
        engine.begin()
    for value, exact in zip(engine(x, True), by_autograd(energy, x, torch.float64), strict=True):
        assert relative(value, exact) < 1e-6


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_finite_goes_where_autograds_goes(name):
    activation, _ = ACTIVATIONS[name]
    energy = with_head(net(nn.Conv2d(1, 8, 3, 1, 1), activation()), (1, 8, 8))
    x = states(3, 1, 8, 8)
    engine = fused(energy, x)
    clean = engine(x, True)
    for bad in (float("nan"), float("inf"), -float("inf")):
        y = x.clone()
        y[1, 0, 4, 4] = bad
        energies, grad = engine(y, True)
        plain_energies, plain = by_autograd(energy, y, torch.float32)
        assert torch.equal(grad.isfinite(), plain.isfinite())
        seen = plain.isfinite()
        assert torch.allclose(grad[seen], plain[seen], rtol=1e-4, atol=1e-5)
        assert torch.equal(energies.isfinite(), plain_energies.isfinite())
        for k in (0, 2):
            assert torch.equal(grad[k], clean[1][k])
            assert torch.equal(energies[k], clean[0][k])
    for one, two in zip(engine(x, True), clean, strict=True):
        assert torch.equal(one, two)


def test_a_relu_turns_minus_infinity_to_nothing(instruction_set):
    energy = with_head(net(nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU()), (1, 8, 8))
    energy[0].bias.data[3] = -float("inf")
    check(energy, states(3, 1, 8, 8), smooth=False)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda: net(nn.Conv2d(2, 4, 3, groups=2), nn.SiLU()), "2 groups"),
        (lambda: net(nn.Conv2d(2, 4, 7), nn.SiLU(), nn.Conv2d(4, 4, 2)), "times the"),
        (lambda: net(nn.Conv2d(2, 4, 3), nn.SiLU()).double(), "float64"),
    ],
)
def test_refusals_say_why(body, reason):
    body = body()
    dtype = next(body.parameters()).dtype
    features = body(torch.zeros(1, 2, 8, 8, dtype=dtype)).numel()
    energy = nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 1, dtype=dtype))
    graph = recognise(energy, torch.zeros(1, 2, 8, 8, dtype=dtype))
    assert reason in fused_cpu.refusal(graph, torch.zeros(1), None)


def test_tf32_is_refused_without_a_matrix_unit(monkeypatch):
    monkeypatch.setattr(extension, "has_matrix_unit", lambda: False)
    energy = with_head(net(nn.Conv2d(1, 4, 3), nn.SiLU()), (1, 8, 8))
    graph = recognise(energy, torch.zeros(1, 1, 8, 8))
    for precision in (None, "fp32", "bf16"):
        assert fused_cpu.refusal(graph, torch.zeros(1), precision) is None
    assert "tf32" in fused_cpu.refusal(graph, torch.zeros(1), "tf32")


def test_states_in_float64_are_left_to_others():
    energy = with_head(net(nn.Conv2d(1, 4, 3), nn.SiLU()), (1, 8, 8))
    graph = recognise(energy, torch.zeros(1, 1, 8, 8))
    assert "float64" in fused_cpu.refusal(graph, torch.zeros(1, 1, 8, 8).double(), None)
