"""What the tests of the fused CPU engine share: recorded engines, and checks against float64."""

import copy

import torch
from torch import Tensor, nn

from fastlangevin.gradients import fused_cpu
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import recognise

CPU = torch.device("cpu")
FP32_AND_BF16 = {"fp32": 1e-6, "bf16": 0.03}  # bounds of a gradient's relative error
SHAPE = (5, 4, 9, 7)  # odd and unequal, so that strides leave rows over


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def record(energy: nn.Module, x: Tensor) -> Graph:
    graph = recognise(energy, x)
    assert isinstance(graph, Graph), graph
    return graph


def fused(energy: nn.Module, x: Tensor, precision: str | None = None) -> fused_cpu.ConvNetGradient:
    graph = record(energy, x)
    assert fused_cpu.refusal(graph, x, precision) is None
    return fused_cpu.ConvNetGradient(graph, x.shape[0], precision)


def check(
    energy: nn.Module, x: Tensor, bounds: dict[str, float], *, by_matrix_unit: bool = False
) -> None:
    """Gradients within a relative error for each precision, and no chain depends on another one.

    Energies have the same bounds, but at least 0.03 in bfloat16: the rounding errors of a single
    number do not average out as those of many elements do. Where a number is split into parts,
    twice torch's own error is added: energies may be sums that cancel.
    """
    energies, grad = energy_and_grad(copy.deepcopy(energy).double(), x.double(), {})
    plain = energy_and_grad(energy, x, {})[0]
    whole = record(energy, x)
    # A graph holds constants of all chains for the number of chains that it was recorded with.
    holds_constants = any(node.kind == "constant" for node in whole.nodes)
    one = record(energy, x[:1]) if holds_constants else whole
    for precision, bound in bounds.items():
        assert fused_cpu.refusal(whole, x, precision) is None
        engine = fused_cpu.ConvNetGradient(whole, x.shape[0], precision)
        assert engine.net.by_matrix_unit or not by_matrix_unit
        engine_energies, engine_grad = engine(x, True)
        assert engine_energies is not None
        assert relative(engine_grad, grad) <= bound
        energy_bound = max(bound, 0.03) if precision == "bf16" else bound
        if precision in ("tf32", "bf16x6"):
            energy_bound += 2 * relative(plain.flatten(), energies.flatten())
        assert relative(engine_energies, energies.flatten()) <= energy_bound
        assert torch.equal(engine(x, False)[1], engine_grad)
        single = fused_cpu.ConvNetGradient(one, 1, precision)
        for k in range(x.shape[0]):
            alone_energies, alone = single(x[k : k + 1], True)
            assert alone_energies is not None
            assert torch.equal(alone[0], engine_grad[k])
            assert torch.equal(alone_energies[0], engine_energies[k])


def assert_equal(got: tuple[Tensor | None, Tensor], want: tuple[Tensor | None, Tensor]) -> None:
    """Energies and gradients of two calls of an engine are the same bits."""
    for one, two in zip(got, want, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
