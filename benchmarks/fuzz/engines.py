"""Compare the engines on a random energy with float64, within the bounds of their rounding."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzz.bounds import BRAIN, SINGLE, Exact, Rounding, evaluate
from benchmarks.fuzz.machine import instruction_set, threads
from benchmarks.fuzz.networks import Energy, network_case
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.engine_cache import EnergyCall, EngineCache
from fastlangevin.gradients.select import choose_engine

ENGINES = ("autograd", "explicit", "fused")
DTYPES = ("fp32", "bf16")
ROUNDINGS = {
    ("autograd", "fp32"): Rounding(SINGLE, SINGLE),
    ("explicit", "fp32"): Rounding(SINGLE, SINGLE),
    ("fused", "fp32"): Rounding(SINGLE, SINGLE),
    # Autocast leaves the state as it is until a convolution or a linear layer reads it. It runs
    # torch's own kernels, and some of them sum in bfloat16.
    ("autograd", "bf16"): Rounding(BRAIN, BRAIN, sums=BRAIN, state=False),
    ("explicit", "bf16"): Rounding(BRAIN, SINGLE),
    ("fused", "bf16"): Rounding(BRAIN, SINGLE, bias=False),
}
Run = Callable[[Tensor, bool], tuple[Tensor | None, Tensor]]


def engine(name: str, energy: Energy, x: Tensor, dtype: str) -> Run:
    """An engine's function of states that returns (energies or None, gradient).

    RuntimeError if the engine does not support the energy.
    """
    if name == "autograd":
        return lambda x, want_energies: energy_and_grad(energy, x, {}, dtype)
    run = choose_engine(name, EnergyCall(energy, x, dtype, {}), EngineCache()).engine
    assert run is not None
    run.begin()
    return run


def check_network(seed: int, name: str, dtype: str, isa: str | None) -> tuple[float, float] | None:
    """The largest errors of the energies and of the gradient, relative to their bounds.

    None if the engine does not support the network. AssertionError if two calls differ.
    """
    energy, x = network_case(seed)
    draw = random.Random(seed)
    count, mkldnn = draw.choice([1, 1, 2, 3]), draw.random() < 0.75
    with threads(count), torch.backends.mkldnn.flags(enabled=mkldnn), instruction_set(isa):
        try:
            run = engine(name, energy, x, dtype)
        except RuntimeError:
            return None
        before = x.clone()
        calls = [run(x, want_energies) for want_energies in (True, False, True)]
    assert torch.equal(x, before), "the engine changed the state"
    return compare(calls, evaluate(energy, x, ROUNDINGS[name, dtype]))


def compare(calls: list[tuple[Tensor | None, Tensor]], exact: Exact) -> tuple[float, float]:
    (energies, grad), *others = calls
    assert energies is not None
    for other, again in others:
        assert other is None or torch.equal(other, energies), "energies of two calls differ"
        assert torch.equal(again, grad), "gradients of two calls differ"
    assert energies.dtype == grad.dtype == torch.float32 or energies.dtype == torch.bfloat16
    return (
        _ratio(energies, exact.energies, exact.energy_bound),
        _ratio(grad, exact.grad, exact.grad_bound),
    )


def _ratio(got: Tensor, exact: Tensor, bound: Tensor) -> float:
    assert got.shape == exact.shape, f"shape {list(got.shape)}, not {list(exact.shape)}"
    ratio = float(((got.double() - exact).abs() / bound).max())
    return ratio if ratio == ratio else float("inf")


def describe(seed: int) -> dict[str, Any]:
    energy, x = network_case(seed)
    return {"states": list(x.shape), "operations": energy.ops}
