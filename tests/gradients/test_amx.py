"""The fused CPU engine's products by AMX's tiles, emulated and, if there are any, real."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.gradients import fused_cpu
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.kernels import extension
from tests.backends import choose, instruction_sets, needs_native
from tests.gradients import fused_shared
from tests.gradients.bodies import Body
from tests.gradients.fused_shared import (
    SHAPE,
    assert_equal,
    fused,
    numbers,
    record,
    relative,
)
from tests.gradients.test_fused_cpu import by_autocast, net, states, with_head
from tests.gradients.test_fused_graphs import ACTIVATIONS, BODIES, mlp

pytestmark = needs_native


# Of a gradient's norm. Two bfloat16 numbers have 16 bits together, so that a product's error is
# about 2^-16 of it. Three have all bits of float32, and the bound is that of float32 products.
SPLIT_BOUNDS = {"tf32": 3e-5, "bf16x6": 1e-6}


@pytest.fixture(autouse=True)
def _tiles() -> Iterator[None]:
    best = extension.library.instruction_set()
    assert choose("amx_emulated")
    yield
    choose(best)


def check(
    energy: nn.Module, x: Tensor, bf16: float, splits: dict[str, float] = SPLIT_BOUNDS
) -> None:
    fused_shared.check(energy, x, {"bf16": bf16} | splits, by_matrix_unit=True)


def small() -> tuple[nn.Module, Tensor]:
    return with_head(net(nn.Conv2d(3, 8, 3, 1, 1), nn.SiLU()), (3, 6, 6)), states(5, 3, 6, 6)


def bound_by_autocast(energy: nn.Module, x: Tensor) -> float:
    _, grad = energy_and_grad(copy.deepcopy(energy).double(), x.double(), {})
    return 2 * relative(by_autocast(energy, x)[1], grad)


# Channels of one tile and of several, that fill them or not, and pairs that have no second half.
CHANNELS = [(1, 1, 1), (2, 17, 33), (5, 16, 64), (40, 32, 7)]
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 5, "stride": 2, "padding": 4},
    {"kernel_size": 2, "stride": 3, "padding": 1},  # pixels that no output reads
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
]


PRECISIONS = ["bf16", "tf32", "bf16x6"]


@pytest.mark.parametrize(
    ("geometry", "channels", "precision"),
    [
        (g, CHANNELS[i % 4], PRECISIONS[(i + 1) % 3])
        for i, g in enumerate([*GEOMETRIES, *GEOMETRIES[::-1]])
    ],
    ids=str,
)
def test_convolutions_of_every_geometry_match_float64(
    geometry: dict[str, Any], channels: tuple[int, int, int], precision: str
) -> None:
    first, second, third = channels
    body = net(
        nn.Conv2d(first, second, **geometry), nn.SiLU(),
        nn.Conv2d(second, third, 3, 1, 1), nn.SiLU(),
    )  # fmt: skip
    energy, x = with_head(body, (first, 5, 18)), states(2, first, 5, 18)
    bound = bound_by_autocast(energy, x) if precision == "bf16" else SPLIT_BOUNDS[precision]
    fused_shared.check(energy, x, {precision: bound}, by_matrix_unit=True)


@pytest.mark.parametrize(
    ("name", "precision"), [(name, PRECISIONS[i % 3]) for i, name in enumerate(BODIES)]
)
def test_graphs_of_every_kind_match_float64(name: str, precision: str) -> None:
    bounds = {precision: SPLIT_BOUNDS.get(precision, 0.03)}
    fused_shared.check(Body(BODIES[name]), numbers(SHAPE), bounds, by_matrix_unit=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_on_vectors_match_float64(activation: Callable[[], nn.Module]) -> None:
    check(mlp(activation, 2, 60, 33), numbers((3, 2)), 0.1)


def test_more_words_to_a_pixel_than_are_summed_at_a_time() -> None:
    body = net(nn.Conv2d(3, 300, 1), nn.SiLU(), nn.Conv2d(300, 24, 4, 2, 1), nn.SiLU())
    energy, x = with_head(body, (3, 6, 6)), states(2, 3, 6, 6)
    bounds = {"bf16": bound_by_autocast(energy, x)}
    fused_shared.check(energy, x, bounds, by_matrix_unit=True)


def test_numbers_that_bfloat16_holds_are_exact() -> None:
    torch.manual_seed(0)
    energy = nn.Sequential(
        nn.Conv2d(3, 5, 3, 1, 1), nn.LeakyReLU(0.5), nn.Conv2d(5, 3, 2, 2), nn.LeakyReLU(0.5),
        nn.Flatten(), nn.Linear(48, 1),
    )  # fmt: skip
    for parameter in energy.parameters():
        keep = torch.rand(parameter.shape) < (0.6 if parameter.shape[1:2] else 1)
        parameter.data = torch.randint(-1, 2, parameter.shape) * keep.float()
    x = torch.randint(-1, 2, (20, 3, 8, 8)).float()
    check(energy, x, 0.0, {"tf32": 0.0, "bf16x6": 0.0})


def test_three_parts_have_all_bits_of_float32() -> None:
    """Of values and of weights, in products with a power of two."""
    x = numbers((40, 1, 1, 1))
    energy = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.LeakyReLU(1.0), nn.Conv2d(1, 1, 1), nn.LeakyReLU(1.0),
        nn.Flatten(), nn.Linear(1, 1, bias=False),
    )  # fmt: skip
    for first, second in ((0.5, 4.0), (0.3, 1.0)):
        for layer, weight in ((energy[0], first), (energy[2], second), (energy[5], 1.0)):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            layer.weight.data.fill_(weight)
            if layer.bias is not None:
                layer.bias.data.zero_()
        states = x if first == 0.5 else x.sign()
        energies, grad = fused(energy, states, "bf16x6")(states, True)
        assert energies is not None
        expected = energy[0].weight.detach().flatten() * second
        assert torch.equal(energies, (states * expected).flatten())
        assert torch.equal(grad, expected.expand(40).view_as(grad))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_batches_chunks_and_threads_do_not_matter(
    precision: str, threads: Callable[[int], None]
) -> None:
    body = net(
        nn.Conv2d(3, 20, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(20, 16, 4, 2, 1), nn.SiLU(),
        nn.Conv2d(16, 9, 3, 1, 1), nn.LeakyReLU(0.2),
    )  # fmt: skip
    energy, x = with_head(body, (3, 6, 6)), states(37, 3, 6, 6)
    graph = record(energy, x)
    expected = fused_cpu.ConvNetGradient(graph, 37, precision)(x, True)
    assert expected[0] is not None
    for count, chunk in ((1, 13), (2, 10), (3, 13), (7, 6)):
        threads(count)
        engine = fused_cpu.ConvNetGradient(graph, 37, precision)
        assert engine.chunk == chunk  # the fewest chunks of at most 16 chains, of one size
        assert_equal(engine(x, True), expected)
    for chains in (1, 2, 17):
        first = [part[:chains] for part in expected]
        assert_equal(fused(energy, x[:chains], precision)(x[:chains], True), first)


def stack(width: int, activation: nn.Module) -> tuple[nn.Module, Tensor]:
    """The paper's first three layers, on images of its size."""
    body = net(
        nn.Conv2d(3, width, 3, 1, 1), activation, nn.Conv2d(width, 2 * width, 4, 2, 1), activation,
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1), activation,
    )  # fmt: skip
    return with_head(body, (3, 32, 32)), states(16, 3, 32, 32)


@pytest.mark.parametrize(
    ("precision", "activation"),
    [("bf16", nn.LeakyReLU(0.2)), ("tf32", nn.SiLU())],
    ids=str,
)
def test_parts_of_a_chunk_give_the_bits_of_whole_ones(
    precision: str, activation: nn.Module
) -> None:
    energy, x = stack(8, activation)
    graph = record(energy, x)
    engine = fused_cpu.ConvNetGradient(graph, 16, precision)
    assert engine.net.leading == 2
    expected = engine(x, True)
    assert expected[0] is not None
    for chains in (3, 6):
        other = fused_cpu.ConvNetGradient(graph, chains, precision)
        assert other.net.leading == 0
        assert_equal(other(x[:chains], True), [part[:chains] for part in expected])
    assert_equal(engine(x[:7], True), [part[:7] for part in expected])


def test_batches_of_a_few_chains_fill_the_rows_of_tiles_with_pixels() -> None:
    energy, x = stack(16, nn.SiLU())
    graph = record(energy, x)
    cycles = {
        chains: fused_cpu.ConvNetGradient(graph, chains, "bf16").net.cycles
        for chains in (1, 2, 4, 8, 16)
    }
    assert cycles[2] == cycles[4] == cycles[8] == cycles[16] < cycles[1]


@pytest.mark.parametrize("precision", ["bf16", "bf16x6"])
def test_what_is_not_finite_stays_in_its_chain(precision: str) -> None:
    energy, x = Body(BODIES["residual"]), numbers(SHAPE)
    engine = fused(energy, x, precision)
    clean = engine(x, True)
    y = x.clone()
    y[1, 0, 4, 4], y[3] = float("inf"), float("nan")
    _, grad = engine(y, True)
    for chain in (0, 2, 4):
        assert torch.equal(grad[chain], clean[1][chain])
    assert not bool(grad[1].isfinite().all())
    assert bool(grad[3].isnan().all())
    assert_equal(engine(x, True), clean)


def test_a_chain_in_one_call_is_that_of_single_steps() -> None:
    energy, x = small()
    whole, single = (
        fl.LangevinSampler(energy, steps, 0.1, gradient="fused", precision="bf16")
        for steps in (4, 1)
    )
    state = x
    for k in range(4):
        state = single(state, seed=0, first_step=k)
    assert torch.equal(whole(x, seed=0), state)


def test_explain_names_the_instruction_set() -> None:
    energy, x = small()
    sampler = fl.LangevinSampler(energy, 4, gradient="fused", precision="bf16")
    assert "; instruction set amx_emulated\n" in sampler.explain(x)


def narrow() -> nn.Module:
    """Most of a tile's columns and words would be empty, and vectors of AVX2 are half full."""
    return with_head(net(nn.Conv2d(1, 1, 5, 1, 2), nn.SiLU()), (1, 9, 9))


def wide() -> nn.Module:
    body = net(nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 4, 2, 1), nn.SiLU())
    return with_head(body, (3, 8, 8))


def test_float32_takes_tiles_where_they_are_estimated_to_be_faster() -> None:
    for energy, shape, by_tiles in ((wide(), (3, 8, 8), True), (narrow(), (1, 9, 9), False)):
        x = states(5, *shape)
        forced = fused(energy, x, "bf16x6")(x, True)
        for precision in ("fp32", None):
            engine = fused(energy, x, precision)
            assert engine.net.by_matrix_unit == by_tiles
            assert engine.tiles_estimate is not None
            assert (engine.tiles_estimate < 1) == by_tiles
            energies, grad = engine(x, True)
            assert energies is not None
            assert (torch.equal(grad, forced[1])) == by_tiles
        # Nothing but the network decides, so that no chain has other bits in another batch.
        for chains in (1, 100):
            y = states(chains, *shape)
            assert fused(energy, y, "fp32").tiles_estimate == engine.tiles_estimate
        text = fl.LangevinSampler(energy, 4, gradient="fused", precision="fp32").explain(x)
        estimate = f"{engine.tiles_estimate:.2f}"
        if by_tiles:
            assert "; instruction set amx_emulated\n" in text
            assert f"(bf16x6), in an estimated {estimate} of the time of vectors" in text
        else:
            assert "; instruction set baseline\n" in text
            assert f"not bf16x6: bfloat16 tiles would take an estimated {estimate} times" in text


def test_a_network_without_products_is_left_to_vectors() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().logsumexp((1, 2, 3))

    engine = fused(Sum(), states(3, 2, 4, 4), "fp32")
    assert not engine.net.by_matrix_unit
    assert engine.tiles_estimate is None


def test_tf32_runs_on_cpus_with_tiles() -> None:
    energy, x = small()
    ends = [
        fl.LangevinSampler(energy, 4, 0.1, precision=precision)(x, seed=0)
        for precision in ("tf32", "fp32")
    ]
    assert not torch.equal(*ends)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)
    choose("baseline")
    with pytest.raises(ValueError, match="needs a CUDA device or a CPU with AMX"):
        fl.LangevinSampler(energy, 4, 0.1, precision="tf32")(x, seed=0)


def test_without_tiles_vectors_compute_float32() -> None:
    energy, x = wide(), states(5, 3, 8, 8)
    assert fused(energy, x, "fp32").net.by_matrix_unit
    choose("baseline")
    engine, other = fused(energy, x, "fp32"), fused(energy, x, "bf16x6")
    assert not engine.net.by_matrix_unit
    assert engine.tiles_estimate is None
    assert torch.equal(engine(x, False)[1], other(x, False)[1])


def test_the_processors_tiles_give_the_same_bits() -> None:
    if not choose("amx"):
        pytest.skip(f"no AMX: {extension.library.why_no_amx()}")
    body = net(
        nn.Conv2d(3, 64, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 33, 4, 2, 1), nn.LeakyReLU(0.2)
    )
    energy, x = with_head(body, (3, 16, 16)), states(20, 3, 16, 16)
    if not extension.has_matrix_unit():
        pytest.skip(f"no AMX: {extension.library.why_no_amx()}")
    precisions = ("bf16", "tf32", "bf16x6")
    real = [fused(energy, x, precision)(x, True) for precision in precisions]
    assert choose("amx_emulated")
    for precision, results in zip(precisions, real, strict=True):
        assert_equal(fused(energy, x, precision)(x, True), results)


def test_the_emulation_is_never_chosen_by_itself() -> None:
    """A process begins with the best instruction set, and planning does not change it to this."""
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_native", {extension.library.__file__!r})
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
for reason in (None, library.why_no_amx()):
    print(library.instruction_set())
"""
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert set(output.stdout.split()) <= {*instruction_sets(), "amx", "avx512_bf16"}
    assert "emulated" not in output.stdout
