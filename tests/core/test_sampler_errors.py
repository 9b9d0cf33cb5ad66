"""The errors of settings, calls and energies that do not fit."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from tests.core.sampler_shared import SHAPE, X0, K, N, double_well, make_mlp, sampler

SETTINGS = [
    ({"energy": 3}, TypeError, "energy must be callable, got int"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": -1}, ValueError, "steps must be at least 1, got -1"),
    ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
    ({"clamp": (1.0, -1.0)}, ValueError, r"clamp must have lo < hi, got \(1.0, -1.0\)"),
    ({"clamp": (0.0, 0.0)}, ValueError, "clamp must have lo < hi"),
    ({"clamp": 1.0}, TypeError, r"clamp must be a pair \(lo, hi\) or None"),
    ({"clamp": ("-1", "1")}, TypeError, r"clamp must be a pair .*, got \('-1', '1'\)"),
    ({"grad_clip": 0}, ValueError, "grad_clip must have a bound > 0, got 0"),
    ({"grad_clip": ("l2", 1.0)}, ValueError, "grad_clip must be a number"),
    ({"noise_order": "first"}, ValueError, "noise_order must be one of after, before, last, got"),
    ({"precision": "half"}, ValueError, 'precision must be None, "fp32"'),
    ({"gradient": "fast"}, ValueError, "gradient must be one of auto, autograd, explicit, fused"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, native, triton, reference"),
]
SETTINGS += [
    ({name: value}, error, f"LangevinSampler: {name} {match}")
    for name in ("step_size", "noise_std")
    for value, error, match in [
        (math.nan, ValueError, "must be finite and >= 0, got nan"),
        (-1.0, ValueError, "must be finite and >= 0, got -1.0"),
        ("0.5", TypeError, f"must be a number, a sequence of steps={K} numbers, .*, got '0.5'"),
        (["0.5"] * K, TypeError, "must be a number or a tensor, got '0.5'"),
        (None, TypeError, "must be a number or a tensor, got None"),
        ([0.1] * (K - 1), ValueError, f"as a sequence must have steps={K} numbers, got {K - 1}"),
        ([0.1] * (K - 1) + [math.nan], ValueError, "must be finite and >= 0, got nan"),
        (torch.tensor([0.1, -0.1]), ValueError, "must be finite and >= 0, got -0.1"),
        (torch.ones(3, dtype=torch.int64), TypeError, "must be of floating dtype"),
        (torch.ones(K + 1, N), ValueError, f"must be a number, a sequence of steps={K} numbers"),
        (torch.ones(K, N, 1), ValueError, f"must be a number, a sequence of steps={K} numbers"),
    ]
]


@pytest.mark.parametrize(("wrong", "error", "match"), SETTINGS, ids=[s[2] for s in SETTINGS])
def test_settings_that_do_not_fit(wrong: dict, error: type[Exception], match: str) -> None:
    arguments = {"energy": make_mlp(), "steps": K} | wrong
    with pytest.raises(error, match=match):
        fl.LangevinSampler(**arguments)


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose"])
@pytest.mark.parametrize("energy", [fl.GaussianEnergy(), double_well], ids=["module", "callable"])
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_that_need_a_gpu(
    precision: str, energy: Callable, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the device at the call: energies move, and a callable has none before it."""
    monkeypatch.setattr("fastlangevin.kernels.extension.has_matrix_unit", lambda: False)
    run = sampler(energy, precision=precision)
    with pytest.raises(ValueError, match=f'precision "{precision}" needs a CUDA device'):
        getattr(run, method)(X0, seed=0)


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose", "explain"])
def test_a_backend_that_cannot_run_says_why(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"native": "no compiler was found", "triton": "needs a GPU", "reference": None}
    monkeypatch.setattr("fastlangevin.step._why_not", lambda name, device: reasons[name])
    run = getattr(sampler(double_well, backend="native"), method)
    with pytest.raises(RuntimeError, match='"native" cannot run on cpu: no compiler was found'):
        run(X0) if method == "explain" else run(X0, seed=0)


CALLS = [
    ({"x0": X0.long()}, TypeError, "x0 must be of floating dtype, got torch.int64"),
    ({"x0": X0.to(torch.complex64)}, TypeError, "x0 must be of floating dtype"),
    ({"x0": torch.tensor(1.0)}, ValueError, "x0 must have a leading chain dimension"),
    ({"x0": [[1.0]]}, TypeError, r"x0\[0\] must be a tensor, got list"),
    ({"x0": np.zeros(SHAPE)}, TypeError, "x0 must be a tensor, got ndarray"),
    ({"x0": X0.to("meta")}, ValueError, "x0 is on meta, the energy on cpu"),
    ({"x0": None}, ValueError, "give either x0 or n"),
    ({"n": 4}, ValueError, "give either x0 or n"),
    ({"x0": None, "n": 4}, ValueError, "n needs shape, one chain's"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, ValueError, "seed must be in"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    ({"generator": torch.Generator()}, ValueError, "give seed or generator, not both"),
    ({"first_chain": -1}, ValueError, "first_chain must be in"),
    ({"first_chain": 2**32 - 3}, ValueError, "last chain must be in"),
    ({"first_chain": 1.5}, TypeError, "first_chain must be an integer"),
    ({"first_step": -1}, ValueError, "step must be in"),
    ({"first_step": 2**32 - 4}, ValueError, "last step must be in"),
    ({"first_step": 1.5}, TypeError, "step must be an integer"),
    ({"noise": torch.zeros(K - 1, *SHAPE)}, ValueError, r"noise must have shape \[steps, \*x0.sh"),
    ({"noise": torch.zeros(SHAPE)}, ValueError, "noise must have shape"),
    ({"noise": torch.zeros(K, *SHAPE, device="meta")}, ValueError, "noise must be on x0's device"),
    ({"noise": torch.zeros(K, *SHAPE).long()}, TypeError, "noise must be of floating dtype"),
    ({"noise": np.zeros((K, *SHAPE))}, TypeError, "noise must be a tensor, got ndarray"),
    ({"noise": [0.0]}, TypeError, "noise must be a tensor, got list"),
    ({"checkpoint": "none"}, ValueError, "differentiable=True is needed for checkpoint='none'"),
    ({"grad_steps": 2}, ValueError, "differentiable=True is needed for grad_steps=2"),
    ({"differentiable": True, "checkpoint": "all"}, ValueError, "checkpoint must be"),
    ({"differentiable": True, "grad_steps": 0}, ValueError, "grad_steps must be at least 1"),
    ({"differentiable": True, "grad_steps": K + 1}, ValueError, f"at most steps={K}, got {K + 1}"),
    ({"differentiable": True, "grad_steps": 1.5}, TypeError, "grad_steps must be an integer"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), CALLS, ids=[c[2] for c in CALLS])
def test_calls_that_do_not_fit(wrong: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sampler(make_mlp())(**{"x0": X0.clone(), "seed": 0} | wrong)


@pytest.mark.parametrize("n", [-1, 1.5, "four"])
def test_n_must_be_a_count(n: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="n must be"):
        sampler(fl.ConvEnergy(size=8, width=1))(n=n, seed=0)


@pytest.mark.parametrize("name", ["step_size", "noise_std"])
@pytest.mark.parametrize("shape", [(N + 1,), (1,), (K, N + 1)])
def test_coefficients_for_other_chains(name: str, shape: tuple) -> None:
    run = sampler(make_mlp(), **{name: torch.ones(shape)})
    with pytest.raises(ValueError, match=f"{name} has values for {shape[-1]} chains, x0 has {N}"):
        run(X0, seed=0)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_must_be_a_count(every: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="every must be"):
        sampler(make_mlp()).trajectory(X0, seed=0, every=every)


ENERGIES = [
    (lambda x: x.flatten(1).sum(1)[:-1], ValueError, r"must return one value per chain, \[4\]"),
    (lambda x: x.flatten(1).sum(1)[None], ValueError, r"got shape \[1, 4\]"),
    (lambda x: x, ValueError, r"got shape \[4, 2, 5, 3\]"),
    (lambda x: x.sum(), ValueError, r"got shape \[\]"),
    (lambda x: x.flatten(1).sum(1).long(), TypeError, "must return a floating dtype, got torch.in"),
    (lambda x: x.flatten(1).sum(1) + 0j, TypeError, "must return a floating dtype, got torch.com"),
    (lambda x: torch.zeros(len(x)), ValueError, "does not depend on x"),
    (lambda x: torch.ones(len(x), requires_grad=True), ValueError, "does not depend on x"),
    (lambda x: x.detach().flatten(1).sum(1), ValueError, "does not depend on x"),
    (lambda x: 1.0, TypeError, "must return a tensor, got float"),
    (lambda x: float(x.detach().sum()), TypeError, "must return a tensor, got float"),
    (lambda x: (x.flatten(1).sum(1), x), TypeError, "must return a tensor, got tuple"),
    (lambda x: None, TypeError, "must return a tensor, got NoneType"),
]


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize(("energy", "error", "match"), ENERGIES, ids=[e[2] for e in ENERGIES])
def test_energies_that_do_not_fit(
    energy: Callable, error: type[Exception], match: str, differentiable: bool
) -> None:
    with pytest.raises(error, match=match):
        sampler(energy)(X0, seed=0, differentiable=differentiable)


@pytest.mark.parametrize("method", ["__call__", "trajectory", "differentiable"])
@pytest.mark.parametrize("at", ["value", "gradient"])
def test_chains_that_are_not_finite(method: str, at: str) -> None:
    """A NaN energy of one chain of four is not returned in silence."""

    def energy(x: Tensor) -> Tensor:
        spoilt = torch.tensor([0.0, 0.0, math.nan, 0.0])
        clean = x.square().flatten(1).sum(1)
        return clean + spoilt if at == "value" else clean * (1 + spoilt)

    run = sampler(energy, clamp=(-1.0, 1.0))
    options = {"differentiable": True} if method == "differentiable" else {}
    call = run.trajectory if method == "trajectory" else run
    x0 = X0.clone().requires_grad_(bool(options))
    with pytest.raises(FloatingPointError, match="1 of 4 chains are not finite after 5 steps"):
        call(x0, seed=0, **options)


@pytest.mark.parametrize("value", [3e38, math.inf, -math.inf])
def test_large_states_and_infinite_energies_are_no_error(value: float) -> None:
    """Even where the sum of the states overflows, or that of the energies is not a number."""
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].expand(4, 3)

    def energy(x: Tensor) -> Tensor:
        return (x * 0).sum(1) + (value * signs[:, 0] if math.isinf(value) else 0)

    x0 = torch.full((4, 3), 3e38) * (signs.abs() if value > 0 else signs)
    assert torch.equal(fl.LangevinSampler(energy, K, noise_std=0.0)(x0, seed=0), x0)
