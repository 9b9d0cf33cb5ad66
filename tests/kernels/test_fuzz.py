"""A slice of ``python -m benchmarks.fuzz``: random steps and networks against float64."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlangevin.kernels import native
from fastlangevin.step import resolve_backend
from tests.backends import SERVING, instruction_sets

if not (Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz").is_dir():
    pytest.skip("benchmarks are not installed", allow_module_level=True)
bounds, engines, machine, networks, steps = (
    importlib.import_module(f"benchmarks.fuzz.{name}")
    for name in ("bounds", "engines", "machine", "networks", "steps")
)

CPU_PLACES = [
    (name, isa)
    for name, device in SERVING
    if device.type == "cpu"
    for isa in (instruction_sets() if name == "native" else [None])
]
ENGINES = [(name, None) for name in ("autograd", "explicit")] + [
    ("fused", isa) for isa in instruction_sets()
]


@pytest.mark.parametrize(("name", "isa"), CPU_PLACES)
def test_steps_are_as_close_to_float64_as_float32_allows(name, isa):
    run = resolve_backend(name, torch.device("cpu"))
    # Triton is interpreted here, at some tenth of a second a step.
    for seed in range(2 if name == "triton" else 30):
        with machine.instruction_set(isa):
            assert steps.check_step(steps.step_case(seed), run) <= 1, f"case {seed}"


@pytest.mark.parametrize("dtype", engines.DTYPES)
@pytest.mark.parametrize(("name", "isa"), ENGINES)
def test_networks_are_as_close_to_float64_as_their_roundings_allow(name, isa, dtype):
    checked = 0
    for seed in range(6):
        found = engines.check_network(seed, name, dtype, isa)
        if found is not None:
            assert max(found) <= 1, f"case {seed}"
            checked += 1
    assert checked >= 2


def test_every_kind_of_operation_is_among_the_networks():
    kinds = {op.kind for seed in range(40) for op in networks.network_case(seed)[0].ops}
    linear = {"conv", "linear", "add", "scale", "avg_pool", "mean", "sum", "flatten"}
    assert kinds == {*networks.ACTIVATIONS, *linear}


def test_a_case_is_the_same_at_every_call():
    for make in (networks.network_case, steps.step_case):
        one, other = make(3), make(3)
        if isinstance(one, tuple):
            assert one[0].ops == other[0].ops
            assert torch.equal(one[1], other[1])
        else:
            assert torch.equal(one.x, other.x)
            assert one.x.stride() == other.x.stride()


@pytest.mark.parametrize(("dtype", "factor"), [("fp32", 1.01), ("bf16", 1.3)])
def test_a_wrong_result_is_noticed(dtype, factor):
    """The bounds excuse rounding only: of most networks, an error of this factor is beyond them."""
    noticed = []
    for seed in range(12):
        energy, x = networks.network_case(seed)
        exact = bounds.evaluate(energy, x, engines.ROUNDINGS["explicit", dtype])
        pairs = (exact.energies, exact.energy_bound), (exact.grad, exact.grad_bound)
        noticed += [bool((((factor - 1) * v).abs() > bound).any()) for v, bound in pairs]
    assert sum(noticed) >= len(noticed) / 2


def test_some_networks_must_be_exact_in_bfloat16():
    exact = 0
    for seed in range(30):
        found = bounds.evaluate(*networks.network_case(seed), engines.ROUNDINGS["fused", "bf16"])
        exact += bool((found.grad_bound < 1e-20).all()) and bool(found.grad.any())
    assert exact >= 2


def test_a_missing_tap_is_noticed_in_bfloat16(monkeypatch):
    """A weight of 1 that is read as 0, in networks of small whole numbers."""
    make, noticed = engines.engine, []

    def wrong(name, energy, x, dtype):
        weight = next(iter(energy.weights.values())).data
        before = weight.clone()
        weight.view(-1)[weight.abs().argmax()] = 0
        found = make(name, energy, x, dtype)(x, True)
        weight.copy_(before)
        return lambda x, want_energies: found

    monkeypatch.setattr(engines, "engine", wrong)
    for seed in range(24):
        weight = next(iter(networks.network_case(seed)[0].weights.values()), None)
        if weight is not None and bool((weight == weight.round()).all()):
            noticed.append(max(engines.check_network(seed, "explicit", "bf16", None)) > 1)
    assert sum(noticed) >= 3


def test_a_wrong_step_is_noticed():
    """One per mille of the step, in an otherwise right backend, is above the bound in float32."""

    def wrong(x: Tensor, grad: Tensor | None, z: Tensor | None, **options) -> Tensor:
        return native.step_(x, grad, z, **{**options, "step_size": options["step_size"] * 1.001})

    ratios = [
        steps.check_step(case, wrong)
        for case in map(steps.step_case, range(40))
        if case.grad is not None and case.x.dtype == torch.float32
    ]
    assert sum(ratio > 1 for ratio in ratios) > len(ratios) / 2
