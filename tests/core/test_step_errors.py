"""The errors of a step's arguments, which no backend sees."""

import math

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.step import (
    choose_backend,
)
from tests.core.step_shared import A, B

ONES = torch.ones(4, 3)
CASES = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "x must be of dtype float32"),
    ({"x": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, "x must be of dtype float32"),
    (
        {"x": torch.tensor(1.0)},
        ValueError,
        r"x must have a leading chain dimension, got shape \[\]",
    ),
    ({"x": torch.ones(4, 3, requires_grad=True)}, ValueError, "x requires grad"),
    ({"x": torch.ones(4, 3, requires_grad=True) * 1}, ValueError, "x requires grad"),
    ({"x": ONES.to(torch.float8_e5m2)}, TypeError, "x must be of dtype .*got torch.float8_e5m2"),
    (
        {"x": torch.ones(6).as_strided((4, 3), (1, 1))},
        ValueError,
        "elements of x share memory; use x.clone()",
    ),
    (
        {"x": torch.ones(9).as_strided((4, 3), (2, 1))},
        ValueError,
        "elements of x share memory; use x.clone()",
    ),
    ({"x": torch.ones(4, 1).expand(4, 3)}, ValueError, "x is an expanded view"),
    ({"x": torch.ones(3).expand(4, 3)}, ValueError, "x is an expanded view"),
    ({"grad": 1.0}, TypeError, "grad must be a tensor, got float"),
    ({"grad": torch.ones(4, 2)}, ValueError, r"grad must have x's shape \[4, 3\], got \[4, 2\]"),
    ({"grad": torch.ones(4, 1)}, ValueError, r"grad must have x's shape \[4, 3\], got \[4, 1\]"),
    ({"grad": ONES.long()}, TypeError, "grad must be of dtype float32.*, got torch.int64"),
    ({"grad": ONES.to(torch.complex64)}, TypeError, "grad must be of dtype float32"),
    ({"grad": ONES.to("meta")}, ValueError, "grad must be on x's device cpu, got meta"),
    ({"grad": ONES.to(torch.float8_e5m2)}, TypeError, "grad must be of dtype float32"),
    ({"grad": ONES.to_sparse()}, TypeError, "grad must be a strided tensor, got layout torch.sp"),
    ({"noise": [0.0]}, TypeError, "noise must be a tensor, got list"),
    ({"noise": torch.ones(4)}, ValueError, r"noise must have x's shape \[4, 3\], got \[4\]"),
    ({"noise": ONES.int()}, TypeError, "noise must be of dtype float32.*, got torch.int32"),
    ({"noise": ONES.to("meta")}, ValueError, "noise must be on x's device cpu, got meta"),
    ({"clamp": (1.0, -1.0)}, ValueError, r"clamp must have lo < hi, got \(1.0, -1.0\)"),
    ({"clamp": (0.5, 0.5)}, ValueError, "clamp must have lo < hi"),
    ({"clamp": (math.nan, 1.0)}, ValueError, "clamp must have lo < hi"),
    ({"clamp": 1.0}, TypeError, r"clamp must be a pair \(lo, hi\) or None, got 1.0"),
    ({"clamp": (0, 1, 2)}, TypeError, r"clamp must be a pair \(lo, hi\) or None"),
    ({"grad_clip": 0.0}, ValueError, "grad_clip must have a bound > 0, got 0.0"),
    ({"grad_clip": -1}, ValueError, "grad_clip must have a bound > 0, got -1"),
    ({"grad_clip": math.nan}, ValueError, "grad_clip must have a bound > 0, got nan"),
    ({"grad_clip": True}, ValueError, "grad_clip must have a bound > 0, got True"),
    ({"grad_clip": ("chain_norm", 0.0)}, ValueError, "grad_clip must have a bound > 0"),
    ({"grad_clip": ("norm", 1.0)}, ValueError, r'grad_clip must be a number, \("chain_norm", c\)'),
    ({"grad_clip": ("chain_norm",)}, ValueError, "grad_clip must be a number"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, ValueError, "seed must be in"),
    ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ({"step": 2**32}, ValueError, r"step must be in \[0, 2\*\*32\)"),
    ({"step": -1}, ValueError, "step must be in"),
    ({"first_chain": 2**32 - 3}, ValueError, "last chain must be in"),
    ({"first_chain": -1}, ValueError, "first_chain must be in"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, native, triton, reference"),
]
COEFFICIENTS = [
    (-0.1, ValueError, "must be finite and >= 0, got -0.1"),
    (math.nan, ValueError, "must be finite and >= 0, got nan"),
    (math.inf, ValueError, "must be finite and >= 0, got inf"),
    ("0.5", TypeError, "must be a number or a tensor, got '0.5'"),
    ("fast", TypeError, "must be a number or a tensor, got 'fast'"),
    (None, TypeError, "must be a number or a tensor, got None"),
    (1j, TypeError, "must be a number or a tensor, got 1j"),
    (torch.tensor([1.0, -2.0, 3.0, 4.0]), ValueError, "must be finite and >= 0, got -2.0"),
    (torch.tensor([1.0, math.nan, 3.0, 4.0]), ValueError, "must be finite and >= 0, got nan"),
    (torch.ones(3), ValueError, r"must be a number or have one value per chain \[4\], got shape"),
    (torch.ones(1), ValueError, r"must be a number or have one value per chain \[4\], got shape"),
    (torch.ones(4, 1), ValueError, "must be a number or have one value per chain"),
    (torch.ones(4, dtype=torch.int64), TypeError, "must be of floating dtype, got torch.int64"),
]
CASES += [
    ({name: value}, error, f"langevin_step_: {name} {match}")
    for name in ("step_size", "noise_std")
    for value, error, match in COEFFICIENTS
]


@pytest.mark.parametrize(
    ("wrong", "error", "match"), CASES, ids=[f"{next(iter(case[0]))}-{case[2]}" for case in CASES]
)
def test_wrong_step_arguments_are_named(wrong: dict, error: type[Exception], match: str) -> None:
    """Of the op's own checks, which no backend sees; x stays as it was."""
    x = wrong.get("x", ONES.clone())
    before = x.detach().clone() if isinstance(x, Tensor) else x
    arguments = {"x": x, "grad": ONES.clone(), "step_size": A, "noise_std": B, "seed": 0, "step": 0}
    with pytest.raises(error, match=match):
        fl.langevin_step_(**arguments | wrong)
    assert torch.equal(x, before) if isinstance(x, Tensor) else x == before


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_states(layout: torch.layout) -> None:
    x = ONES.to_sparse(layout=layout)
    with pytest.raises(TypeError, match=f"x must be a strided tensor, got layout {layout}"):
        fl.langevin_step_(x, None, step_size=A, noise_std=B, seed=0, step=0)


def test_negative_step_sizes_are_pointed_to_maximize() -> None:
    with pytest.raises(ValueError, match=r"to ascend, use maximize=True"):
        fl.langevin_step_(ONES.clone(), ONES, step_size=-1.0, noise_std=0.0, seed=0, step=0)


@pytest.mark.parametrize("noise_std", [B, 0.0])
@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": 2**32}, {"first_chain": 2**32}], ids=str)
def test_addresses_are_checked_whether_or_not_noise_is_drawn(wrong: dict, noise_std: float) -> None:
    address = {"seed": 0, "step": 0} | wrong
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*32\)"):
        fl.langevin_step_(ONES.clone(), ONES, step_size=A, noise_std=noise_std, **address)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"native": "no compiler was found", "triton": "needs a GPU", "reference": None}
    monkeypatch.setattr("fastlangevin.step._why_not", lambda name, device: reasons[name])
    for name in ("native", "triton"):
        match = f'backend "{name}" cannot run on cpu: {reasons[name]}'
        with pytest.raises(RuntimeError, match=match):
            fl.langevin_step_(
                ONES.clone(), ONES, step_size=A, noise_std=B, seed=0, step=0, backend=name
            )
    assert choose_backend("auto", torch.device("cpu")) == "reference"
    reasons["triton"] = None
    assert choose_backend("auto", torch.device("cpu")) == "reference", "interpreted, by name alone"
    assert choose_backend("auto", torch.device("cuda")) == "triton"
    reasons["native"] = None
    assert choose_backend("auto", torch.device("cpu")) == "native"


def test_chains_longer_than_the_address_space() -> None:
    x = torch.empty(1, 2**34 + 1, device="meta")
    with pytest.raises(ValueError, match=r"x must have at most 2\*\*34 elements per chain"):
        fl.langevin_step_(x, x, step_size=A, noise_std=B, seed=0, step=0)
